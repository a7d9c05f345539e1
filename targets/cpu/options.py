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
    "kernels": "moec (kernels of its own beside the model) or onnxruntime (the default)",
    "cc": "COMMAND, a C compiler for them instead of ziglang",
    "platforms": f"the platforms to compile them for: {', '.join(PLATFORMS)}, or all",
}


@dataclass(frozen=True)
class OwnKernels:
    """What compiles moec's kernels, and for which platforms."""

    compiler: Compiler
    platforms: tuple[Platform, ...]


@dataclass(frozen=True)
class Options:
    """What a user chose; `record` of None is the one that moec comes with, `kernels` of None are ONNX Runtime's own."""

    record: Record | None = None
    kernels: OwnKernels | None = None


def read_options(given: Mapping[str, str]) -> Options:
    """Return the options; MoecError for one that there is not, or whose value is none."""
    if unknown := sorted(set(given) - set(_NAMES)):
        has = "; ".join(f"{name}={what}" for name, what in _NAMES.items())
        raise MoecError(f"target cpu has no option {', '.join(unknown)}", todo=f"it has {has}")
    record = None
    if "capabilities" in given:
        from .capabilities import read_record

        record = read_record(Path(given["capabilities"]))
    kernels = given.get("kernels", "onnxruntime")
    if kernels not in ("moec", "onnxruntime"):
        raise MoecError(f"there are no kernels {kernels}", todo=f"-D kernels= is {_NAMES['kernels']}")
    if kernels == "onnxruntime":
        if idle := [name for name in ("cc", "platforms") if name in given]:
            raise MoecError(f"-D {idle[0]}= is for kernels of moec's own", todo="add -D kernels=moec, or leave it out")
        return Options(record)
    compiler = find_compiler(given.get("cc"))
    if compiler is None:
        raise MoecError(
            "no compiler for kernels of moec's own: the package ziglang is not installed",
            todo="run `pip install ziglang`, give a compiler with -D cc=gcc, or leave -D kernels=moec out",
        )
    return Options(record, OwnKernels(compiler, _chosen_platforms(given.get("platforms"))))


def _chosen_platforms(given: str | None) -> tuple[Platform, ...]:
    if given is None:
        own = this_platform()
        if own is None:
            raise MoecError(
                "moec has no kernels of its own for this platform",
                todo=f"name others with -D platforms=, of {', '.join(PLATFORMS)}, or leave -D kernels=moec out",
            )
        return (own,)
    names = list(PLATFORMS) if given == "all" else [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in PLATFORMS]:
        raise MoecError(f"there is no platform {unknown[0]}", todo=f"there are {', '.join(PLATFORMS)}, and all")
    return tuple(PLATFORMS[name] for name in dict.fromkeys(names))
