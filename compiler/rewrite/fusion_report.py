"""Which MoE blocks of a compiled program stay in plain ops, why, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sympy

from ..ir.dims import Size
from ..ir.module import Function, Module, Op
from ..ir.notes import Note
from ..ir.types import TensorType
from ..ops.define import any_size_text

_LOOPS = ("experts", "experts_nbits")  # ops that a target runs as a loop, whatever their weights are stored in
_UNKNOWN = "no pass of this run said why"


def fusion_report(module: Module, notes: Iterable[Note] = ()) -> list[dict[str, Any]]:
    """Return {function, place, reason, cost} of every MoE block that no op of the target does as a whole, and of what is carried.

    A block is a moe.experts that the target's lowering left, or dispatch, grouped linears and combine. The reasons are
    those of the run's `notes`; the costs are counted from the ops' types.
    """
    refusals = [note for note in notes if note.refused]
    return [
        {
            "function": function.name,
            "place": ", ".join(op.loc),
            "reason": _nearest_reason(function, op, refusals),
            "cost": cost,
        }
        for function in module.functions
        for op, cost in _unfused_blocks(function)
    ]


def entry_line(entry: dict[str, Any]) -> str:
    """Return an entry as one line for people."""
    place = " ".join(part for part in (f"@{entry['function']}", entry["place"]) if part)
    return f"not fused: {place}: {entry['reason']}; {entry['cost']}"


def _unfused_blocks(function: Function) -> Iterator[tuple[Op, str]]:
    for op in function.ops:
        if op.name.split(".")[-1] in _LOOPS:
            yield op, _experts_cost(op)
        elif op.name == "onnx.node":
            yield op, f"{op.settings.text('kind')} of ONNX stays as it is"
        elif op.name == "moe.combine":
            yield op, _spelled_cost(list(_ops_of_block(function, op)))


def _nearest_reason(function: Function, op: Op, notes: list[Note]) -> str:
    """Return the reason of the rule that came nearest."""
    if op.name == "onnx.node":
        return op.settings.text("reason")
    own = [note for note in notes if note.function == function.name and note.loc == op.loc]
    return max(own, key=lambda note: note.matched).reason if own else _UNKNOWN


def _ops_of_block(function: Function, root: Op) -> Iterator[Op]:
    """Yield the moe.* ops that a block's result is made of, back to its dispatch."""
    seen, waiting = {id(root)}, [root]
    while waiting:
        op = waiting.pop()
        yield op
        before = [function.producers.get(v.name) for v in op.inputs] if op.name != "moe.dispatch" else []
        new = [o for o in before if o is not None and id(o) not in seen and (o.name.startswith(("moe.", "core.")))]
        seen |= {id(o) for o in new}
        waiting += new


def _experts_cost(op: Op) -> str:
    x, ids = op["x"].type, op["ids"].type
    weight = sum((_bytes_per_expert(v.type) for v in op.operands[3:] if v), sympy.Integer(0))
    copies = _bytes_per_row(x) * ids.shape[1]
    return (
        f"a Loop over the chosen experts: {any_size_text(copies)} bytes of token copies a token, "
        f"{any_size_text(weight)} bytes of weights copied for each chosen expert"
    )


def _spelled_cost(ops: list[Op]) -> str:
    copies = sum(
        _bytes_per_row(r.type) * _experts_per_token(op)
        for op in ops
        if op.name == "moe.dispatch"
        for r in op.results[:1]
    )
    linears = [op["w"].type for op in ops if op.name == "moe.grouped_linear"]
    loops = f"{len(linears)} Loops over {linears[0].shape[0]} experts" if linears else "no grouped linear"
    weight = sum((_bytes_per_expert(type_) for type_ in linears), sympy.Integer(0))
    return f"{any_size_text(copies)} bytes of token copies a token, {loops}, {any_size_text(weight)} bytes of weights copied for each expert"


def _experts_per_token(dispatch: Op) -> Size:
    return dispatch.inputs[1].type.shape[1]


def _bytes_per_row(type_: TensorType) -> Size:
    return type_.shape[-1] * type_.bits / 8


def _bytes_per_expert(type_: TensorType) -> Size:
    """Return the bytes of one expert's part of a weight."""
    return type_.bytes / type_.shape[0]
