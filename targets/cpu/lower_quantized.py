"""Ops on quantized weights become the ops that read their parts; routed experts get one node with their routing."""

from __future__ import annotations

from typing import Any

from ...compiler.draft import Draft
from ...compiler.errors import Refuse
from ...compiler.formats import Format, find_format, format_of
from ...compiler.ir import Op, Value, make_attrs
from ...compiler.ops import OPS
from ...compiler.recipes import Recipe, Step, range_length, step
from .ranges import distinct, gate_sum, not_negative

FAST, EXACT = ACCURACIES = ("fast", "exact")
INT8_ACTIVATIONS = 4  # ONNX Runtime's accuracy_level
_ACTIVATION = ("act", "gated", "alpha", "beta", "limit")


def lower_linear(draft: Draft, op: Op, accuracy: str) -> Op:
    """Return a linear with a quantized weight as ort.matmul_nbits; others as they are."""
    x, weight, bias = op.operands
    assert x and weight
    format = find_format(weight.type.dtype)
    if format is None:
        return op
    attrs = {"bits": format.bits, "group": format.group, "accuracy": level(accuracy)}
    return Op("ort.matmul_nbits", (x, *_parts(draft, weight), bias), op.results, make_attrs(attrs), loc=op.loc)


def lower_embedding(draft: Draft, op: Op) -> Op:
    """Return a lookup in a quantized table as ort.gather_nbits; others as they are."""
    ids, table = op.operands
    assert ids and table
    format = find_format(table.type.dtype)
    if format is None:
        return op
    attrs = make_attrs({"bits": format.bits, "group": format.group})
    return Op("ort.gather_nbits", (ids, *_parts(draft, table)), op.results, attrs, loc=op.loc)


def lower_experts(draft: Draft, op: Op, accuracy: str) -> Op:
    """Return routed experts with quantized weights as QMoE; Refuse says where it is not right for them."""
    attributes: dict[str, Any] = OPS[op.name].complete(op.attributes)
    up = op.operands[3]
    assert up
    format = format_of(up.type.dtype)
    if reason := _not_qmoe(draft, op, attributes, format, accuracy):
        raise Refuse(reason)
    return _qmoe(draft, op, attributes, format, accuracy)


def level(accuracy: str) -> int:
    """Return ONNX Runtime's accuracy_level."""
    return INT8_ACTIVATIONS if accuracy == FAST else 0


def _not_qmoe(draft: Draft, op: Op, attributes: dict[str, Any], format: Format, accuracy: str) -> str:
    """Return why QMoE cannot run these experts; nothing if it can."""
    _, ids, gates, up, down, _, _ = op.operands
    assert ids and gates and up and down
    act, gated = attributes["act"], attributes["gated"]
    if gated and act != "silu":
        return f"QMoE has no gated {act}"
    if not gated and act not in ("silu", "relu", "identity"):
        return f"QMoE has no exact {act}"
    if accuracy == EXACT and format.bits != 4:
        return f"QMoE rounds activations to int8 beside {format.bits}-bit weights"
    if min(up.type.sizes[2], down.type.sizes[2]) < 2 * format.group:
        return f"QMoE needs two groups of {format.group} or more in a row"
    if not not_negative(draft.function, gates):
        return f"the weights {gates} cannot be shown to be 0 or more, and QMoE leaves out experts with others"
    if not distinct(draft.function, ids):
        return f"the experts {ids} of a token cannot be shown to differ"
    return ""


def _qmoe(draft: Draft, op: Op, attributes: dict[str, Any], format: Format, accuracy: str) -> Op:
    x, ids, gates, up, down, up_bias, down_bias = op.operands
    assert x and ids and gates and up and down
    if attributes["gated"] and attributes["layout"] == "concat":
        up, up_bias = interleave(draft, up), up_bias and interleave(draft, up_bias)
    choice, mixing = _routing(draft, op, ids, gates, int(up.type.shape[0]))
    kept = {name: attributes[name] for name in _ACTIVATION if name in op.attributes}
    kept |= {"k": ids.type.shape[1], "bits": format.bits, "group": format.group, "accuracy": level(accuracy)}
    parts = (*_parts(draft, up), up_bias, *_parts(draft, down), down_bias)
    return Op("ort.qmoe", (x, choice, mixing, *parts), op.results, make_attrs(kept), loc=op.loc)


def _routing(draft: Draft, op: Op, ids: Value, gates: Value, experts: int) -> tuple[Value, Value | None]:
    """Return the scores that choose and the weights that mix, one for each expert.

    A softmax router hands over its logits; any other routing becomes the weights of all experts, 0 for those that
    were not chosen, which choose as well.
    """
    route = draft.function.producers.get(gates.name)
    if route is not None and route.name == "moe.route" and route.results == (gates, ids):
        found = softmax_routing(draft, route)
        if found is not None:
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


def lower_experts_to_loop(draft: Draft, op: Op) -> Op:
    """Return routed experts with quantized weights as a Loop over the chosen ones; others as they are."""
    x, ids, gates, up, down, up_bias, down_bias = op.operands
    assert up and down
    format = find_format(up.type.dtype)
    if format is None:
        return op
    attributes: dict[str, Any] = OPS[op.name].complete(op.attributes)
    kept = {name: attributes[name] for name in (*_ACTIVATION, "layout") if name in op.attributes}
    kept |= {"bits": format.bits, "group": format.group}
    parts = (*_parts(draft, up), up_bias, *_parts(draft, down), down_bias)
    return Op("ort.experts_nbits", (x, ids, gates, *parts), op.results, make_attrs(kept), loc=op.loc)


# --- weights ---------------------------------------------------------------------------------------------------


def _parts(draft: Draft, weight: Value) -> tuple[Value, Value, Value | None]:
    """Return codes, scales and zero points (None without them) of a quantized weight."""
    quantized = draft.recipe(weight)
    format = format_of(weight.type.dtype)
    codes, scales = (draft.weight(step(part, quantized), f"{weight.name}.{part}") for part in ("codes", "scales"))
    zeros = draft.weight(step("zeros", quantized), f"{weight.name}.zeros") if format.zeros else None
    return codes, scales, zeros


def interleave(draft: Draft, value: Value) -> Value:
    """Return the weight with its gate rows and up rows in turn."""
    return draft.weight(interleaved(draft.recipe(value)), f"{value.name}.interleaved")


def interleaved(recipe: Recipe) -> Recipe:
    """Return the recipe with the two halves of axis 1 in turn: row 0 of both, row 1 of both, ..."""
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
