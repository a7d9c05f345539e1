"""Target `cpu`: ONNX with com.microsoft ops, for ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...compiler.ir.deferred import DeferredFunction
from ...compiler.ir.pipelines import LOWER, PassCall
from ..target import FUSED, Emitted, Formats, Ops, Probed, Target

if TYPE_CHECKING:
    from ...compiler.ir.module import Module
    from ...compiler.ir.notes import Rewritten
    from ...compiler.weights.sources.source import WeightSource
    from .capabilities import Record
    from .options import Options

STORE = "store-caches"  # the pass that stores keys and values in fewer bits

# torch, onnx and onnxruntime take seconds to import and what runs an artifact needs one of them: the functions of the
# target are imported when they are called


def _declare_ops() -> None:
    from . import ops, ops_quantized  # noqa: F401


def _lowering_by_record(record: Record | None = None) -> Callable[..., Rewritten]:
    """Return the target's lowering by a record of what ONNX Runtime does right (None: the one that moec comes with)."""

    def lower(module: Module, target: Target, *, accuracy: Literal["fast", "exact"] = "fast") -> Rewritten:
        """Rewrite the module in the ops that target cpu runs."""
        from .lower.module import lower_module
        from .onnx.emit import check_supported

        lowered = lower_module(module, accuracy, record)
        check_supported(lowered.module)
        return lowered

    return lower


def _emit_artifact(
    module: Module, source: WeightSource, folder: Path, tile_bytes: int,
    progress: Callable[[int], None] | None = None, *, options: Options | None = None,
) -> Emitted:  # fmt: skip
    from .onnx.emit import emit_model
    from .options import Options

    return emit_model(module, source, folder, tile_bytes, progress, (options or Options()).kernels)


def _has_own_kernels(options: Options | None = None) -> bool:
    """Return whether an artifact gets kernels of moec's own, as far as it can be said before it is written."""
    from .kernels.library import find_compiler
    from .options import Options

    asked = (options or Options()).kernels
    return asked is not None and (asked.compiler or find_compiler()) is not None


def _record_as_probed() -> Probed:
    from .capabilities import made_with, record_rows, record_text, shipped_record

    return Probed(made_with(shipped_record()), record_rows(shipped_record()), record_text(shipped_record()))


def _run_probe(quick: bool = False, progress: Callable[[int, int], None] | None = None) -> Probed:
    from .capabilities import made_with, record_rows, record_text, shipped_record
    from .probe.probe import changed_findings, lost_variants, probe_variants

    found = probe_variants(quick=quick, progress=progress)
    differ = tuple(
        f"{variant}: recorded {was}, found {now}" for variant, was, now in changed_findings(found, shipped_record())
    )
    return Probed(
        made_with(found), record_rows(found), record_text(found), differ, bool(lost_variants(found, shipped_record()))
    )


def _with_options(given: Mapping[str, str]) -> Target:
    """Return the target with a user's options; see options.py."""
    from .options import read_options

    options = read_options(given)
    target = replace(
        TARGET, emit=partial(_emit_artifact, options=options), narrow_caches=partial(_has_own_kernels, options)
    )
    if options.record is None:
        return target
    from .capabilities import why_not_held, why_slow

    formats = Formats(partial(why_not_held, record=options.record), partial(why_slow, record=options.record))
    return replace(target, formats=formats, lower=_lowering_by_record(options.record))


TARGET = Target(
    name="cpu",
    doc="ONNX Runtime on the CPU: ONNX with GroupQueryAttention and MoE, float32, KV cache as inputs and outputs.",
    pipeline=(*FUSED, PassCall(LOWER), PassCall(STORE)),
    ops=Ops(
        declare=_declare_ops,
        supported=DeferredFunction(f"{__name__}.onnx.emit", "why_unsupported"),
    ),
    formats=Formats(
        holds=DeferredFunction(f"{__name__}.capabilities", "why_not_held"),
        slow=DeferredFunction(f"{__name__}.capabilities", "why_slow"),
    ),
    lower=_lowering_by_record(),
    emit=_emit_artifact,
    load=DeferredFunction(f"{__name__}.run.open", "open_artifact"),
    options=_with_options,
    recorded=_record_as_probed,
    probe=_run_probe,
    caches={name: PassCall(STORE, {"type": name}) for name in ("f32", "f16", "bf16", "int8")},
    narrow_caches=_has_own_kernels,
    processor=DeferredFunction(f"{__name__}.kernels.processor", "describe_processor"),
    packages=("onnx", "onnxruntime"),
)

__all__ = ["TARGET"]
