"""An accelerator as the driver sees it: a profile, and what is the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compiler.ir.deferred import DeferredFunction
from ...compiler.ir.pipelines import LOWER, PassCall
from ..target import FUSED, Emitted, Formats, Ops, Target
from .artifact.options import NAMES, Options, read_options
from .chip.chip import Profile
from .chip.describe import profile_line
from .chip.profile import find_profile
from .select.activations import cache_types, rounded_pairs

if TYPE_CHECKING:
    from ...compiler.ir.module import Module
    from ...compiler.ir.notes import Rewritten
    from ...compiler.weights.sources.source import WeightSource


# what the functions below need takes long to import: they import it when they run


def declare_ops() -> None:
    """Declare the ops that accelerators have."""
    from . import ops  # noqa: F401
    from .lower import attention_ops, latent_ops  # noqa: F401


_ROOM = __name__.rpartition(".")[0]
OPS = Ops(declare_ops, DeferredFunction(f"{_ROOM}.select.supported", "why_unsupported"))
FORMATS = Formats(
    DeferredFunction(f"{_ROOM}.kernels.formats", "why_not_held"),
    DeferredFunction(f"{_ROOM}.kernels.formats", "why_slow"),
)


def accelerator_target(profile: Profile, source: str, options: Options) -> Target:
    """Return the target for a chip; `source` is the name or TOML file that options are put on."""
    pairs = rounded_pairs(profile, options.activations)
    rounding = (PassCall("quantize-activations", {"pairs": pairs}),) if pairs else ()
    return Target(
        name=profile.name,
        doc=profile_line(profile),
        pipeline=(*FUSED, PassCall("fold-weights"), PassCall("round-weights"), PassCall(LOWER), *rounding),
        ops=OPS,
        formats=FORMATS,
        lower=lower,
        emit=partial(_emit_artifact, profile=profile, options=options),
        load=DeferredFunction(f"{_ROOM}.run.session", "load_session"),
        options=partial(find_accelerator, source),
        caches={name: PassCall("round-caches") if name == "fp8" else None for name in cache_types(profile)},
        predict=partial(_predict_step, profile=profile),
    )


def find_accelerator(name: str, options: Mapping[str, str]) -> Target:
    """Return the target of a shipped profile or of a TOML file, with a user's options and figures.

    What is no option (options.py) is a figure; see profile.find_profile.
    """
    figures = {key: value for key, value in options.items() if key not in NAMES}
    chosen = read_options(options)
    return accelerator_target(find_profile(name, figures), name, chosen)


def lower(module: Module, target: Target) -> Rewritten:
    """Rewrite the module in the ops that accelerators run."""
    from .lower.module import lower_module

    return lower_module(module)


def _emit_artifact(
    module: Module, source: WeightSource, folder: Path, tile_bytes: int,
    progress: Callable[[int], None] | None = None, *, profile: Profile, options: Options,
) -> Emitted:  # fmt: skip
    from .artifact.emit import emit_artifact

    return emit_artifact(module, source, folder, tile_bytes, progress, profile=profile, options=options)


def _predict_step(module: Module, *, profile: Profile, **step: int) -> dict[str, Any]:
    from .select.predicted import predicted_step

    return predicted_step(module, profile, **step)
