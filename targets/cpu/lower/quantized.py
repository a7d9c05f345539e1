"""Ops on quantized weights become the ops that read their parts; routed experts get one node with their routing."""

from __future__ import annotations

from dataclasses import replace

from ....compiler.errors import Refuse
from ....compiler.formats.format import Format
from ....compiler.formats.table import find_format, format_of
from ....compiler.ir.activation import Activation
from ....compiler.ir.module import Op, Value
from ....compiler.ir.recipes import Recipe, Step, range_length
from ....compiler.rewrite.editor import Editor
from ....compiler.weights.steps.table import step
from ..capabilities import (
    FAST,
    Record,
    Variant,
    activation_variant,
    at_level,
    best_level,
    has_grid_kernel,
    is_decoded_by_table,
    loop_variant,
    routing_variant,
    weight_variants,
)
from .ranges import gate_sum, is_distinct, not_negative


def lower_linear(editor: Editor, op: Op, accuracy: str, record: Record) -> Op:
    """Return a linear with a quantized weight as ort.matmul_nbits, one of blocks as one for each; others as they are."""
    weight, bias = op["w"], op.operands[2:]
    format = find_format(weight.type.dtype)
    if format is None:
        return op
    variants = weight_variants("MatMulNBits", format, weight.type.sizes[-1])
    level, reason = best_level(record, variants, accuracy)
    if accuracy == FAST and has_grid_kernel(op, format):
        parts = (op["x"], *stored_parts(editor, weight)[:2])
        if not any(bias):
            return op.become("ort.grid_linear", *parts, format=format.name)
        product = editor.add("ort.grid_linear", *parts, hint=f"{weight.name}.product", format=format.name)
        return op.become("core.add", product, *bias)
    if reason:
        return (
            _with_decoded(editor, op, format, reason)
            if is_decoded_by_table(format)
            else _with_f32_weights(editor, op, reason)
        )
    _note_slow(editor, op, record, at_level(variants, level), format)
    attrs = {"bits": format.bits, "group": format.group, "accuracy": level}
    name = "ort.matmul_nbits" if op.name == "core.linear" else "ort.block_matmul_nbits"
    return op.become(name, op["x"], *stored_parts(editor, weight), *bias, **attrs)


def lower_embedding(editor: Editor, op: Op, record: Record) -> Op:
    """Return a lookup in a quantized table as ort.gather_nbits; others as they are."""
    ids, table = op["ids"], op["table"]
    format = find_format(table.type.dtype)
    if format is None:
        return op
    if reason := record.refusal([Variant("GatherBlockQuantized", format.name)]):
        return (
            _lookup_and_decode(editor, op, format, reason)
            if is_decoded_by_table(format)
            else _with_f32_weights(editor, op, reason)
        )
    return op.become("ort.gather_nbits", ids, *stored_parts(editor, table), bits=format.bits, group=format.group)


def lower_experts(editor: Editor, op: Op, accuracy: str, record: Record) -> Op:
    """Return routed experts with quantized weights as QMoE; Refuse says where it is not right for them."""
    act = op.settings.activation("act")
    up, down = op["up"], op["down"]
    format = format_of(up.type.dtype)
    if accuracy == FAST and has_grid_kernel(op, format):
        return _lower_to_grid(editor, op, act, format)
    variants = weight_variants("QMoE", format, *(w.type.sizes[-1] for w in (up, down)))
    level, reason = best_level(record, variants, accuracy)
    if reason := reason or _not_qmoe(editor, op, act, record):
        raise Refuse(reason)
    _note_slow(editor, op, record, at_level(variants, level), format)
    return _lower_to_qmoe(editor, op, act, format, level, record)


def lower_experts_to_loop(editor: Editor, op: Op, record: Record) -> Op:
    """Return routed experts with quantized weights as a Loop over the chosen ones; others as they are."""
    up, down, up_bias, down_bias = op["up"], op["down"], op.get("up_bias"), op.get("down_bias")
    format = find_format(up.type.dtype)
    if format is None:
        return op
    reason = record.refusal([loop_variant(format)])
    if reason and not is_decoded_by_table(format):
        return _with_f32_weights(editor, op, reason)
    if reason:
        _note_decoded(editor, op, reason)
    kept = {**op.attributes, "bits": format.bits, "group": format.group} | ({"format": format.name} if reason else {})
    parts = (*stored_parts(editor, up), up_bias, *stored_parts(editor, down), down_bias)
    return op.become("ort.experts_nbits", op["x"], op["ids"], op["gates"], *parts, **kept)


def _lower_to_grid(editor: Editor, op: Op, act: Activation, format: Format) -> Op:
    act, up, _ = interleave_gate(editor, act, op["up"], None)
    parts = (*stored_parts(editor, up)[:2], *stored_parts(editor, op["down"])[:2])
    return op.become("ort.grid_experts", op["x"], op["ids"], op["gates"], *parts, act=act, format=format.name)


def _not_qmoe(editor: Editor, op: Op, act: Activation, record: Record) -> str:
    """Return why QMoE cannot run these experts, whatever their weights; nothing if it can."""
    ids, gates = op["ids"], op["gates"]
    if reason := record.refusal([activation_variant("QMoE", act)]):
        return reason
    positive = not_negative(editor.function, gates)
    if reason := record.refusal([routing_variant("QMoE", "weights" if positive else "negative weights")]):
        return reason if positive else f"the weights {gates} may be negative, and {reason}"
    if not is_distinct(editor.function, ids):
        return f"the experts {ids} of a token cannot be shown to differ"
    return ""


def _with_f32_weights(editor: Editor, op: Op, reason: str) -> Op:
    """Return the op with its quantized weights as the numbers that they stand for, in f32."""
    editor.note(op, f"{op.name} with weights in f32, of 4 bytes: {reason}")
    stored = [
        editor.weight(step("cast", editor.recipe(v), to="f32"), f"{v.name}.f32")
        if v and find_format(v.type.dtype)
        else v
        for v in op.operands
    ]
    return replace(op, operands=tuple(stored))


def _with_decoded(editor: Editor, op: Op, format: Format, reason: str) -> Op:
    """Return a linear with its quantized weight decoded before it."""
    _note_decoded(editor, op, reason)
    weight = op["w"]
    parts = stored_parts(editor, weight)[:2]
    numbers = editor.add("ort.decode", *parts, hint=f"{weight.name}.numbers", format=format.name)
    return op.reading(w=numbers)


def _lookup_and_decode(editor: Editor, op: Op, format: Format, reason: str) -> Op:
    """Return a lookup in a quantized table as those of codes and scales, which are decoded behind it."""
    _note_decoded(editor, op, reason)
    ids, table = op["ids"], op["table"]
    rows = [editor.add("nn.embedding", ids, part, hint=f"{part.name}.rows") for part in stored_parts(editor, table)[:2]]
    return op.become("ort.decode", *rows, format=format.name)


def _note_decoded(editor: Editor, op: Op, reason: str) -> None:
    editor.note(op, f"{op.name} with weights that plain ops decode: {reason}")


def _note_slow(editor: Editor, op: Op, record: Record, variants: list[Variant], format: Format) -> None:
    slow = [text for v in variants if (text := record.slow(v, format.bits))]
    if slow:
        editor.note(op, slow[0])


def _lower_to_qmoe(editor: Editor, op: Op, act: Activation, format: Format, level: int, record: Record) -> Op:
    down, down_bias = op["down"], op.get("down_bias")
    act, up, up_bias = interleave_gate(editor, act, op["up"], op.get("up_bias"))
    choice, mixing = _choice_and_mixing(editor, op, record)
    kept = {"act": act, "k": op["ids"].type.shape[1], "bits": format.bits, "group": format.group, "accuracy": level}
    parts = (*stored_parts(editor, up), up_bias, *stored_parts(editor, down), down_bias)
    return op.become("ort.qmoe", op["x"], choice, mixing, *parts, **kept)


def _choice_and_mixing(editor: Editor, op: Op, record: Record) -> tuple[Value, Value | None]:
    """Return the scores that choose and the weights that mix, one for each expert.

    A softmax router hands over its logits; any other routing becomes the weights of all experts, 0 for those that
    were not chosen, which choose as well.
    """
    ids, gates = op["ids"], op["gates"]
    route = editor.function.producers.get(gates.name)
    if route is not None and route.name == "moe.route" and route.results == (gates, ids):
        found = softmax_routing(editor, route)
        if found is not None and (found[1] or not record.refusal([routing_variant("QMoE", "softmax")])):
            return found
    shape = (ids.type.shape[0], op["up"].type.shape[0])
    none = editor.add("core.full", hint=f"{gates.name}.none", shape=shape, value=0.0, dtype="f32")
    dense = editor.add("core.scatter", none, ids, gates, hint=f"{gates.name}.dense", axis=1)
    return dense, dense


def softmax_routing(editor: Editor, route: Op) -> tuple[Value, Value | None] | None:
    """Return (logits, weights of all experts or None for the softmax of the chosen) of a plain softmax router."""
    logits, others = route["logits"], route.operands[1:]
    a = route.settings
    if any(others) or a["score"] != "softmax" or a.integer("groups") > 1 or a["weigh"] == "logits":
        return None
    if gate_sum(editor.function, route.results[0]) == 1.0:
        return logits, None
    if (a["order"], a["renorm"], a["scale"]) == ("score_select", "none", 1.0):
        with editor.at(route.loc):
            return logits, editor.add("core.softmax", logits, hint=f"{logits.name}.shares", axis=1)
    return None


# --- weights ---------------------------------------------------------------------------------------------------


def stored_parts(editor: Editor, weight: Value) -> tuple[Value, Value, Value | None]:
    """Return codes, scales and zero points (None without them) of a quantized weight."""
    quantized = editor.recipe(weight)
    format = format_of(weight.type.dtype)
    codes, scales = (editor.weight(step(part, quantized), f"{weight.name}.{part}") for part in ("codes", "scales"))
    zeros = editor.weight(step("zeros", quantized), f"{weight.name}.zeros") if format.zeros else None
    return codes, scales, zeros


def interleave_gate(
    editor: Editor, act: Activation, up: Value, up_bias: Value | None
) -> tuple[Activation, Value, Value | None]:
    """Return an activation with the weight and bias before it, gate rows and up rows interleaved where there is a gate."""
    if not act.gated or act.interleaved:
        return act, up, up_bias
    weight, bias = (
        v and editor.weight(interleaved_recipe(editor.recipe(v)), f"{v.name}.interleaved") for v in (up, up_bias)
    )
    assert weight
    return replace(act, layout="interleaved"), weight, bias


def interleaved_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with the two halves of axis 1 interleaved: row 0 of both, row 1 of both, ..."""
    match recipe:
        case Step("cast" | "quantize", (item,)):
            return step(recipe.name, interleaved_recipe(item), **recipe.attributes)
        case Step("packed", items):
            return step("packed", *map(interleaved_recipe, items), **recipe.attributes)
        case Step("concat", (gate, up)) if (
            recipe.attributes["axis"] == 1 and range_length(gate) == range_length(up) == 1 and gate.type == up.type
        ):
            return step("interleave", gate, up, axis=1)
    rows = recipe.type.sizes[1]
    halves = [step("slice", recipe, axis=1, start=start, stop=start + rows // 2) for start in (0, rows // 2)]
    return step("interleave", *halves, axis=1)
