"""Emits DeepSeek-V4's layers as plain ONNX ops: hyper-connections, compressed entries, and the attention that reads them."""

from __future__ import annotations

import numpy as np

from ....compiler.ir.dims import Size, floordiv, size, size_text
from ....compiler.ir.module import Op, Value
from .graph import CONTRIB, END, Context, Kernel

# --- hyper-connections ---------------------------------------------------------------------------------------------


def _emit_slice(ctx: Context, x: str, axis: int, start: int, stop: int) -> str:
    return ctx.node("Slice", x, *(ctx.graph.constant([n]) for n in (start, stop, axis)))


def _normed_product(ctx: Context, x: Value, w: str, eps: float) -> str:
    """Return w rms(x) with all streams of a token as one vector; the norm is applied to the product."""
    batch, new, streams, width = x.type.shape
    flat = ctx.reshape(ctx.value(x), x.type.shape, (batch, new, streams * width))
    square = ctx.node("ReduceMean", ctx.node("Mul", flat, flat), ctx.graph.constant([2]), keepdims=1)
    root = ctx.node("Sqrt", ctx.node("Add", square, ctx.graph.constant(eps, "f32")))
    return ctx.node("Div", ctx.node("FusedMatMul", flat, w, domain=CONTRIB, transB=1), root)


def hyper_connection_pre(ctx: Context, op: Op) -> None:
    """Emit the mix with the doubly stochastic matrix in plain ops, and HyperConnectionPreMix."""
    x = op.inputs[0]
    streams, _, w, base, scale = x.type.shape[2], *ctx.inputs(op)
    n = int(streams)
    batch, new = x.type.shape[:2]
    attributes, graph = op.settings, ctx.graph
    floor = graph.constant(attributes.number("floor"), "f32")
    z = _normed_product(ctx, x, w, attributes.number("eps"))
    parts = []
    for i, (start, stop) in enumerate(((0, n), (n, 2 * n), (2 * n, (2 + n) * n))):
        part = ctx.node("Mul", _emit_slice(ctx, z, 2, start, stop), _emit_slice(ctx, scale, 0, i, i + 1))
        parts.append(ctx.node("Add", part, _emit_slice(ctx, base, 0, start, stop)))
    y, post, _ = (ctx.value(v) for v in op.results)
    pre = ctx.node("Add", ctx.node("Sigmoid", parts[0]), floor)
    graph.node(
        ctx.label, "HyperConnectionPreMix", [ctx.value(x), pre], [y], ctx.doc, domain=CONTRIB, reduction_scale=1.0
    )
    graph.node(ctx.label, "Mul", [ctx.node("Sigmoid", parts[1]), graph.constant(2.0, "f32")], [post], ctx.doc)
    square = ctx.reshape(parts[2], (batch, new, size(n * n)), (batch, new, size(n), size(n)))
    _doubly_stochastic(ctx, op, square, floor, attributes.integer("iterations"))


def _doubly_stochastic(ctx: Context, op: Op, logits: str, floor: str, iterations: int) -> None:
    mix = ctx.node("Add", ctx.node("Softmax", logits, axis=-1), floor)
    for i in range(2 * iterations - 1):
        axis = ctx.graph.constant([-2 if i % 2 == 0 else -1])
        total = ctx.node("Add", ctx.node("ReduceSum", mix, axis, keepdims=1), floor)
        if i < 2 * iterations - 2:
            mix = ctx.node("Div", mix, total)
        else:
            ctx.graph.node(ctx.label, "Div", [mix, total], [ctx.value(op.results[2])], ctx.doc)


def hyper_connection_post(ctx: Context, op: Op) -> None:
    """Emit HyperConnectionPostMix."""
    x, streams, post, mix = ctx.inputs(op)
    ctx.finish(op, "HyperConnectionPostMix", streams, x, post, mix, domain=CONTRIB)


def hyper_connection_head(ctx: Context, op: Op) -> None:
    """Emit the weights of the streams, and HyperConnectionPreMix."""
    x, w, base, scale = ctx.inputs(op)
    attributes = op.settings
    z = ctx.node("Add", ctx.node("Mul", _normed_product(ctx, op.inputs[0], w, attributes.number("eps")), scale), base)
    pre = ctx.node("Add", ctx.node("Sigmoid", z), ctx.graph.constant(attributes.number("floor"), "f32"))
    ctx.finish(op, "HyperConnectionPreMix", x, pre, domain=CONTRIB, reduction_scale=1.0)


# --- rotary embedding of pairs, block-diagonal linear ----------------------------------------------------------------


def rope_pairs(ctx: Context, op: Op) -> None:
    """Emit RotaryEmbedding of the last numbers of each head."""
    x, cos, sin = op.inputs
    width, turned = int(x.type.shape[3]), 2 * int(cos.type.shape[2])
    if op.settings.flag("inverse"):
        back = lambda shared: shared.node("Neg", ctx.value(sin))  # noqa: E731
        sine = ctx.once(("neg", ctx.value(sin)), f"{ctx.value(sin)}/back", back)
    else:
        sine = ctx.value(sin)
    result = _rotate_pairs(ctx, ctx.value(x), x.type.shape, width, turned, ctx.value(cos), sine, cos.type.shape[0])
    ctx.alias(op.results[0], result)


def _rotate_pairs(
    ctx: Context, x: str, shape: tuple[Size, ...], width: int, turned: int, cos: str, sin: str, rows: Size
) -> str:
    """Return x [B, S, H, D] with its last numbers turned as pairs by angles [C, S, R]."""
    batch, new, heads, _ = shape
    end = _emit_slice(ctx, x, 3, width - turned, width) if turned < width else x
    flat = ctx.reshape(end, (batch, new, heads, size(turned)), (batch, new, heads * turned))
    tables = [_for_rows(ctx, table, rows, batch) for table in (cos, sin)]
    flat = ctx.node("RotaryEmbedding", flat, *tables, interleaved=1, num_heads=int(heads))
    end = ctx.reshape(flat, (batch, new, heads * turned), (batch, new, heads, size(turned)))
    return ctx.node("Concat", _emit_slice(ctx, x, 3, 0, width - turned), end, axis=3) if turned < width else end


def _for_rows(ctx: Context, table: str, rows: Size, batch: Size) -> str:
    """Return angles for every row of the batch; once for all layers that share the table."""
    if rows == batch:
        return table
    make = lambda shared: shared.node("Expand", table, ctx.graph.shape([batch, 1, 1]))  # noqa: E731
    return ctx.once(("rows", table, size_text(batch)), f"{table}/rows", make)


def block_linear(ctx: Context, op: Op) -> None:
    """Emit one product of matrices for each block."""
    x, w = op.inputs
    batch, new, blocks, width = x.type.shape
    rows = w.type.shape[0]
    each = ctx.reshape(ctx.value(w), w.type.shape, (blocks, rows / blocks, width))
    flat = ctx.reshape(ctx.value(x), x.type.shape, (batch * new, blocks, width))
    product = ctx.node("FusedMatMul", ctx.node("Transpose", flat, perm=[1, 0, 2]), each, domain=CONTRIB, transB=1)
    back = ctx.node("Transpose", product, perm=[1, 0, 2])
    ctx.alias(op.results[0], ctx.reshape(back, (batch * new, blocks, rows / blocks), (batch, new, rows)))


# --- compressed entries ----------------------------------------------------------------------------------------------


def compress_tokens(ctx: Context, op: Op) -> None:
    """Emit the softmax over the windows that end in this step, the norm, and the appended entries."""
    x, _, _, _, norm, cos, _ = op.inputs
    new, pending, past_entries, bias, weight, cosine, sine = ctx.inputs(op)
    attributes, graph = op.settings, ctx.graph
    ratio, overlap, width = attributes.integer("ratio"), attributes.flag("overlap"), int(norm.type.shape[0])
    count, batch, wide = cos.type.shape[0], x.type.shape[0], int(x.type.shape[2]) // 2
    stream = ctx.node("Concat", pending, new, axis=1)
    kept, everything = (ctx.value(v) for v in op.results)
    cut = [graph.size(count * ratio), graph.constant([END]), graph.constant([1])]
    graph.node(ctx.label, "Slice", [stream, *cut], [kept], ctx.doc)
    used = ctx.node(
        "Slice", stream, graph.constant([0]), graph.size((count + int(overlap)) * ratio), graph.constant([1])
    )
    # the number of windows may be 0, which Reshape takes as a size only with allowzero
    shape = graph.shape((batch, count + int(overlap), size(ratio), size(2 * wide)))
    windows = ctx.node("Reshape", used, shape, allowzero=1)
    values, logits = _emit_slice(ctx, windows, 3, 0, wide), _emit_slice(ctx, windows, 3, wide, 2 * wide)
    logits = ctx.node("Add", logits, bias)
    if overlap:
        first = _first_window(ctx, attributes.size("past"), ratio, count)
        before = _window_half(ctx, logits, 0, width, 0, -1)
        before = ctx.node("Where", first, graph.constant(-np.inf, "f32"), before)
        logits = ctx.node("Concat", before, _window_half(ctx, logits, width, wide, 1, END), axis=2)
        own = _window_half(ctx, values, width, wide, 1, END)
        values = ctx.node("Concat", _window_half(ctx, values, 0, width, 0, -1), own, axis=2)
    shares = ctx.node("Softmax", logits, axis=2)
    mixed = ctx.node("ReduceSum", ctx.node("Mul", values, shares), graph.constant([2]), keepdims=0)
    normed = ctx.node("RMSNormalization", mixed, weight, axis=-1, epsilon=attributes.number("eps"))
    turned = 2 * int(cos.type.shape[1])
    made = _turned_entries(ctx, normed, width, turned, cosine, sine)
    graph.node(ctx.label, "Concat", [past_entries, made], [everything], ctx.doc, axis=1)


def _window_half(ctx: Context, windows: str, low: int, high: int, start: int, stop: int) -> str:
    """Return part of the numbers of the windows start..stop."""
    return _emit_slice(ctx, _emit_slice(ctx, windows, 3, low, high), 1, start, stop)


def _first_window(ctx: Context, past: Size, ratio: int, count: Size) -> str:
    """Return bool[F, 1, 1]: whether a window that ends in this step is the sequence's first; once for all layers."""
    graph = ctx.graph

    def make(shared: Context) -> str:
        start, stop = graph.scalar(floordiv(past, ratio)), graph.scalar(size(floordiv(past, ratio) + count))
        numbers = shared.node("Range", start, stop, graph.constant(1))
        first = shared.node("Equal", numbers, graph.constant(0))
        return shared.node("Unsqueeze", first, graph.constant([1, 2]))

    return ctx.once(("first window", ratio, size_text(count)), f"windows_{ratio}", make)


def _turned_entries(ctx: Context, x: str, width: int, turned: int, cos: str, sin: str) -> str:
    """Return entries [B, F, D] with their last numbers turned as pairs; F may be 0, which RotaryEmbedding refuses."""
    graph = ctx.graph
    end = _emit_slice(ctx, x, 2, width - turned, width)
    a, b = (ctx.node("Slice", end, *(graph.constant([n]) for n in (i, turned, 2, 2))) for i in (0, 1))
    left = ctx.node("Sub", ctx.node("Mul", a, cos), ctx.node("Mul", b, sin))
    right = ctx.node("Add", ctx.node("Mul", b, cos), ctx.node("Mul", a, sin))
    pairs = [ctx.node("Unsqueeze", half, graph.constant([3])) for half in (left, right)]
    both = ctx.node("Concat", *pairs, axis=3)
    sizes = ctx.node("Shape", end)
    end = ctx.node("Reshape", both, sizes, allowzero=1)
    return ctx.node("Concat", _emit_slice(ctx, x, 2, 0, width - turned), end, axis=2) if turned < width else end


# --- which entries a token reads -------------------------------------------------------------------------------------


def _token_positions(ctx: Context, past: Size, new: Size) -> str:
    """Return i64[S, 1], the positions of the new tokens; once for all layers."""
    graph = ctx.graph

    def make(shared: Context) -> str:
        numbers = shared.node("Range", graph.scalar(past), graph.scalar(past + new), graph.constant(1))
        return shared.node("Unsqueeze", numbers, graph.constant([1]))

    return ctx.once(("positions", size_text(past), size_text(new)), "positions", make)


def _visible_entries(ctx: Context, past: Size, new: Size, entries: Size, ratio: int) -> str:
    """Return bool[S, E]: whether an entry's window ended before the next token."""
    graph = ctx.graph

    def make(shared: Context) -> str:
        following = shared.node("Add", _token_positions(shared, past, new), graph.constant(1))
        ended = shared.node("Div", following, graph.constant(ratio))
        numbers = shared.node("Range", graph.constant(0), graph.scalar(entries), graph.constant(1))
        return shared.node("Less", numbers, ended)

    return ctx.once(("visible entries", ratio, size_text(past), size_text(new)), f"entries_{ratio}", make)


def _visible_tokens(ctx: Context, past: Size, new: Size, kept: Size, window: int) -> str:
    """Return bool[S, T]: which of the kept and the new tokens a new token reads."""
    graph = ctx.graph

    def make(shared: Context) -> str:
        t = _token_positions(shared, past, new)
        s = shared.node("Range", graph.scalar(past - kept), graph.scalar(past + new), graph.constant(1))
        near = shared.node("Less", shared.node("Sub", t, s), graph.constant(window))
        return shared.node("And", shared.node("LessOrEqual", s, t), near)

    return ctx.once(("window", window, size_text(past), size_text(new)), f"window_{window}", make)


def select_entries(ctx: Context, op: Op) -> None:
    """Emit the scores of all entries and TopK; an entry that is not visible becomes -1."""
    q, keys, _ = op.inputs
    attributes, graph = op.settings, ctx.graph
    batch, new, heads, width = q.type.shape
    entries = keys.type.shape[1]
    flat = ctx.reshape(ctx.value(q), q.type.shape, (batch, new * heads, width))
    products = ctx.node("FusedMatMul", flat, ctx.value(keys), domain=CONTRIB, transB=1)
    shape = graph.shape((batch, new, heads, entries))
    positive = ctx.node("Reshape", ctx.node("Relu", products), shape, allowzero=1)
    weights = ctx.node("Unsqueeze", ctx.value(op.inputs[2]), graph.constant([2]))
    scores = ctx.node("Squeeze", ctx.node("MatMul", weights, positive), graph.constant([2]))
    seen = _visible_entries(ctx, attributes.size("past"), new, entries, attributes.integer("ratio"))
    scores = ctx.node("Where", seen, scores, graph.constant(-np.inf, "f32"))
    best, ids = ctx.nodes("TopK", scores, graph.size(op.results[0].type.shape[2]), outputs=2, axis=2)
    hidden = ctx.node("IsInf", best, detect_positive=0)
    ctx.finish(op, "Where", hidden, graph.constant(-1), ids)


# --- attention -------------------------------------------------------------------------------------------------------


def compressed_attention(ctx: Context, op: Op) -> None:
    """Emit attention with one more slot for the sink; entries that are not selected are masked."""
    q, kv, window_kv, sinks = op["q"], op["kv"], op["window"], op["sinks"]
    entries, selected = op.get("entries"), op.get("selected")
    attributes, graph = op.settings, ctx.graph
    past, window = attributes.size("past"), attributes.integer("window")
    batch, new, heads, width = q.type.shape
    tokens = ctx.node("Concat", ctx.value(window_kv), ctx.value(kv), axis=1)
    _keep_window(ctx, op, tokens, past + new, window)
    seen = _visible_tokens(ctx, past, new, window_kv.type.shape[1], window)
    seen = ctx.node("Unsqueeze", seen, graph.constant([0]))
    keys, slots = tokens, window_kv.type.shape[1] + new
    if entries is not None:
        count = entries.type.shape[1]
        read = _visible_entries(ctx, past, new, count, attributes.integer("ratio"))
        read = ctx.node("Unsqueeze", read, graph.constant([0]))
        if selected is not None:
            read = ctx.node("And", read, _selected_entries(ctx, selected, count))
            seen = ctx.node("Expand", seen, graph.shape([batch, 1, 1]))
        keys, slots = ctx.node("Concat", tokens, ctx.value(entries), axis=1), slots + count
        seen = ctx.node("Concat", seen, read, axis=2)
    flat = ctx.reshape(ctx.value(q), q.type.shape, (batch, new * heads, width))
    scores = ctx.node("FusedMatMul", flat, keys, domain=CONTRIB, transB=1, alpha=attributes.number("scale"))
    scores = ctx.reshape(scores, (batch, new * heads, slots), (batch, new, heads, slots))
    # -inf will do: the sink is one more logit, so that every row has one that is finite
    seen = ctx.node("Unsqueeze", seen, graph.constant([2]))
    scores = ctx.node("Where", seen, scores, graph.constant(-np.inf, "f32"))
    column = ctx.node("Reshape", ctx.value(sinks), graph.constant([1, 1, int(heads), 1]))
    column = ctx.node("Expand", column, graph.shape([batch, new, 1, 1]))
    shares = ctx.node("Softmax", ctx.node("Concat", scores, column, axis=3), axis=-1)
    shares = ctx.node("Slice", shares, *(graph.constant([n]) for n in (0, -1, 3)))
    shares = ctx.reshape(shares, (batch, new, heads, slots), (batch, new * heads, slots))
    mixed = ctx.node("MatMul", shares, keys)
    ctx.alias(op.results[0], ctx.reshape(mixed, (batch, new * heads, width), q.type.shape))


def _keep_window(ctx: Context, op: Op, tokens: str, total: Size, window: int) -> None:
    """Emit the state: the last `window` - 1 tokens, or all if there are fewer."""
    graph = ctx.graph
    start = graph.constant([1 - window]) if window > 1 else graph.constant([END])
    inputs = [tokens, start, graph.constant([END]), graph.constant([1])]
    graph.node(ctx.label, "Slice", inputs, [ctx.value(op.results[1])], ctx.doc)


def _selected_entries(ctx: Context, selected: Value, count: Size) -> str:
    """Return bool[B, S, E]: which entries are among the selected ones; -1 falls on a slot after the last."""
    graph = ctx.graph
    batch, new, _ = selected.type.shape
    places = ctx.value(selected)
    behind = ctx.node("Less", places, graph.constant(0))
    places = ctx.node("Where", behind, graph.scalar(count), places)
    none = ctx.node("Expand", graph.constant(0.0, "f32"), graph.shape([batch, new, count + 1]))
    ones = ctx.node("Expand", graph.constant(1.0, "f32"), graph.shape(selected.type.shape))
    marked = ctx.node("ScatterElements", none, places, ones, axis=2)
    marked = ctx.node("Slice", marked, *(graph.constant([n]) for n in (0, -1, 2)))
    return ctx.node("Greater", marked, graph.constant(0.5, "f32"))


KERNELS: dict[str, Kernel] = {
    "nn.hyper_connection_pre": hyper_connection_pre,
    "nn.hyper_connection_post": hyper_connection_post,
    "nn.hyper_connection_head": hyper_connection_head,
    "nn.rope_pairs": rope_pairs,
    "nn.block_linear": block_linear,
    "nn.compress_tokens": compress_tokens,
    "nn.select_entries": select_entries,
    "nn.compressed_attention": compressed_attention,
}
