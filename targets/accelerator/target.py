"""An accelerator as the driver sees it: a profile, and what is the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compiler.errors import MoecError
from ...compiler.ir.deferred import DeferredFunction
from ...compiler.ir.pipelines import LOWER, PassCall
from ..target import FUSED, Emitted, Formats, Ops, Target
from .chip.chip import Profile
from .chip.describe import line
from .chip.profile import find_profile

if TYPE_CHECKING:
    from ...compiler.ir.module import Module
    from ...compiler.ir.notes import Rewritten
    from ...compiler.weights.sources.source import WeightSource


# what the functions below need takes long to import: they import it when they run

# of -D, beside the figures of the profile: choices, the first by default
OPTIONS = {"kernels": ("objects", "source"), "toolchain": ("found", "make")}
BUCKETS = "buckets"  # of -D too: the most tokens of a step that kernels are tuned for, as in 1,16,256


def declare_ops() -> None:
    """Declare the ops that accelerators have."""
    from . import ops  # noqa: F401


_ROOM = __name__.rpartition(".")[0]
OPS = Ops(declare_ops, DeferredFunction(f"{_ROOM}.select.supported", "supported"))
FORMATS = Formats(
    DeferredFunction(f"{_ROOM}.kernels.formats", "holds"), DeferredFunction(f"{_ROOM}.kernels.formats", "slow")
)


def accelerator_target(
    profile: Profile, source: str = "", kernels: str = "objects", toolchain: str = "found",
    buckets: tuple[int, ...] | None = None,
) -> Target:  # fmt: skip
    """Return the target for a chip; `source` is the name or TOML file that options are put on (the profile's name).

    `kernels` is `objects` (sources, and compiled where the toolchain is installed) or `source`; `toolchain` is `found`
    or `make` (triton-ascend's environment is made if there is none). `buckets` are the most tokens of a step that
    kernels are tuned for (None: spec.BUCKETS).
    """
    return Target(
        name=profile.name,
        doc=line(profile),
        pipeline=(*FUSED, PassCall("round-weights"), PassCall(LOWER)),
        ops=OPS,
        formats=FORMATS,
        lower=lower,
        emit=partial(
            _emit, profile=profile, compiled=kernels == "objects", make_toolchain=toolchain == "make", buckets=buckets
        ),
        load=DeferredFunction(f"{_ROOM}.run.session", "load"),
        options=partial(find_accelerator, source or profile.name),
        predict=partial(_predict, profile=profile),
    )


def find_accelerator(name: str, options: Mapping[str, str]) -> Target:
    """Return the target of a shipped profile or of a TOML file, with a user's figures; see profile.find_profile.

    `kernels=source` leaves the kernels uncompiled; `toolchain=make` makes what compiles them, for a chip that takes an
    environment of its own; `buckets=1,16,256` tunes kernels for these numbers of tokens of a step.
    """
    figures = {key: value for key, value in options.items() if key not in (*OPTIONS, BUCKETS)}
    chosen = {key: options.get(key, choices[0]) for key, choices in OPTIONS.items()}
    for key, value in chosen.items():
        if value not in OPTIONS[key]:
            todo = f"give {' or '.join(OPTIONS[key])}"
            raise MoecError(f"{key} cannot be {value}", where=f"-D {key}={value}", todo=todo)
    return accelerator_target(find_profile(name, figures), name, **chosen, buckets=_buckets(options.get(BUCKETS)))


def _buckets(text: str | None) -> tuple[int, ...] | None:
    """Return the numbers of an option `buckets`; MoecError if they are none."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise MoecError(
            f"{BUCKETS} cannot be {text}", where=f"-D {BUCKETS}={text}", todo="give numbers, as in 1,16,256"
        )
    return tuple(sorted({int(part) for part in parts}))


def lower(module: Module, target: Target) -> Rewritten:
    """Rewrite the module in the ops that accelerators run."""
    from .lower import lower

    return lower(module)


def _emit(
    module: Module, source: WeightSource, folder: Path, tile_bytes: int,
    progress: Callable[[int], None] | None = None, *, profile: Profile,
    compiled: bool, make_toolchain: bool, buckets: tuple[int, ...] | None = None,
) -> Emitted:  # fmt: skip
    from .artifact.emit import emit

    return emit(
        module, source, folder, tile_bytes, progress, profile=profile, compiled=compiled,
        make_toolchain=make_toolchain, buckets=buckets,
    )  # fmt: skip


def _predict(module: Module, *, profile: Profile, **step: int) -> dict[str, Any]:
    from .predict.predicted import predicted

    return predicted(module, profile, **step)
