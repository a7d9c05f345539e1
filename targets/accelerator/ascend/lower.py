"""Lowers Triton sources to Linalg for Ascend, with triton-ascend in an environment of its own.

That package is imported as `triton` like Triton itself, so it gets a virtual environment in the user's cache folder, made
only when asked for. From Linalg to a binary it takes bishengir-compile, which comes with CANN, Huawei's toolkit.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ....compiler.artifact.atomic import MARK, atomic_folder
from ....compiler.artifact.user_cache import cache_folder
from ....compiler.errors import MoecError
from ..tile.tiles import Program
from ..triton.source import pointer_name, triton_source
from .program import for_ascend

REQUIREMENTS = ("triton-ascend==3.2.0", "pybind11==3.1.0")  # all that lowering imports: 164 MB, and no torch
PYTHONS = ("3.11", "3.10", "3.9")  # what triton-ascend is built for, the one to prefer first
MACHINES = ("x86_64", "aarch64")
WORKER = Path(__file__).with_name("worker.py")
INSTALL_SECONDS = 1800
KERNEL_SECONDS = 120  # the slowest kernel took under one
SHOWN = 12  # lines of a program's output in an error

TYPES: Mapping[str, str] = {
    "f32": "fp32", "f16": "fp16", "bf16": "bf16", "f8e4m3": "fp8e4nv", "f8e5m2": "fp8e5", "i64": "i64", "i32": "i32",
    "i8": "i8", "u8": "u8", "bool": "i8",
}  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """A folder with a Python that has triton-ascend."""

    folder: Path

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.folder / "bin" / "python"


@dataclass(frozen=True)
class AscendKernel:
    """A Triton source and what is lowered of it: the function, the Triton type of each argument, those that are fixed."""

    source: str
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Lowered:
    """The result of lowering a kernel: Triton IR and Linalg as text, or an error and at which step (source, triton, linalg)."""

    kernel: str
    ttir: str = ""
    linalg: str = ""
    stage: str = ""
    error: str = ""


def is_newer(arch: str) -> bool:
    """Return whether a chip (Ascend910B4, Ascend910_9392, Ascend950DT_9582, ...) is of the Ascend 950 generation.

    Raises MoecError for what is no Ascend of either generation. Ascend910_95xx is what the 950 was called before.
    """
    if arch.startswith(("Ascend950", "Ascend910_95")):
        return True
    if arch.startswith(("Ascend910B", "Ascend910_93")):
        return False
    raise MoecError(f"{arch} is no Ascend that triton-ascend lowers for", todo="it knows Ascend910B, 910_93xx and 950")


# --- the environment -----------------------------------------------------------------------------------------------


def default_folder() -> Path:
    """Return where the environment lies unless another folder is named: in the user's cache."""
    return cache_folder() / REQUIREMENTS[0].replace("==", "-")


def open_environment(folder: Path | None = None, create: bool = False, python: str | None = None) -> Environment | None:
    """Return the environment in `folder`, made first if there is none and `create`; None if there is none.

    `python` is an interpreter to make it with; by default this one or a `python3.11`, `python3.10`, `python3.9` in PATH.
    Raises MoecError for an environment that is damaged or has other packages (`create` makes it anew), and when one
    cannot be made: no such build of triton-ascend, no Python that it is built for, no network, no space.
    """
    folder = folder or default_folder()
    problem = _environment_problem(folder)
    if not problem:
        return Environment(folder)
    if not create:
        if not folder.exists():
            return None
        raise MoecError(f"the environment of triton-ascend {problem}", str(folder), todo="remove it, or make it anew")
    _make_environment(folder, _find_python(python))
    if problem := _environment_problem(folder):
        raise MoecError(f"the environment of triton-ascend, just made, {problem}", str(folder))
    return Environment(folder)


def _environment_problem(folder: Path) -> str:
    """Return what is wrong with an environment; empty if it can be used."""
    try:
        made_with = json.loads((folder / MARK).read_text(encoding="utf-8"))["requirements"]
    except (OSError, ValueError, KeyError, TypeError):
        return "was not made by moec, or not to its end"
    if made_with != list(REQUIREMENTS):
        return f"has {', '.join(made_with)} and not {', '.join(REQUIREMENTS)}"
    if not os.access(Environment(folder).python, os.X_OK):
        return "has lost its Python (the one that it was made with is gone)"
    return ""


def _find_python(given: str | None) -> str:
    """Return an interpreter that triton-ascend is built for."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise MoecError(
            f"triton-ascend has no build for {platform.system()} on {platform.machine()}",
            todo=f"lower the kernels on Linux ({' or '.join(MACHINES)}); the Triton sources are the same",
        )
    tried = []
    for name in [given] if given else [sys.executable, *(f"python{version}" for version in PYTHONS)]:
        path = shutil.which(name)
        version = _python_version(path) if path else ""
        if path and version in PYTHONS:
            return path
        tried.append(f"{name} is {f'Python {version}' if version else 'a program that does not run'}")
    raise MoecError(
        f"triton-ascend wants Python {', '.join(PYTHONS)}: {'; '.join(tried)}",
        todo="install one of them, or name an interpreter",
    )


def _python_version(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _make_environment(folder: Path, python: str) -> None:
    with atomic_folder(folder) as partial:
        _run_command(
            [python, "-I", "-m", "venv", str(partial)],
            "cannot make a virtual environment",
            "install Python's venv module",
        )
        own = [str(Environment(partial).python), "-I", "-m", "pip", "--disable-pip-version-check"]
        install = [*own, "install", "--no-deps", "--only-binary=:all:", "--retries=1", *REQUIREMENTS]
        _run_command(
            install, f"cannot install {' and '.join(REQUIREMENTS)}", "it takes a network; without it there are sources"
        )
        # its scripts name the folder that this one is before it is put in place, and nothing needs them
        _run_command([*own, "uninstall", "--yes", "pip", "setuptools"], "cannot finish the environment", "")
        about = {"requirements": list(REQUIREMENTS), "python": _python_version(python)}
        (partial / MARK).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _run_command(command: Sequence[str], what: str, todo: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MoecError(what, command[0], excerpt=str(error), todo=todo) from error
    if done.returncode:
        raise MoecError(what, command[0], excerpt=_last_lines(done.stdout + done.stderr), todo=todo)


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-SHOWN:])


# --- lowering ------------------------------------------------------------------------------------------------------


def kernel_of(program: Program, arch: str) -> AscendKernel:
    """Return the Triton source of a tile program as triton-ascend takes it for a chip; MoecError as in for_ascend."""
    program = for_ascend(program, is_newer(arch))
    tensors = {pointer_name(a.name): f"*{TYPES[a.dtype]}" for a in program.arguments}
    return AscendKernel(triton_source(program), program.name, tensors | dict.fromkeys(program.scalars, "i32"))


def lower_on_ascend(
    kernels: Sequence[AscendKernel], arch: str, where: Environment, seconds: float = KERNEL_SECONDS
) -> list[Lowered]:
    """Lower kernels for a chip and return what came of each, in their order; one that fails leaves the others alone.

    A kernel that ends the worker or takes longer than `seconds` has that as its error. Raises MoecError if the worker
    does not even start, or for a chip that triton-ascend does not know.
    """
    newer = is_newer(arch)
    with tempfile.TemporaryDirectory() as name:
        jobs = []
        for number, kernel in enumerate(kernels):
            file = Path(name) / f"{number}_{kernel.name}.py"
            file.write_text(kernel.source, encoding="utf-8")
            about = {"source": str(file), "kernel": kernel.name, "arch": arch, "newer": newer}
            jobs.append(about | {"signature": dict(kernel.signature), "constants": dict(kernel.constants)})
        answers: list[dict[str, Any]] = []
        while len(answers) < len(jobs):
            answers += _worker_answers(jobs[len(answers) :], where, seconds)
    return [_finished_kernel(kernel.name, answer) for kernel, answer in zip(kernels, answers, strict=True)]


def _finished_kernel(kernel: str, answer: Mapping[str, str]) -> Lowered:
    """Return what a worker's answer says; an operation of Triton's that the adapter left as it was is an error."""
    if left := re.search(r"^ *(?:%\w+ = )?(tt\.\w+).*$", answer.get("linalg", ""), re.MULTILINE):
        return Lowered(kernel, stage="linalg", error=f"the adapter left {left[1]} in it: {left[0].strip()}")
    return Lowered(kernel, **answer)


def _worker_answers(jobs: Sequence[Mapping[str, Any]], where: Environment, seconds: float) -> list[dict[str, Any]]:
    """Return the answers of one worker, at least one: the last reports its end if it did not answer all jobs."""
    answers: list[dict[str, Any]] = []
    late = threading.Event()
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as log:
        given.write("".join(json.dumps(job) + "\n" for job in jobs).encode())
        given.seek(0)
        for line in _worker_lines(where, given, log, seconds, late):
            answers.append(json.loads(line))
        log.seek(0)
        said = _last_lines(log.read().decode("utf-8", "replace"))
    if not answers:
        raise MoecError(
            "triton-ascend does not start", str(where.folder), excerpt=said, todo="make the environment anew"
        )
    del answers[0]  # it said that it had started
    if len(answers) < len(jobs):
        what = f"it took longer than {seconds:g} s" if late.is_set() else "it ended the compiler"
        answers.append({"stage": "worker", "error": f"{what}\n{said}".strip()})
    return answers


def _worker_lines(
    where: Environment, given: IO[bytes], log: IO[bytes], seconds: float, late: threading.Event
) -> Iterator[bytes]:
    """Yield what a worker writes, line by line; it is ended when one takes longer than `seconds`, and `late` set."""
    # isolated: neither this process's PYTHONPATH nor packages of the user's may be in the way of its `triton`
    command = [str(where.python), "-I", str(WORKER)]
    try:
        worker = subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
    except OSError as error:
        what = f"cannot run the environment's Python: {error.strerror}"
        raise MoecError(what, str(where.python), todo="make the environment anew") from error

    def end() -> None:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)  # with the adapter program that it may have started

    def too_late() -> None:
        late.set()
        end()

    def watch() -> threading.Timer:
        timer = threading.Timer(seconds, too_late)
        timer.start()
        return timer

    timer = watch()
    try:
        assert worker.stdout
        for line in worker.stdout:
            timer.cancel()
            timer.join()
            if line.endswith(b"\n"):
                yield line
            timer = watch()
    finally:
        timer.cancel()
        timer.join()
        if worker.poll() is None:
            end()
        worker.communicate()
