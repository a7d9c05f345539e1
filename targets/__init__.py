"""The targets, by name: `cpu`, `ranks` (the shards of a plan), one for each profile of an accelerator, and those of packages outside of moec.

A target of moec is a folder here and a name in `TARGETS`; what packages bring is in `compiler/errors/plugins.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compiler.errors.plugins import TARGETS as BROUGHT
from ..compiler.errors.plugins import broken_package, brought_names, entry_points_of, load_brought, refuse_names
from .checkpoints import GGUF, SAFETENSORS
from .cpu import TARGET as CPU
from .portable import TARGET as ONNX
from .ranks import TARGET as RANKS
from .target import Target

if TYPE_CHECKING:
    from ..compiler.errors import MoecError


OWN = {target.name: target for target in (CPU, ONNX, RANKS, SAFETENSORS, GGUF)}


class _Targets(Mapping[str, Target]):
    """Makes a target of an accelerator when it is asked for: a profile is a file, and names are those of the files."""

    def __getitem__(self, name: str) -> Target:
        if name in OWN:
            return OWN[name]
        from .accelerator.chip.profile import profile_file
        from .accelerator.target import find_accelerator

        if profile_file(name) is not None:
            return find_accelerator(name, {})
        if (found := load_brought(BROUGHT, name, Target, "a Target")) is None:
            raise KeyError(name)
        if found.name != name:
            raise broken_package(
                entry_points_of(BROUGHT)[name], f"brings {name} as a target that is named {found.name}"
            )
        return found

    def __iter__(self) -> Iterator[str]:
        from .accelerator.chip.profile import known_profiles

        own = (*OWN, *known_profiles())
        refuse_names(BROUGHT, set(own))
        return iter((*own, *brought_names(BROUGHT)))

    def __len__(self) -> int:
        return sum(1 for _ in self)


TARGETS: Mapping[str, Target] = _Targets()


def open_target(name: str, options: Mapping[str, str]) -> Target:
    """Return a target by name, or that of a chip's TOML file, with options; MoecError for what there is not."""
    from .accelerator.chip.describe import is_profile
    from .accelerator.target import find_accelerator

    if name not in OWN and is_profile(name):
        return find_accelerator(name, options)
    if name not in TARGETS:
        raise unknown_target(name)
    target = TARGETS[name]
    return target.options(options) if options and target.options else target


def load_artifact(name: str, folder: Path, **options: Any) -> Any:
    """Open an artifact with the runtime of its target: a chip known by a TOML file only runs as every accelerator does."""
    if name in TARGETS:
        return TARGETS[name].load(folder, **options)
    if not (folder / "kernels.json").is_file():
        raise unknown_target(name)
    from .accelerator.run.session import load_session

    return load_session(folder, **options)


def unknown_target(name: str) -> MoecError:
    """Return the error for a name that no target has, with those near it."""
    from difflib import get_close_matches

    from ..compiler.errors import MoecError

    near = get_close_matches(name, TARGETS, n=3)
    todo = f"did you mean {' or '.join(near)}?" if near else f"targets: {', '.join(TARGETS)}; or a chip's TOML file"
    return MoecError(f"there is no target {name!r}", todo=todo)


def declare_kernel_ops(*others: Target) -> None:
    """Declare the ops of moec's own targets and of others, so that programs of stage kernel can be read."""
    from .accelerator.target import OPS as ACCELERATOR

    for ops in (CPU.ops, ACCELERATOR, *(target.ops for target in others)):
        ops.declare()


__all__ = ["TARGETS", "Target", "declare_kernel_ops", "load_artifact", "open_target", "unknown_target"]
