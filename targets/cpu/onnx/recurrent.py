"""Emits recurrent layers: Conv over channels, com.microsoft.LinearAttention."""

from __future__ import annotations

from ....compiler.ir.module import Op, Value
from .graph import CONTRIB, END, Context, Kernel


def conv_window(ctx: Context, op: Op) -> None:
    """Emit Concat, and a Slice of its end as the new state."""
    past, new = ctx.inputs(op)
    whole, present = op.results
    width = int(present.type.shape[2])
    ctx.graph.node(ctx.label, "Concat", [past, new], [ctx.value(whole)], ctx.doc, axis=2)
    bounds = [ctx.graph.constant([n]) for n in (-width, END, 2)]
    ctx.graph.node(ctx.label, "Slice", [ctx.value(whole), *bounds], [ctx.value(present)], ctx.doc)


def new_state(ctx: Context, op: Op) -> None:
    """Emit Identity: the value goes out under the state's name."""
    ctx.finish(op, "Identity", *ctx.inputs(op))


def causal_conv(ctx: Context, op: Op) -> None:
    """Emit Conv with a group for each channel and zeros in front."""
    x, w, b = ctx.inputs(op)
    channels, width = op["w"].type.sizes
    kernel = ctx.node("Unsqueeze", w, ctx.graph.constant([1]))
    ctx.finish(op, "Conv", x, kernel, *([b] if b else []), group=channels, pads=[width - 1, 0], kernel_shape=[width])


def linear_attention(ctx: Context, op: Op) -> None:
    """Emit com.microsoft.LinearAttention, which takes heads flattened."""
    decay, beta = op.get("decay"), op.get("beta")
    y, present = op.results
    batch, new, heads, width = op["v"].type.shape
    flat = [_merge_heads(ctx, op[name]) for name in "qkv"]
    rule = "_".join(name for name, given in (("gated", decay), ("delta", beta)) if given) or "linear"
    inputs = [*flat, ctx.value(op["past"]), _merge_heads(ctx, decay) if decay is not None else "", ctx.value(beta)]
    while not inputs[-1]:
        inputs.pop()
    made = ctx.graph.fresh(f"{ctx.value(y)}/flat")
    ctx.graph.node(
        ctx.label, "LinearAttention", inputs, [made, ctx.value(present)], ctx.doc, domain=CONTRIB, update_rule=rule,
        q_num_heads=int(heads), kv_num_heads=int(heads), scale=op.settings.number("scale"),
    )  # fmt: skip
    ctx.alias(y, ctx.reshape(made, (batch, new, heads * width), y.type.shape))


def _merge_heads(ctx: Context, x: Value) -> str:
    batch, new, heads, width = x.type.shape
    return ctx.reshape(ctx.value(x), x.type.shape, (batch, new, heads * width))


KERNELS: dict[str, Kernel] = {
    "nn.conv_window": conv_window,
    "nn.new_state": new_state,
    "nn.causal_conv": causal_conv,
    "nn.linear_attention": linear_attention,
}
