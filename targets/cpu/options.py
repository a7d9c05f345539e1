"""The options of target cpu (`-D name=value`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...compiler.errors import MoecError
from .kernels.library import PLATFORMS, Compiler, Platform, find_compiler, this_platform

if TYPE_CHECKING:
    from .capabilities import Record

_NAMES = {
    "capabilities": "FILE, a record made by --probe instead of the one that moec comes with",
    "kernels": "moec (kernels of its own beside the model; the default where ziglang is installed) or onnxruntime",
    "cc": "COMMAND, a C compiler for them instead of ziglang",
    "platforms": f"the platforms to compile them for: all (the default), or some of {', '.join(PLATFORMS)}",
}


@dataclass(frozen=True)
class OwnKernels:
    """What compiles moec's kernels (None: ziglang, where it is installed), and for which platforms.

    Kernels that are `required` are an error where they cannot be had, others are left out with a note.
    """

    platforms: tuple[Platform, ...] = tuple(PLATFORMS.values())
    compiler: Compiler | None = None
    required: bool = False


@dataclass(frozen=True)
class Options:
    """What a user chose; `record` of None is the one that moec comes with, `kernels` of None are ONNX Runtime's own."""

    record: Record | None = None
    kernels: OwnKernels | None = OwnKernels()


def read_options(given: Mapping[str, str]) -> Options:
    """Return the options; MoecError for one that there is not, or whose value is none."""
    if unknown := sorted(set(given) - set(_NAMES)):
        has = "; ".join(f"{name}={what}" for name, what in _NAMES.items())
        raise MoecError(f"target cpu has no option {', '.join(unknown)}", todo=f"it has {has}")
    record = None
    if "capabilities" in given:
        from .capabilities import read_record

        record = read_record(Path(given["capabilities"]))
    kernels = given.get("kernels")
    if kernels not in (None, "moec", "onnxruntime"):
        raise MoecError(f"there are no kernels {kernels}", todo=f"-D kernels= is {_NAMES['kernels']}")
    about = [name for name in ("cc", "platforms") if name in given]
    if kernels == "onnxruntime":
        if about:
            raise MoecError(f"-D {about[0]}= is for kernels of moec's own", todo="leave -D kernels=onnxruntime out")
        return Options(record, None)
    if kernels is None and not about:
        return Options(record)
    compiler = find_compiler(given.get("cc"))
    if compiler is None:
        raise MoecError(
            "no compiler for kernels of moec's own: the package ziglang is not installed",
            todo=f"run `pip install ziglang`, give a compiler with -D cc=gcc, or leave -D {['kernels', *about][-1]}= out",
        )
    return Options(record, OwnKernels(_chosen_platforms(given.get("platforms"), compiler), compiler, required=True))


def _chosen_platforms(given: str | None, compiler: Compiler) -> tuple[Platform, ...]:
    if given is None and not compiler.crosses:
        own = this_platform()
        if own is None:
            raise MoecError("moec has no kernels of its own for this platform", todo="leave -D cc= out")
        return (own,)
    names = list(PLATFORMS) if given in (None, "all") else [name.strip() for name in str(given).split(",")]
    if unknown := [name for name in names if name not in PLATFORMS]:
        raise MoecError(f"there is no platform {unknown[0]}", todo=f"there are {', '.join(PLATFORMS)}, and all")
    return tuple(PLATFORMS[name] for name in dict.fromkeys(names))
