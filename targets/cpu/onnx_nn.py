"""How the layers are said in ONNX: embedding, norms, rotary embedding, attention."""

from __future__ import annotations

import numpy as np

from ...compiler.dims import Size, size_text
from ...compiler.ir import Op, Value
from .graph import CONTRIB, END, Context, Kernel

LOWEST = float(np.finfo(np.float32).min)


def embedding(ctx: Context, op: Op) -> None:
    """Emit Gather of rows."""
    ids, table = ctx.inputs(op)
    ctx.finish(op, "Gather", table, ids, axis=0)


def rms_norm(ctx: Context, op: Op) -> None:
    """Emit RMSNormalization over the last axis."""
    ctx.finish(op, "RMSNormalization", *ctx.inputs(op), axis=-1, epsilon=op.attributes["eps"])


def layer_norm(ctx: Context, op: Op) -> None:
    """Emit LayerNormalization; ONNX wants a scale."""
    x, w, b = ctx.inputs(op)
    type_ = op.results[0].type
    scale = w or ctx.graph.constant(np.ones(int(type_.shape[-1])), type_.dtype)
    ctx.finish(op, "LayerNormalization", x, scale, *([b] if b else []), axis=-1, epsilon=op.attributes["eps"])


def last_tokens(ctx: Context, op: Op) -> None:
    """Emit a slice from -logits_to_keep on; 0, which that input is where nobody gives it, keeps all tokens."""
    start = ctx.node("Neg", ctx.graph.optional_input("logits_to_keep", [0]))
    ctx.finish(op, "Slice", *ctx.inputs(op), start, ctx.graph.constant([END]), ctx.graph.constant([1]))


def rope(ctx: Context, op: Op) -> None:
    """Emit RotaryEmbedding of ONNX 23 on [B, H, S, D]; it takes each angle once, for the first half."""
    x, cos, sin = op.inputs
    tables = [_half(ctx, table, x.type.shape[0]) for table in (cos, sin)]
    ctx.finish(op, "RotaryEmbedding", ctx.value(x), *tables)


def rotary_embedding(ctx: Context, op: Op) -> None:
    """Emit RotaryEmbedding of ONNX 23 on [B, S, H, D], which it takes as [B, S, H*D]."""
    x, cos, sin = op.inputs
    batch, new, heads, width = x.type.shape
    flat = (batch, new, heads * width)
    tables = [_half(ctx, table, batch) for table in (cos, sin)]
    turned = ctx.node("RotaryEmbedding", ctx.reshape(ctx.value(x), x.type.shape, flat), *tables, num_heads=int(heads))
    ctx.alias(op.results[0], ctx.reshape(turned, flat, x.type.shape))


def _half(ctx: Context, table: Value, batch: Size) -> str:
    """Return the first half of the angles for every row of the batch; once for all layers that share the table."""
    name = ctx.value(table)
    half = int(table.type.shape[-1]) // 2

    def make(shared: Context) -> str:
        graph = ctx.graph
        cut = shared.node("Slice", name, *(graph.constant([n]) for n in (0, half, 2)))
        if table.type.shape[0] == batch:
            return cut
        return shared.node("Expand", cut, graph.shape([batch, 1, 1]))

    return ctx.once(("half", name, size_text(batch)), f"{name}/half", make)


# --- attention in plain ops ------------------------------------------------------------------------------------


def visible(ctx: Context, mask: Value | None, new: Size, total: Size, window: int) -> str:
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
            return shared.node("Unsqueeze", seen, graph.constant([0, 1]))
        real = shared.node("Unsqueeze", shared.node("Cast", name, to=9), graph.constant([1, 2]))
        return shared.node("And", seen, real)

    return ctx.once(("visible", name, size_text(new), size_text(total), window), "mask", make)


def attention(ctx: Context, op: Op) -> None:
    """Emit attention in plain ops; a token that sees no slot gets zeros, as a softmax of -inf would give NaN."""
    q, k, v, mask, sinks = op.operands
    assert q and k and v
    batch, heads, new, width = q.type.shape
    groups, total, out = k.type.shape[1], k.type.shape[2], v.type.shape[3]
    graph = ctx.graph
    attributes = ctx.attributes(op)
    # the heads of a group lie one behind the other: [B, H, S, D] is [B, G, R*S, D], and no key is repeated
    rows = heads / groups * new
    flat = ctx.reshape(ctx.value(q), q.type.shape, (batch, groups, rows, width))
    turned = ctx.node("Transpose", ctx.value(k), perm=[0, 1, 3, 2])
    scores = ctx.node("MatMul", ctx.node("Mul", flat, graph.constant(attributes["scale"], "f32")), turned)
    scores = ctx.reshape(scores, (batch, groups, rows, total), (batch, heads, new, total))
    if softcap := attributes["softcap"]:
        cap = graph.constant(softcap, "f32")
        scores = ctx.node("Mul", ctx.node("Tanh", ctx.node("Div", scores, cap)), cap)
    seen = visible(ctx, mask, new, total, attributes["window"])
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
    """Emit com.microsoft.GroupQueryAttention on [B, S, H*D], with the number of tokens before and in this step."""
    q, k, v, past_key, past_value, bias, sinks = op.operands
    assert q and k and v and past_key
    batch, new, heads, width = q.type.shape
    groups = k.type.shape[2]
    graph = ctx.graph
    total = op.results[1].type.shape[2]
    flat = [ctx.reshape(ctx.value(x), x.type.shape, (*x.type.shape[:2], x.type.shape[2] * width)) for x in (q, k, v)]
    last = _per_row(ctx, graph.scalar(total - 1, "i32"), batch)
    # without the count of new tokens a batch with past and several new tokens is refused
    count = _per_row(ctx, graph.scalar(new, "i32"), batch)
    inputs = [*flat, ctx.value(past_key), ctx.value(past_value), last, graph.scalar(total, "i32"), "", "", ""]
    attributes = ctx.attributes(op)
    sink = ctx.value(sinks)
    if attributes["softcap"] and bias is not None and not sink:
        # with a softcap a row that is all -inf becomes NaN; a sink that weighs nothing makes it 0, as without one
        sink = graph.constant(np.full(int(heads), -1e30), "f32")
    inputs += [ctx.value(bias), sink, "", "", "", "", count]
    outputs = [graph.fresh(f"{ctx.label}/heads"), *(ctx.value(state) for state in op.results[1:])]
    graph.node(
        ctx.label, "GroupQueryAttention", inputs, outputs, ctx.doc, domain=CONTRIB,
        num_heads=int(heads), kv_num_heads=int(groups), do_rotary=0, scale=attributes["scale"],
        local_window_size=attributes["window"] or -1, softcap=attributes["softcap"],
    )  # fmt: skip
    ctx.alias(op.results[0], ctx.reshape(outputs[0], (batch, new, heads * width), op.results[0].type.shape))


def _per_row(ctx: Context, scalar: str, batch: Size) -> str:
    make = lambda shared: shared.node("Expand", scalar, ctx.graph.shape([batch]))  # noqa: E731
    return ctx.once(("per row", scalar, size_text(batch)), "sizes", make)


KERNELS: dict[str, Kernel] = {
    "nn.embedding": embedding,
    "nn.rms_norm": rms_norm,
    "nn.layer_norm": layer_norm,
    "nn.rope": rope,
    "ort.last_tokens": last_tokens,
    "nn.attention": attention,
    "ort.rotary_embedding": rotary_embedding,
    "ort.attention_bias": attention_bias,
    "ort.group_query_attention": group_query_attention,
}
