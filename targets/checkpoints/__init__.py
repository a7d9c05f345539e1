"""Targets that write checkpoints for other runtimes: `safetensors` for vLLM, SGLang and transformers, `gguf` for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ...compiler.errors import MoecError
from ...compiler.ir.deferred import DeferredFunction
from ...compiler.ir.pipelines import LOWER, PassCall
from ..target import FUSED, Emitted, Formats, Ops, Target

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...compiler.formats.format import Format
    from ...compiler.ir.module import Module, Op
    from ...compiler.ir.notes import Rewritten
    from ...compiler.weights.sources.source import WeightSource

_LAYOUTS = ("compressed-tensors", "gptq")
# passes that cut weights apart which are one tensor in the checkpoint
_CUTTING = ("absorb-mla",)


def _declare_nothing() -> None:
    """Declare no ops: what is written are weights alone, under the ops of stage moe."""


def _runs_everything(op: Op) -> None:
    """Return no reason against any op: other runtimes run the model from its config."""


def _lowering(check: Callable[[Module], object]) -> Callable[..., Rewritten]:
    """Return the lowering of a target that leaves ops as they are; `check` raises MoecError for a weight without a place."""

    def lower(module: Module, target: Target) -> Rewritten:
        """Check that every weight has a place in the checkpoint; ops stay as they are."""
        from ...compiler.ir.notes import Rewritten

        check(module)
        return Rewritten(replace(module, stage="kernel"))

    return lower


def _holds(op: Op, format: Format, *, layout: str) -> str | None:
    from .layouts import LAYOUTS, why_not_held

    return why_not_held(op, format, LAYOUTS[layout])


def _emit(
    module: Module, source: WeightSource, folder: Path, tile_bytes: int,
    progress: Callable[[int], None] | None = None, *, layout: str,
) -> Emitted:  # fmt: skip
    from .layouts import LAYOUTS
    from .safetensors import write_checkpoint

    return write_checkpoint(module, source, folder, tile_bytes, progress, layout=LAYOUTS[layout])


def _refuse_to_open(folder: Path | str, **options: Any) -> NoReturn:
    todo = "load it in the runtime that it is for, or compile this folder: moec compile DIR --target cpu"
    raise MoecError("a checkpoint for other runtimes does not run by itself", str(folder), todo=todo)


def _never_slow(op: Op, format: Format) -> None:
    """Return no reason against any format: a scale is written once for each block."""


def _safetensors(layout: str) -> Target:
    return Target(
        name="safetensors",
        doc="A Hugging Face checkpoint with quantized weights, for vLLM, SGLang and transformers: compressed-tensors or GPTQ.",
        pipeline=(*(call for call in FUSED if call.name not in _CUTTING), PassCall(LOWER)),
        ops=Ops(_declare_nothing, _runs_everything),
        formats=Formats(holds=partial(_holds, layout=layout), slow=DeferredFunction(f"{__name__}.layouts", "why_slow")),
        lower=_lowering(DeferredFunction(f"{__name__}.safetensors", "check_modules")),
        emit=partial(_emit, layout=layout),
        load=_refuse_to_open,
        options=_with_options,
        keeps_experts=True,
        checkpoint=True,
    )


def _without_options(given: Mapping[str, str]) -> Target:
    raise MoecError(f"target gguf has no option {min(given)}", todo="leave -D out")


def _with_options(given: Mapping[str, str]) -> Target:
    """Return the target with a user's options; MoecError for one that there is not, or whose value is none."""
    if unknown := sorted(set(given) - {"layout"}):
        todo = f"it has layout={' or '.join(_LAYOUTS)}"
        raise MoecError(f"target safetensors has no option {', '.join(unknown)}", todo=todo)
    if given["layout"] not in _LAYOUTS:
        raise MoecError(f"there is no layout {given['layout']}", todo=f"-D layout= is {' or '.join(_LAYOUTS)}")
    return _safetensors(given["layout"])


SAFETENSORS = _safetensors(_LAYOUTS[0])
GGUF = Target(
    name="gguf",
    doc="A GGUF file with quantized weights, for llama.cpp: Q4_0, Q4_1, Q8_0, MXFP4 and floats.",
    pipeline=SAFETENSORS.pipeline,
    ops=SAFETENSORS.ops,
    formats=Formats(holds=DeferredFunction(f"{__name__}.gguf_blocks", "why_not_held"), slow=_never_slow),
    lower=_lowering(DeferredFunction(f"{__name__}.exported", "find_exported")),
    emit=DeferredFunction(f"{__name__}.gguf", "write_gguf"),
    load=_refuse_to_open,
    options=_without_options,
    keeps_experts=True,
    checkpoint=True,
)

__all__ = ["GGUF", "SAFETENSORS"]
