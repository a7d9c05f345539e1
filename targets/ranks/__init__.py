"""Target `ranks`: the weights of each device of a plan, as `moec compile --plan` writes them; they run in a simulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compiler.errors import MoecError
from ...compiler.ir.deferred import DeferredFunction
from ...compiler.ir.pipelines import LOWER, PassCall
from ..target import FUSED, Formats, Ops, Target

if TYPE_CHECKING:
    from ...compiler.formats.format import Format
    from ...compiler.ir.module import Module, Op
    from ...compiler.ir.notes import Rewritten

DIALECTS = ("core", "nn", "moe")


def _lower_module(module: Module, target: Target) -> Rewritten:
    """Leave the ops of stage moe as they are: the simulation computes each one's reference."""
    from ...compiler.ir.notes import Rewritten

    return Rewritten(replace(module, stage="kernel"))


def _why_unsupported(op: Op) -> str | None:
    if op.callee or op.name.partition(".")[0] in DIALECTS:
        return None
    return f"{op.name} is an op of another target: ranks are compiled from a checkpoint"


def _nothing_against(op: Op, format: Format) -> str | None:
    return None


def _without_plan(*_: Any, **__: Any) -> Any:
    raise MoecError(
        "target ranks needs a plan", todo="moec plan SOURCE --on SYSTEM -o plan.json, then --plan plan.json"
    )


def _with_options(given: Mapping[str, str]) -> Target:
    """Return the target for the plan that `-D plan=FILE` names."""
    from .layout import read_layout

    if unknown := given.keys() - {"plan"}:
        raise MoecError(f"target ranks has no option {min(unknown)}", todo="it has plan=FILE")
    layout = read_layout(Path(given["plan"]))
    return replace(TARGET, emit=partial(DeferredFunction(f"{__name__}.emit", "emit_ranks"), layout=layout))


TARGET = Target(
    name="ranks",
    doc="The shards of a plan's devices (--plan plan.json): safetensors by rank and a map of experts, run in a simulation.",
    pipeline=(*FUSED, PassCall(LOWER)),
    ops=Ops(declare=lambda: None, supported=_why_unsupported),
    formats=Formats(holds=_nothing_against, slow=_nothing_against),
    lower=_lower_module,
    emit=_without_plan,
    load=DeferredFunction(f"{__name__}.simulate", "load_session"),
    options=_with_options,
    keeps_experts=True,
)

__all__ = ["TARGET"]
