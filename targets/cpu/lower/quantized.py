"""Ops on quantized weights become the ops that read their parts; routed experts get one node with their routing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ....compiler.errors import Refuse
from ....compiler.formats.format import Format
from ....compiler.formats.table import find_format, format_of
from ....compiler.ir.module import Op, Value
from ....compiler.ir.recipes import Recipe, Step, range_length, step
from ....compiler.ir.types import make_attrs
from ....compiler.ops import OPS
from ....compiler.rewrite.draft import Draft
from ..capabilities import (
    Record,
    Variant,
    activation_variant,
    at_level,
    best_level,
    decodes,
    loop_variant,
    routing_variant,
    weight_variants,
)
from .ranges import distinct, gate_sum, not_negative

_ACTIVATION = ("act", "gated", "alpha", "beta", "limit")


def lower_linear(draft: Draft, op: Op, accuracy: str, record: Record) -> Op:
    """Return a linear with a quantized weight as ort.matmul_nbits, one of blocks as one for each; others as they are."""
    x, weight, *bias = op.operands
    assert x and weight
    format = find_format(weight.type.dtype)
    if format is None:
        return op
    variants = weight_variants("MatMulNBits", format, weight.type.sizes[-1])
    level, reason = best_level(record, variants, accuracy)
    if reason:
        return _with_decoded(draft, op, format, reason) if decodes(format) else _widened(draft, op, reason)
    _note_slow(draft, op, record, at_level(variants, level), format)
    attrs = {"bits": format.bits, "group": format.group, "accuracy": level}
    name = "ort.matmul_nbits" if op.name == "core.linear" else "ort.block_matmul_nbits"
    return Op(name, (x, *_parts(draft, weight), *bias), op.results, make_attrs(attrs), loc=op.loc)


def lower_embedding(draft: Draft, op: Op, record: Record) -> Op:
    """Return a lookup in a quantized table as ort.gather_nbits; others as they are."""
    ids, table = op.operands
    assert ids and table
    format = find_format(table.type.dtype)
    if format is None:
        return op
    if reason := record.refusal([Variant("GatherBlockQuantized", format.name)]):
        return _lookup_and_decode(draft, op, format, reason) if decodes(format) else _widened(draft, op, reason)
    attrs = make_attrs({"bits": format.bits, "group": format.group})
    return Op("ort.gather_nbits", (ids, *_parts(draft, table)), op.results, attrs, loc=op.loc)


def lower_experts(draft: Draft, op: Op, accuracy: str, record: Record) -> Op:
    """Return routed experts with quantized weights as QMoE; Refuse says where it is not right for them."""
    attributes: dict[str, Any] = OPS[op.name].complete(op.attributes)
    up, down = op.operands[3:5]
    assert up and down
    format = format_of(up.type.dtype)
    variants = weight_variants("QMoE", format, *(w.type.sizes[-1] for w in (up, down)))
    level, reason = best_level(record, variants, accuracy)
    if reason := reason or _not_qmoe(draft, op, attributes, record):
        raise Refuse(reason)
    _note_slow(draft, op, record, at_level(variants, level), format)
    return _qmoe(draft, op, attributes, format, level, record)


def lower_experts_to_loop(draft: Draft, op: Op, record: Record) -> Op:
    """Return routed experts with quantized weights as a Loop over the chosen ones; others as they are."""
    x, ids, gates, up, down, up_bias, down_bias = op.operands
    assert up and down
    format = find_format(up.type.dtype)
    if format is None:
        return op
    reason = record.refusal([loop_variant(format)])
    if reason and not decodes(format):
        return _widened(draft, op, reason)
    if reason:
        _note_decoded(draft, op, reason)
    attributes: dict[str, Any] = OPS[op.name].complete(op.attributes)
    kept = {name: attributes[name] for name in (*_ACTIVATION, "layout") if name in op.attributes}
    kept |= {"bits": format.bits, "group": format.group} | ({"format": format.name} if reason else {})
    parts = (*_parts(draft, up), up_bias, *_parts(draft, down), down_bias)
    return Op("ort.experts_nbits", (x, ids, gates, *parts), op.results, make_attrs(kept), loc=op.loc)


def _not_qmoe(draft: Draft, op: Op, attributes: dict[str, Any], record: Record) -> str:
    """Return why QMoE cannot run these experts, whatever their weights; nothing if it can."""
    _, ids, gates, *_ = op.operands
    assert ids and gates
    if reason := record.refusal([activation_variant("QMoE", attributes)]):
        return reason
    positive = not_negative(draft.function, gates)
    if reason := record.refusal([routing_variant("QMoE", "weights" if positive else "negative weights")]):
        return reason if positive else f"the weights {gates} may be negative, and {reason}"
    if not distinct(draft.function, ids):
        return f"the experts {ids} of a token cannot be shown to differ"
    return ""


def _widened(draft: Draft, op: Op, reason: str) -> Op:
    """Return the op with its quantized weights as the numbers that they stand for, in f32."""
    draft.note(op, f"{op.name} with weights in f32, of 4 bytes: {reason}")
    stored = [
        draft.weight(step("cast", draft.recipe(v), to="f32"), f"{v.name}.f32") if v and find_format(v.type.dtype) else v
        for v in op.operands
    ]
    return replace(op, operands=tuple(stored))


def _with_decoded(draft: Draft, op: Op, format: Format, reason: str) -> Op:
    """Return a linear with its quantized weight decoded before it."""
    _note_decoded(draft, op, reason)
    x, weight, *others = op.operands
    assert weight
    parts = _parts(draft, weight)[:2]
    numbers = draft.add("ort.decode", *parts, hint=f"{weight.name}.numbers", loc=op.loc, format=format.name)
    return replace(op, operands=(x, numbers, *others))


def _lookup_and_decode(draft: Draft, op: Op, format: Format, reason: str) -> Op:
    """Return a lookup in a quantized table as those of codes and scales, which are decoded behind it."""
    _note_decoded(draft, op, reason)
    ids, table = op.operands
    assert table
    rows = [
        draft.add("nn.embedding", ids, part, hint=f"{part.name}.rows", loc=op.loc) for part in _parts(draft, table)[:2]
    ]
    return Op("ort.decode", tuple(rows), op.results, make_attrs({"format": format.name}), loc=op.loc)


def _note_decoded(draft: Draft, op: Op, reason: str) -> None:
    draft.note(op, f"{op.name} with weights that plain ops decode: {reason}")


def _note_slow(draft: Draft, op: Op, record: Record, variants: list[Variant], format: Format) -> None:
    slow = [text for v in variants if (text := record.slow(v, format.bits))]
    if slow:
        draft.note(op, slow[0])


def _qmoe(draft: Draft, op: Op, attributes: dict[str, Any], format: Format, level: int, record: Record) -> Op:
    x, ids, gates, up, down, up_bias, down_bias = op.operands
    assert x and ids and gates and up and down
    if attributes["gated"] and attributes["layout"] == "concat":
        up, up_bias = interleave(draft, up), up_bias and interleave(draft, up_bias)
    choice, mixing = _routing(draft, op, ids, gates, int(up.type.shape[0]), record)
    kept = {name: attributes[name] for name in _ACTIVATION if name in op.attributes}
    kept |= {"k": ids.type.shape[1], "bits": format.bits, "group": format.group, "accuracy": level}
    parts = (*_parts(draft, up), up_bias, *_parts(draft, down), down_bias)
    return Op("ort.qmoe", (x, choice, mixing, *parts), op.results, make_attrs(kept), loc=op.loc)


def _routing(
    draft: Draft, op: Op, ids: Value, gates: Value, experts: int, record: Record
) -> tuple[Value, Value | None]:
    """Return the scores that choose and the weights that mix, one for each expert.

    A softmax router hands over its logits; any other routing becomes the weights of all experts, 0 for those that
    were not chosen, which choose as well.
    """
    route = draft.function.producers.get(gates.name)
    if route is not None and route.name == "moe.route" and route.results == (gates, ids):
        found = softmax_routing(draft, route)
        if found is not None and (found[1] or not record.refusal([routing_variant("QMoE", "softmax")])):
            return found
    tokens = ids.type.shape[0]
    none = draft.add(
        "core.full", hint=f"{gates.name}.none", loc=op.loc, shape=(tokens, experts), value=0.0, dtype="f32"
    )
    dense = draft.add("core.scatter", none, ids, gates, hint=f"{gates.name}.dense", loc=op.loc, axis=1)
    return dense, dense


def softmax_routing(draft: Draft, route: Op) -> tuple[Value, Value | None] | None:
    """Return (logits, weights of all experts or None for the softmax of the chosen) of a plain softmax router."""
    logits, *others = route.operands
    a = OPS[route.name].complete(route.attributes)
    assert logits
    if any(others) or a["score"] != "softmax" or a["groups"] > 1 or a["weigh"] == "logits":
        return None
    if gate_sum(draft.function, route.results[0]) == 1.0:
        return logits, None
    if (a["order"], a["renorm"], a["scale"]) == ("score_select", "none", 1.0):
        return logits, draft.add("core.softmax", logits, hint=f"{logits.name}.shares", loc=route.loc, axis=1)
    return None


# --- weights ---------------------------------------------------------------------------------------------------


def _parts(draft: Draft, weight: Value) -> tuple[Value, Value, Value | None]:
    """Return codes, scales and zero points (None without them) of a quantized weight."""
    quantized = draft.recipe(weight)
    format = format_of(weight.type.dtype)
    codes, scales = (draft.weight(step(part, quantized), f"{weight.name}.{part}") for part in ("codes", "scales"))
    zeros = draft.weight(step("zeros", quantized), f"{weight.name}.zeros") if format.zeros else None
    return codes, scales, zeros


def interleave(draft: Draft, value: Value) -> Value:
    """Return the weight with its gate rows and up rows interleaved."""
    return draft.weight(interleaved(draft.recipe(value)), f"{value.name}.interleaved")


def interleaved(recipe: Recipe) -> Recipe:
    """Return the recipe with the two halves of axis 1 interleaved: row 0 of both, row 1 of both, ..."""
    match recipe:
        case Step("cast" | "quantize", (item,)):
            return step(recipe.name, interleaved(item), **recipe.attributes)
        case Step("packed", items):
            return step("packed", *map(interleaved, items), **recipe.attributes)
        case Step("concat", (gate, up)) if (
            recipe.attributes["axis"] == 1 and range_length(gate) == range_length(up) == 1 and gate.type == up.type
        ):
            return step("interleave", gate, up, axis=1)
    rows = recipe.type.sizes[1]
    halves = [step("slice", recipe, axis=1, start=start, stop=start + rows // 2) for start in (0, rows // 2)]
    return step("interleave", *halves, axis=1)
