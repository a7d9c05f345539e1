"""From stage moe to stage kernel: what ONNX Runtime has as one op becomes that op, the rest stays as it is.

Attention with its cache becomes GroupQueryAttention, routed experts become MoE. Each refusal has a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ...compiler.errors import MoecError, Refuse
from ...compiler.formats import find_format
from ...compiler.ir import Function, Module, Op, Value, make_attrs
from ...compiler.ops import OPS
from .capabilities import (
    ACCURACIES,
    FAST,
    ODD_HEADS,
    Record,
    activation_variant,
    attention_variants,
    routing_variant,
    shipped,
    version_note,
)
from .draft import Draft
from .lower_quantized import interleave, lower_embedding, lower_experts, lower_linear
from .ranges import distinct, not_negative

BEFORE_HEADS = (0, 2, 1, 3)  # [B, H, S, D] <-> [B, S, H, D]


def lower(module: Module, why: list[str] | None = None, accuracy: str = FAST, record: Record | None = None) -> Module:
    """Return the module at stage kernel; `why` gets a line for each attention and MoE block left in plain ops.

    `accuracy` is `fast` (activations beside quantized weights are rounded to int8) or `exact` (they stay f32). Only
    what the record (by default the one that moec comes with) calls right is used.
    """
    from .emit import check

    if accuracy not in ACCURACIES:
        raise MoecError(f"there is no accuracy {accuracy}", todo=f"there are {', '.join(ACCURACIES)}")

    if module.stage == "kernel":
        return module
    notes: list[str] = [] if why is None else why
    record = record or shipped()
    if note := version_note(record):
        notes.append(note)
    functions = tuple(_lower_function(f, accuracy, notes, record) for f in module.functions)
    result = replace(module, stage="kernel", functions=functions)
    check(result)
    return result


def _lower_function(function: Function, accuracy: str, why: list[str], record: Record) -> Function:
    draft = Draft.of(function)
    rewrites: dict[str, Callable[[Draft, Op], Op]] = {
        "nn.attention": partial(_group_query_attention, record=record),
        "moe.experts": partial(_experts, accuracy=accuracy, record=record),
        "core.linear": partial(lower_linear, accuracy=accuracy, record=record),
        "nn.embedding": partial(lower_embedding, record=record),
    }
    for op in function.ops:
        rewrite = rewrites.get(op.name)
        kept = len(draft.ops)
        try:
            new = rewrite(draft, op) if rewrite else op
        except Refuse as refusal:
            del draft.ops[kept:]
            place = ", ".join(op.loc) or f"%{op.results[0].name}"
            why.append(f"@{function.name} {place}: {op.name} stays in plain ops: {refusal.reason}")
            new = op
        draft.ops.append(new)
    why += [f"@{function.name} {note}" for note in draft.notes]
    return _without_idle(replace(function, ops=tuple(draft.ops), consts=tuple(draft.consts.values())))


def _without_idle(function: Function) -> Function:
    """Drop ops and weights that nothing reads, and a second op that makes the value of a fused one."""
    made: set[str] = set()
    ops: list[Op] = []
    needed = {v.name for v in function.results}
    for op in reversed(function.ops):
        names = {v.name for v in op.results}
        if names & needed and not names <= made:
            ops.append(op)
            made |= names
            needed |= {v.name for v in op.inputs}
    consts = tuple(c for c in function.consts if c.value.name in needed)
    return replace(function, ops=tuple(reversed(ops)), consts=consts)


# --- attention -------------------------------------------------------------------------------------------------


def _group_query_attention(draft: Draft, op: Op, record: Record) -> Op:
    """Return cache append and attention as one op; Refuse says what ONNX Runtime's op cannot do."""
    q, k, v, mask, sinks = op.operands
    assert q and k and v
    attributes: dict[str, Any] = op.attributes
    appends = [_append(draft.function, state, op) for state in (k, v)]
    width, new = q.type.shape[3], q.type.shape[2]
    if v.type.shape[3] != width:
        raise Refuse(
            f"keys have {width} numbers a head and values {v.type.shape[3]}; GroupQueryAttention wants the same"
        )
    used = {name: attributes.get(name, 0) for name in ("window", "softcap")}
    if reason := record.refusal(attention_variants(width, masked=bool(mask), sinks=bool(sinks), **used)):
        raise Refuse(f"heads have {width} numbers, and {reason}" if ODD_HEADS in reason else reason)
    if k == v:
        raise Refuse("keys and values are one cache, GroupQueryAttention makes two", k)
    if any(x.type.dtype != "f32" for x in (q, k, v)):
        raise Refuse(f"it is {q.type.dtype}, the target's attention is f32")
    if any(append.operands[1].type.shape[2] != new for append in appends):  # type: ignore[union-attr]
        raise Refuse("the number of queries is not the number of tokens appended to the cache")
    if not all(x.is_Integer for x in (q.type.shape[1], k.type.shape[1])) or q.type.shape[1] % k.type.shape[1]:
        raise Refuse(f"{q.type.shape[1]} heads do not divide into {k.type.shape[1]} groups")
    if attributes["scale"] == 0:
        raise Refuse("a scale of 0 means the default to GroupQueryAttention")
    new_rows = [append.operands[1] for append in appends]
    rows = [_before_heads(draft, x, op.loc) for x in (q, *new_rows) if x is not None]
    bias = mask and draft.add("ort.attention_bias", mask, hint="attention_bias", loc=op.loc, tokens=new)
    operands = (*rows, *(append.operands[0] for append in appends), bias, sinks)
    return Op("ort.group_query_attention", operands, (*op.results, k, v), op.attrs, loc=op.loc)


def _append(function: Function, state: Value, attention: Op) -> Op:
    """Return the op that appends to a cache which only this attention and the caller read."""
    append = function.producers.get(state.name)
    if append is None or append.name != "nn.cache_append" or append.attributes["axis"] != 2:
        raise Refuse(f"{state} is not a cache that the step's tokens are appended to", state)
    others = [user for user in function.uses[state.name] if user is not None and user is not attention]
    if others:
        raise Refuse(f"{state} is also read by {others[0].name}", state)
    return append


def _before_heads(draft: Draft, value: Value, loc: tuple[str, ...]) -> Value:
    """Return [B, H, S, D] as [B, S, H, D]; ops on single heads move before the transpose, which then falls away."""
    if value.name not in draft.turned:
        moved = _move(draft, value)
        if moved is None:
            moved = draft.add("core.transpose", value, hint=f"{value.name}.rows", loc=loc, perm=BEFORE_HEADS)
        draft.turned[value.name] = moved
    return draft.turned[value.name]


def _move(draft: Draft, value: Value) -> Value | None:
    """Return the value made with the axes in the other order, or None where there is no transpose to save."""
    op = draft.function.producers.get(value.name)
    if op is None:
        return None
    hint = f"{value.name}.rows"
    inner = op.operands if op.name == "core.concat" else op.operands[:1]
    match op.name:
        case "core.transpose" if op.attributes["perm"] == BEFORE_HEADS:
            return op.operands[0]
        case "nn.rope" | "nn.rms_norm":
            pass
        case "core.concat" | "core.slice" if op.attributes["axis"] == 3:
            pass
        case _:
            return None
    moved = [_move(draft, x) for x in inner if x is not None]
    if any(x is None for x in moved):
        return None
    name = "ort.rotary_embedding" if op.name == "nn.rope" else op.name
    rest = op.operands[len(inner) :]
    return draft.add(name, *moved, *rest, hint=hint, loc=op.loc, **op.attributes)


# --- routed experts --------------------------------------------------------------------------------------------


def _experts(draft: Draft, op: Op, accuracy: str, record: Record) -> Op:
    """Return routed experts as the op for their weights."""
    up = op.operands[3]
    assert up
    return lower_experts(draft, op, accuracy, record) if find_format(up.type.dtype) else _moe(draft, op, record)


def _moe(draft: Draft, op: Op, record: Record) -> Op:
    """Return routed experts as com.microsoft.MoE; Refuse says what it cannot do."""
    x, ids, gates, up, down, up_bias, down_bias = op.operands
    assert x and ids and gates and up and down
    attributes: dict[str, Any] = OPS[op.name].complete(op.attributes)
    if x.type.dtype != "f32":
        raise Refuse(f"it is {x.type.dtype}, MoE on the CPU is f32")
    if reason := record.refusal([activation_variant("MoE", attributes)]):
        raise Refuse(reason)
    positive = not_negative(draft.function, gates)
    if reason := record.refusal([routing_variant("MoE", "zero weights" if positive else "negative weights")]):
        raise Refuse(reason if positive else f"the weights {gates} may be negative, and {reason}", gates)
    if not distinct(draft.function, ids):
        raise Refuse(f"the experts {ids} of a token cannot be shown to differ", ids)
    if attributes["gated"] and attributes["layout"] == "concat":
        up = interleave(draft, up)
        up_bias = up_bias and interleave(draft, up_bias)
    kept = {name: attributes[name] for name in ("act", "gated", "alpha", "beta", "limit")}
    kept = {n: v for n, v in kept.items() if n in op.attributes}
    return Op("ort.moe", (x, ids, gates, up, down, up_bias, down_bias), op.results, make_attrs(kept), loc=op.loc)
