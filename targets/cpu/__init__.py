"""Target `cpu`: ONNX with com.microsoft ops, for ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..target import Target
from . import ops as _ops  # noqa: F401  (declares ort.*, so that programs of stage kernel can be read)

if TYPE_CHECKING:
    from ...compiler.ir import Module, Op
    from ...compiler.weights.sources import WeightSource

# onnx and onnxruntime take seconds to import: the functions below import what they need when they run


def _supported(op: Op) -> str | None:
    from .emit import supported

    return supported(op)


def _lower(module: Module, why: list[str] | None = None) -> Module:
    from .lower import lower

    return lower(module, why)


def _emit(
    module: Module, source: WeightSource, folder: Path, progress: Callable[[int], None] | None = None
) -> dict[str, str]:
    from .emit import emit

    return emit(module, source, folder, progress)


def _load(folder: Path, **options: Any) -> Any:
    from .session import load

    return load(folder, **options)


TARGET = Target(
    name="cpu",
    doc="ONNX Runtime on the CPU: ONNX with GroupQueryAttention and MoE, float32, KV cache as inputs and outputs.",
    pipeline=(
        "cleanup,raise-norm,raise-rope,lift-moe,cleanup,fuse-dispatch,fuse-shared-experts,fuse-attention,fuse-norm,"
        "cleanup,lower"
    ),
    supported=_supported,
    lower=_lower,
    emit=_emit,
    load=_load,
)

__all__ = ["TARGET"]
