"""Emits layers as ONNX nodes: embedding, norms, rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ....compiler.ir.dims import Size, size_text
from ....compiler.ir.module import Op, Value
from .graph import CONTRIB, END, Context, Kernel


def emit_embedding(ctx: Context, op: Op) -> None:
    """Emit Gather of rows."""
    ids, table = ctx.inputs(op)
    ctx.finish(op, "Gather", table, ids, axis=0)


def rms_norm(ctx: Context, op: Op) -> None:
    """Emit RMSNormalization over the last axis; with the Add before it, where that is the end of the layer before."""
    x, w = ctx.inputs(op)
    terms = ctx.graph.take_sum(x) if op.results[0].type.dtype == "f32" else None
    if terms:
        _skip_norm(ctx, op, (*terms, w), (ctx.value(op.results[0]), x))
    else:
        ctx.finish(op, "RMSNormalization", x, w, axis=-1, epsilon=op.attributes["eps"])


def add_rms_norm(ctx: Context, op: Op) -> None:
    """Emit com.microsoft.SkipSimplifiedLayerNormalization."""
    _skip_norm(ctx, op, ctx.inputs(op), [ctx.value(v) for v in op.results])


def _skip_norm(ctx: Context, op: Op, inputs: Sequence[str], results: Sequence[str]) -> None:
    """Add the node; its first output is the norm, its last the sum."""
    y, total = results
    kind, attrs = "SkipSimplifiedLayerNormalization", {"domain": CONTRIB, "epsilon": op.attributes["eps"]}
    ctx.graph.node(ctx.label, kind, inputs, [y, "", "", total], ctx.doc, **attrs)


def layer_norm(ctx: Context, op: Op) -> None:
    """Emit LayerNormalization; ONNX wants a scale."""
    x, w, b = ctx.inputs(op)
    type_ = op.results[0].type
    scale = w or ctx.graph.constant(np.ones(int(type_.shape[-1])), type_.dtype)
    ctx.finish(op, "LayerNormalization", x, scale, *([b] if b else []), axis=-1, epsilon=op.attributes["eps"])


def last_tokens(ctx: Context, op: Op) -> None:
    """Emit a slice from -logits_to_keep on; 0, the default of that input, keeps all tokens."""
    start = ctx.node("Neg", ctx.graph.optional_input("logits_to_keep", [0]))
    ctx.finish(op, "Slice", *ctx.inputs(op), start, ctx.graph.constant([END]), ctx.graph.constant([1]))


def emit_rope(ctx: Context, op: Op) -> None:
    """Emit RotaryEmbedding of ONNX 23 on [B, H, S, D]; it takes each angle once, for the first half."""
    x, cos, sin = op.inputs
    tables = [half_angles(ctx, table, x.type.shape[0]) for table in (cos, sin)]
    ctx.finish(op, "RotaryEmbedding", ctx.value(x), *tables)


def rotary_embedding(ctx: Context, op: Op) -> None:
    """Emit RotaryEmbedding of ONNX 23 on [B, S, H, D], which it takes as [B, S, H*D]."""
    x, cos, sin = op.inputs
    batch, new, heads, width = x.type.shape
    flat = (batch, new, heads * width)
    tables = [half_angles(ctx, table, batch) for table in (cos, sin)]
    part = {} if cos.type.shape[2] == width else {"rotary_embedding_dim": int(cos.type.shape[2])}
    rows = ctx.reshape(ctx.value(x), x.type.shape, flat)
    turned = ctx.node("RotaryEmbedding", rows, *tables, num_heads=int(heads), **part)
    ctx.alias(op.results[0], ctx.reshape(turned, flat, x.type.shape))


def half_angles(ctx: Context, table: Value, batch: Size) -> str:
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


KERNELS: dict[str, Kernel] = {
    "nn.embedding": emit_embedding,
    "nn.rms_norm": rms_norm,
    "nn.add_rms_norm": add_rms_norm,
    "nn.layer_norm": layer_norm,
    "nn.rope": emit_rope,
    "ort.last_tokens": last_tokens,
    "ort.rotary_embedding": rotary_embedding,
}
