"""Target `onnx`: ONNX with operators of the standard alone, for any runtime that has opset 23."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...compiler.errors import MoecError
from ...compiler.ir.deferred import DeferredFunction
from ...compiler.ir.pipelines import LOWER, PassCall
from ..cpu import TARGET as CPU
from ..target import FUSED, Emitted, Formats, Ops, Target

if TYPE_CHECKING:
    from ...compiler.formats.format import Format
    from ...compiler.ir.module import Module, Op
    from ...compiler.ir.notes import Rewritten
    from ...compiler.weights.sources.source import WeightSource

_ROOM = __name__
_EXPERTS = ("packed", "tiled")  # the experts of each token, gathered; all experts for every token


def lower(module: Module, target: Target) -> Rewritten:
    """Rewrite the module in ops that have a form in standard operators."""
    from .lower import lower_module

    return lower_module(module)


def _emit_artifact(
    module: Module, source: WeightSource, folder: Path, tile_bytes: int,
    progress: Callable[[int], None] | None = None, *, experts: str = _EXPERTS[0],
) -> Emitted:  # fmt: skip
    from ..cpu.onnx.emit import OtherNodes, emit_model
    from .experts import BODIES
    from .quantized import KERNELS
    from .standard import rewrite_nodes

    body = BODIES[experts]
    other = OtherNodes({"moe.experts": body, "ort.experts_nbits": body, **KERNELS}, rewrite_nodes)
    return emit_model(module, source, folder, tile_bytes, progress, other=other)


def _why_slow(op: Op, format: Format) -> None:
    """Return None: nothing is known of the runtimes."""


def _with_options(given: Mapping[str, str]) -> Target:
    """Return the target with a user's options; MoecError for one that there is not, or whose value is none."""
    has = f"experts={' or '.join(_EXPERTS)}"
    if unknown := sorted(set(given) - {"experts"}):
        raise MoecError(f"target onnx has no option {', '.join(unknown)}", todo=f"it has {has}")
    if given["experts"] not in _EXPERTS:
        raise MoecError(f"there is no form {given['experts']} of experts", todo=f"-D {has}")
    return replace(TARGET, emit=partial(_emit_artifact, experts=given["experts"]))


TARGET = replace(
    CPU,
    name="onnx",
    doc="ONNX with standard operators of opset 23 alone, float32, int8 or int4, for any runtime that has them.",
    pipeline=(*FUSED, PassCall(LOWER)),
    ops=Ops(CPU.ops.declare, DeferredFunction(f"{_ROOM}.lower", "why_unsupported")),
    formats=Formats(holds=DeferredFunction(f"{_ROOM}.quantized", "why_not_held"), slow=_why_slow),
    lower=lower,
    emit=_emit_artifact,
    caches={"f32": None},
    options=_with_options,
    recorded=None,
    probe=None,
    processor=None,
    keeps_experts=True,
)

__all__ = ["TARGET"]
