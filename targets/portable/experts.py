"""Routed experts in standard operators: those that are chosen, gathered token by token, or all of them for every token."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import TensorProto, helper

from ...compiler.ir.dims import size
from ...compiler.ir.module import Op
from ..cpu.onnx.graph import Context, Kernel
from ..cpu.onnx.moe import emit_activation


def packed_experts(ctx: Context, op: Op) -> None:
    """Emit the products of each token with the matrices of its experts, gathered: only what is chosen is read."""
    x, ids, gates, up, down, up_bias, down_bias = ctx.inputs(op)
    graph = ctx.graph
    tokens, chosen = op["ids"].type.shape
    inner, width = size(int(op["down"].type.shape[2])), size(int(op["down"].type.shape[1]))
    rows = ctx.node("Unsqueeze", x, graph.constant([1, 3]))
    h = ctx.node("MatMul", ctx.node("Gather", up, ids, axis=0), rows)
    h = ctx.node("Squeeze", h, graph.constant([3]))
    h = _biased(ctx, h, up_bias, ids)
    h = ctx.node("Reshape", h, graph.constant([-1, int(op["up"].type.shape[1])]))
    h = emit_activation(ctx, h, op.settings.activation("act"))
    h = ctx.node("Reshape", h, graph.shape([tokens, chosen, inner, size(1)]))
    y = ctx.node("MatMul", ctx.node("Gather", down, ids, axis=0), h)
    y = ctx.node("Reshape", y, graph.shape([tokens, chosen, width]))
    y = _biased(ctx, y, down_bias, ids)
    weighted = ctx.node("Mul", y, ctx.node("Unsqueeze", gates, graph.constant([2])))
    ctx.finish(op, "ReduceSum", weighted, graph.constant([1]), keepdims=0)


def _biased(ctx: Context, rows: str, bias: str, ids: str) -> str:
    return ctx.node("Add", rows, ctx.node("Gather", bias, ids, axis=0)) if bias else rows


def tiled_experts(ctx: Context, op: Op) -> None:
    """Emit the products of all tokens with the matrices of all experts; gates of experts that are not chosen are 0."""
    x, ids, gates, up, down, up_bias, down_bias = ctx.inputs(op)
    graph = ctx.graph
    tokens = op["ids"].type.shape[0]
    experts, rows = (int(n) for n in op["up"].type.shape[:2])
    inner = int(op["down"].type.shape[2])
    # every expert gets tokens of its own: OpenVINO's product with many matrices does not broadcast them
    copies = ctx.node("Tile", x, graph.constant([experts, 1]))
    copies = ctx.node("Reshape", copies, graph.shape([size(experts), tokens, op["x"].type.shape[1]]))
    h = _all_products(ctx, copies, up, up_bias)
    h = emit_activation(ctx, ctx.node("Reshape", h, graph.constant([-1, rows])), op.settings.activation("act"))
    h = ctx.node("Reshape", h, graph.shape([size(experts), tokens, size(inner)]))
    y = _all_products(ctx, h, down, down_bias)
    zero = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    none = ctx.node("ConstantOfShape", graph.shape([tokens, size(experts)]), value=zero)
    shares = ctx.node("ScatterElements", none, ids, gates, axis=1, reduction="add")
    shares = ctx.node("Unsqueeze", ctx.node("Transpose", shares, perm=[1, 0]), graph.constant([2]))
    ctx.finish(op, "ReduceSum", ctx.node("Mul", y, shares), graph.constant([0]), keepdims=0)


def _all_products(ctx: Context, x: str, weight: str, bias: str) -> str:
    """Return [experts, tokens, out] of x [experts, tokens, in] and weights [experts, out, in]."""
    product = ctx.node("MatMul", x, ctx.node("Transpose", weight, perm=[0, 2, 1]))
    return ctx.node("Add", product, ctx.node("Unsqueeze", bias, ctx.graph.constant([1]))) if bias else product


BODIES: Mapping[str, Kernel] = {"packed": packed_experts, "tiled": tiled_experts}
