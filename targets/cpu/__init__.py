"""Target `cpu`: ONNX with com.microsoft ops, for ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..target import Target

if TYPE_CHECKING:
    from ...compiler.formats import Format
    from ...compiler.ir import Module, Op
    from ...compiler.weights.sources import WeightSource

# torch, onnx and onnxruntime take seconds to import and what runs an artifact needs one of them: the functions below
# import what they need when they run


def _supported(op: Op) -> str | None:
    from .emit import supported

    return supported(op)


def _holds(op: Op, format: Format) -> str | None:
    from .capabilities import holds

    return holds(op, format)


def _lower(module: Module, why: list[str] | None = None, accuracy: str = "fast") -> Module:
    from .lower import lower

    return lower(module, why, accuracy)


def _emit(
    module: Module, source: WeightSource, folder: Path, tile_bytes: int, progress: Callable[[int], None] | None = None
) -> dict[str, str]:
    from .emit import emit

    return emit(module, source, folder, tile_bytes, progress)


def _load(folder: Path, **options: Any) -> Any:
    from .session import load

    return load(folder, **options)


TARGET = Target(
    name="cpu",
    doc="ONNX Runtime on the CPU: ONNX with GroupQueryAttention and MoE, float32, KV cache as inputs and outputs.",
    pipeline=(
        "cleanup,raise-norm,raise-rope,lift-moe,cleanup,fuse-router,cleanup,fuse-dispatch,fuse-shared-experts,"
        "fuse-attention,fuse-norm,cleanup,lower"
    ),
    supported=_supported,
    holds=_holds,
    lower=_lower,
    emit=_emit,
    load=_load,
)

__all__ = ["TARGET"]
