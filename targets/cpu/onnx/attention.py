"""Emits attention as com.microsoft.GroupQueryAttention, or as plain ONNX ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy

from ....compiler.ir.dims import Size, size_text
from ....compiler.ir.module import Op, Value
from ..kernels.caches import ATTENTIONS, form_name
from ..kernels.nodes import DOMAIN
from .graph import CONTRIB, END, Context, Kernel
from .nn import half_angles

LOWEST = float(np.finfo(np.float32).min)
WEIGHTLESS = -1e30  # a sink that takes no share of the softmax


# --- attention in plain ops ------------------------------------------------------------------------------------


def visible_slots(ctx: Context, mask: Value | None, new: Size, total: Size, window: int, chunk: int = 0) -> str:
    """Return bool[B or 1, 1, S, T]: which slots each new token reads; once for all layers with the same mask."""
    name = ctx.value(mask)
    graph = ctx.graph

    def make(shared: Context) -> str:
        zero, one = graph.constant(0), graph.constant(1)
        keys = shared.node("Range", zero, graph.scalar(total), one)
        queries = shared.node("Range", graph.scalar(total - new), graph.scalar(total), one)
        queries = shared.node("Unsqueeze", queries, graph.constant([1]))
        seen = shared.node("LessOrEqual", keys, queries)
        if window:
            seen = shared.node(
                "And", seen, shared.node("Less", shared.node("Sub", queries, keys), graph.constant(window))
            )
        if not name:
            seen = shared.node("Unsqueeze", seen, graph.constant([0, 1]))
        else:
            axes = [1] if mask is not None and len(mask.type.shape) == 3 else [1, 2]
            real = shared.node("Unsqueeze", shared.node("Cast", name, to=9), graph.constant(axes))
            seen = shared.node("And", seen, real)
        return shared.node("And", seen, _same_chunk(shared, name, new, total, chunk)) if chunk else seen

    return ctx.once(("visible", name, size_text(new), size_text(total), window, chunk), "mask", make)


def _same_chunk(ctx: Context, mask: str, new: Size, total: Size, chunk: int) -> str:
    """Return bool[B or 1, 1, S, T]: which slots are of a token's own chunk, counted from the first that is not masked."""
    graph = ctx.graph
    slots = ctx.node(
        "Unsqueeze", ctx.node("Range", graph.constant(0), graph.scalar(total), graph.constant(1)), graph.constant([0])
    )
    if mask:
        first = ctx.node("ArgMax", ctx.node("Cast", mask, to=6), axis=1, keepdims=1)
        slots = ctx.node("Sub", slots, first)
    # a chunk's worth more, since ONNX divides towards zero: masked slots have negative numbers
    whole = ctx.node("Add", slots, graph.scalar(chunk * total))
    numbers = ctx.node("Div", whole, graph.constant(chunk))
    own = ctx.node("Slice", numbers, graph.shape([total - new]), graph.constant([END]), graph.constant([1]))
    own = ctx.node("Unsqueeze", own, graph.constant([1, 3]))
    return ctx.node("Equal", own, ctx.node("Unsqueeze", numbers, graph.constant([1, 2])))


def emit_attention(ctx: Context, op: Op) -> None:
    """Emit attention in plain ops; a token that sees no slot gets zeros, as a softmax of -inf would give NaN."""
    q, k, v, mask, sinks = op["q"], op["k"], op["v"], op.get("mask"), op.get("sinks")
    batch, heads, new, width = q.type.shape
    groups, total, out = k.type.shape[1], k.type.shape[2], v.type.shape[3]
    graph = ctx.graph
    attributes = op.settings
    # the heads of a group are adjacent: [B, H, S, D] is [B, G, R*S, D], and no key is repeated
    rows = heads / groups * new
    flat = ctx.reshape(ctx.value(q), q.type.shape, (batch, groups, rows, width))
    turned = ctx.node("Transpose", ctx.value(k), perm=[0, 1, 3, 2])
    scores = ctx.node("MatMul", ctx.node("Mul", flat, graph.constant(attributes.number("scale"), "f32")), turned)
    scores = ctx.reshape(scores, (batch, groups, rows, total), (batch, heads, new, total))
    if softcap := attributes.number("softcap"):
        cap = graph.constant(softcap, "f32")
        scores = ctx.node("Mul", ctx.node("Tanh", ctx.node("Div", scores, cap)), cap)
    seen = visible_slots(ctx, mask, new, total, attributes.integer("window"), attributes.integer("chunk"))
    scores = ctx.node("Where", seen, scores, graph.constant(LOWEST, "f32"))
    if sinks is not None:  # one more slot that takes its share of the softmax and has no value
        column = ctx.node("Reshape", ctx.value(sinks), graph.constant([1, int(heads), 1, 1]))
        column = ctx.node("Expand", column, graph.shape([batch, 1, new, 1]))
        scores = ctx.node("Softmax", ctx.node("Concat", scores, column, axis=3), axis=-1)
        weights = ctx.node("Slice", scores, graph.constant([0]), graph.constant([-1]), graph.constant([3]))
    else:
        weights = ctx.node("Softmax", scores, axis=-1)
    weights = ctx.node("Where", seen, weights, graph.constant(0.0, "f32"))
    weights = ctx.reshape(weights, (batch, heads, new, total), (batch, groups, rows, total))
    result = ctx.node("MatMul", weights, ctx.value(v))
    result = ctx.reshape(result, (batch, groups, rows, out), (batch, heads, new, out))
    ctx.finish(op, "Transpose", result, perm=[0, 2, 1, 3])


# --- GroupQueryAttention ---------------------------------------------------------------------------------------


def attention_bias(ctx: Context, op: Op) -> None:
    """Emit 0 or -inf for every slot, repeated for each new token (ONNX Runtime does not broadcast that axis)."""
    (mask,) = op.inputs
    name, graph, new = ctx.value(mask), ctx.graph, op.results[0].type.shape[2]

    def make(shared: Context) -> str:
        real = shared.node("Cast", name, to=9)
        bias = shared.node("Where", real, graph.constant(0.0, "f32"), graph.constant(-np.inf, "f32"))
        bias = shared.node("Unsqueeze", bias, graph.constant([1, 2]))
        return shared.node("Expand", bias, graph.shape([1, 1, new, 1]))

    # the name of the result stands for the shared value: no node of its own in every layer
    ctx.alias(op.results[0], ctx.once(("bias", name, size_text(new)), "attention_bias", make))


def group_query_attention(ctx: Context, op: Op) -> None:
    """Emit com.microsoft.GroupQueryAttention, with the number of tokens before and in this step."""
    ctx.finish(
        op, "GroupQueryAttention", *_attention_inputs(ctx, op, pads=True), domain=CONTRIB, **_attention_settings(op)
    )


def stored_attention(ctx: Context, op: Op) -> None:
    """Emit the operator of moec's own for the dtype of the cache: also a function of the model, see kernels/caches.py."""
    scales = [ctx.value(x) for x in (op.get("key_scale"), op.get("value_scale")) if x is not None]
    ctx.finish(
        op, ATTENTIONS[op["past_key"].type.dtype], *_attention_inputs(ctx, op, pads=False), *scales, domain=DOMAIN,
        overload=form_name(packed=op.get("k") is None, turned=op.get("cos") is not None), **_attention_settings(op),
    )  # fmt: skip


def _attention_settings(op: Op) -> dict[str, Any]:
    attributes = op.settings
    return {
        "num_heads": attributes.integer("heads"), "kv_num_heads": int(op["past_key"].type.shape[1]),
        "do_rotary": int(op.get("cos") is not None), "scale": attributes.number("scale"),
        "local_window_size": attributes.integer("window") or -1, "softcap": attributes.number("softcap"),
    }  # fmt: skip


def _attention_inputs(ctx: Context, op: Op, *, pads: bool) -> list[str]:
    """Return the inputs that the operators share; ONNX Runtime's own wants rows of angles for every slot (`pads`)."""
    graph, attributes = ctx.graph, op.settings
    batch, new, _ = op["q"].type.shape
    total = op.results[1].type.shape[2]
    last = _per_row(ctx, graph.scalar(total - 1, "i32"), batch)
    # without the count of new tokens a batch with past and several new tokens is refused
    count = _per_row(ctx, graph.scalar(new, "i32"), batch)
    rows = total if pads else sympy.Integer(0)
    angles = [_angle_rows(ctx, table, batch, new, rows) for table in (op.get("cos"), op.get("sin")) if table]
    sink = ctx.value(op.get("sinks"))
    bias = op.get("bias")
    if bias is not None and not sink:
        # a row that is all -inf becomes NaN with a softcap, or where it has one slot; a sink that weighs nothing makes it 0
        sink = graph.constant(np.full(attributes.integer("heads"), WEIGHTLESS), "f32")
    inputs = [ctx.value(op.get(name)) for name in ("q", "k", "v", "past_key", "past_value")]
    inputs += [last, graph.scalar(total, "i32")]
    inputs += [*angles, _row_numbers(ctx, batch, new)] if angles else ["", "", ""]
    return [*inputs, ctx.value(bias), sink, "", "", "", "", count]


def _angle_rows(ctx: Context, table: Value, batch: Size, new: Size, more: Size) -> str:
    """Return the angles [rows, R/2] with a row for every new token of the batch; once for all layers that share them.

    GroupQueryAttention looks angles up by position. Here they are computed already, and each token's "position" is the
    number of its row. ONNX Runtime's wants at least as many rows as the sequence is long, so that as many zeros follow them.
    """
    half = int(table.type.shape[-1]) // 2
    name = half_angles(ctx, table, batch)

    def make(shared: Context) -> str:
        graph = ctx.graph
        rows = shared.reshape(name, (batch, new, sympy.Integer(half)), (batch * new, sympy.Integer(half)))
        zero = sympy.Integer(0)
        return shared.node("Pad", rows, graph.shape([zero, zero, more, zero])) if more != 0 else rows

    return ctx.once(("rows", name, size_text(more)), f"{name}/rows", make)


def _row_numbers(ctx: Context, batch: Size, new: Size) -> str:
    """Return i64[B, S] that counts 0, 1, ... through the batch."""

    def make(shared: Context) -> str:
        graph = ctx.graph
        numbers = shared.node("Range", graph.constant(0), graph.scalar(batch * new), graph.constant(1))
        return shared.reshape(numbers, (batch * new,), (batch, new))

    return ctx.once(("row numbers", size_text(batch), size_text(new)), "sizes", make)


def _per_row(ctx: Context, scalar: str, batch: Size) -> str:
    make = lambda shared: shared.node("Expand", scalar, ctx.graph.shape([batch]))  # noqa: E731
    return ctx.once(("per row", scalar, size_text(batch)), "sizes", make)


KERNELS: dict[str, Kernel] = {
    "nn.attention": emit_attention,
    "ort.attention_bias": attention_bias,
    "ort.group_query_attention": group_query_attention,
    "ort.stored_attention": stored_attention,
}
