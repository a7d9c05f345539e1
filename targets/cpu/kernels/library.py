"""Compiles the kernels' sources to shared libraries, one for each platform, and keeps them in the user's cache.

The compiler is clang as the package `ziglang` brings it: it makes libraries for every platform on any of them, and the
same bytes from the same sources.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ....compiler.artifact.user_cache import cache_folder, keep_file
from ....compiler.errors import MoecError, write_error

SOURCES = Path(__file__).with_name("source")
OPTIONS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-shared")
_TIMEOUT = 600  # seconds; the first library for Windows takes a minute


@dataclass(frozen=True)
class Platform:
    """A kind of machine that libraries are made for: its name, what clang calls it, and how a library's name ends.

    `options` are those for every compiler, `crossed` those for ziglang, with `headers` of it (a folder of its own ones).
    """

    name: str
    triple: str
    processor: str
    suffix: str
    options: tuple[str, ...] = ()
    crossed: tuple[str, ...] = ()
    headers: str = ""

    @property
    def file(self) -> str:
        """The library's name in an artifact."""
        return f"moec-kernels.{self.name}.{self.suffix}"


# The C runtime that ziglang would compile for Windows first takes a minute: windows.c has the two functions of it that are needed.
_NO_RUNTIME = ("-nostdlib", "-DMOEC_NO_RUNTIME")
PLATFORMS = {
    p.name: p
    for p in (
        Platform("linux-x86_64", "x86_64-linux-gnu.2.17", "x86_64", "so", ("-fPIC", "-lm")),
        Platform("linux-aarch64", "aarch64-linux-gnu.2.17", "generic", "so", ("-fPIC", "-lm")),
        Platform(
            "macos-aarch64", "aarch64-macos", "apple_m1", "dylib", ("-fPIC", "-lm"),
            # a library has its own name in it, by default with the folder in which it was made
            crossed=("-Wl,-install_name,@rpath/moec-kernels.macos-aarch64.dylib",),
        ),
        Platform(
            "windows-x86_64", "x86_64-windows-gnu", "x86_64", "dll", crossed=(*_NO_RUNTIME, "-lucrtbase", "-lkernel32"),
            headers="libc/include/any-windows-any",
        ),
    )
}  # fmt: skip


def this_platform() -> Platform | None:
    """Return the platform that this process runs on; None for one without kernels."""
    system = {"Darwin": "macos"}.get(platform.system(), platform.system().lower())
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return PLATFORMS.get(f"{system}-{machine}")


@dataclass(frozen=True)
class Compiler:
    """What compiles C: its command, and what tells its versions apart. `crosses` says whether it does so for any platform."""

    command: tuple[str, ...]
    version: str
    crosses: bool


def find_compiler(cc: str | None = None) -> Compiler | None:
    """Return the compiler `cc`, or ziglang's; None if that is not installed. Raises MoecError if `cc` does not run."""
    if cc is None:
        if _ziglang_folder() is None:
            return None
        return Compiler((sys.executable, "-m", "ziglang", "cc"), f"ziglang {metadata.version('ziglang')}", crosses=True)
    command = tuple(shlex.split(cc))
    shown = _run_compiler((*command, "--version"), f"the compiler {cc} does not run", "give another one with -D cc=")
    return Compiler(command, shown.splitlines()[0] if shown else cc, crosses=False)


def compile_library(place: Platform, compiler: Compiler) -> bytes:
    """Return the shared library of the kernels for a platform, from the user's cache if it was compiled before.

    Raises MoecError with the compiler's words if it fails, or if it makes libraries for its own platform only.
    """
    if not compiler.crosses and place != this_platform():
        raise MoecError(
            f"{shlex.join(compiler.command)} is not asked for libraries of {place.name}",
            todo="leave -D cc= or -D platforms= out: ziglang makes libraries for all of them",
        )
    options = (*OPTIONS, *place.options)
    if compiler.crosses:
        options = (*options, "-s", "-target", place.triple, f"-mcpu={place.processor}", *place.crossed)
    kept = cache_folder() / "kernels" / f"{_library_fingerprint(compiler, options)}.{place.suffix}"
    if (found := _read_kept(kept)) is not None:
        return found
    zig = _ziglang_folder() if compiler.crosses and place.headers else None
    headers = ("-isystem", str(zig / "lib" / place.headers)) if zig else ()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / place.file
        # file names without folders: they, and so the library's bytes, are the same on every machine
        sources = sorted(path.name for path in SOURCES.glob("*.c"))
        command = (*compiler.command, "-o", str(made), *sources, *options, *headers)
        _run_compiler(
            command, f"the kernels for {place.name} do not compile", "report it, or compile with -D kernels=onnxruntime"
        )
        content = made.read_bytes()
    keep_file(kept, hashlib.sha256(content).digest() + content)
    return content


def _read_kept(path: Path) -> bytes | None:
    """Return a library of the cache, which lies behind its sha256; None if it is not there, or not whole."""
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    return kept[size:] if hashlib.sha256(kept[size:]).digest() == kept[:size] else None


def _ziglang_folder() -> Path | None:
    """Return where the package ziglang lies; None if it is not installed."""
    try:
        import ziglang
    except ImportError:
        return None
    return Path(next(iter(ziglang.__path__)))


def _library_fingerprint(compiler: Compiler, options: Sequence[str]) -> str:
    """Return a hash of everything that the library's bytes depend on."""
    digest = hashlib.sha256("\0".join((compiler.version, *options)).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _run_compiler(command: Sequence[str], what: str, todo: str) -> str:
    try:
        done = subprocess.run(
            command, cwd=SOURCES, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=_TIMEOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise MoecError(f"{what}: it took longer than {_TIMEOUT} seconds", todo=todo) from error
    except OSError as error:
        raise MoecError(f"{what}: {error.strerror}", todo=todo) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if re.search("error", line, re.IGNORECASE)]
        raise MoecError(what, todo=todo, excerpt="\n".join(lines[:5] or done.stderr.splitlines()[-5:]))
    return done.stdout


def made_libraries(places: Sequence[Platform], compiler: Compiler) -> dict[Platform, bytes]:
    """Return the library for each platform; those that were not compiled before are compiled at the same time."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(places, pool.map(lambda place: compile_library(place, compiler), places), strict=True))


def write_libraries(folder: Path, made: Mapping[Platform, bytes]) -> dict[str, str]:
    """Write libraries into a folder; return their sha256 by the file."""
    for place, content in made.items():
        try:
            (folder / place.file).write_bytes(content)
        except OSError as error:
            raise write_error(error, folder / place.file) from error
    return {place.file: hashlib.sha256(content).hexdigest() for place, content in made.items()}
