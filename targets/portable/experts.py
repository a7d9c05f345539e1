"""Routed experts in standard operators: those that are chosen, gathered token by token, or all of them for every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from onnx import TensorProto, helper

from ...compiler.ir.dims import size
from ...compiler.ir.module import Op
from ..cpu.onnx.graph import Context, Kernel
from ..cpu.onnx.moe import emit_activation
from .quantized import all_numbers, chosen_numbers


@dataclass(frozen=True)
class Matrices:
    """The matrices [rows, columns] of all experts, what emits the numbers of all or of those that ids choose, and biases."""

    experts: int
    rows: int
    columns: int
    all_numbers: Callable[[], str]
    chosen_numbers: Callable[[str], str]
    bias: str


def _matrices_of(ctx: Context, op: Op) -> tuple[Matrices, Matrices]:
    """Return the matrices before and after the activation, of floats or of codes."""
    matrices = _of_floats if op.name == "moe.experts" else _of_codes
    return matrices(ctx, op, "up"), matrices(ctx, op, "down")


def _of_floats(ctx: Context, op: Op, name: str) -> Matrices:
    weight = ctx.value(op[name])
    chosen = lambda ids: ctx.node("Gather", weight, ids, axis=0)  # noqa: E731
    experts, rows, columns = op[name].type.sizes
    return Matrices(experts, rows, columns, lambda: weight, chosen, ctx.value(op.get(f"{name}_bias")))


def _of_codes(ctx: Context, op: Op, name: str) -> Matrices:
    codes, scales, zeros = (ctx.value(op[f"{name}_{part}"]) for part in ("codes", "scales", "zeros"))
    bits, group = op.settings.integer("bits"), op.settings.integer("group")
    experts, rows, groups = op[f"{name}_scales"].type.sizes
    columns, parts = groups * group, (codes, scales, zeros)
    return Matrices(
        experts,
        rows,
        columns,
        partial(all_numbers, ctx, parts, (experts, rows, columns), bits, group),
        lambda ids: chosen_numbers(ctx, parts, ids, 4, bits, group),
        ctx.value(op.get(f"{name}_bias")),
    )


def packed_experts(ctx: Context, op: Op) -> None:
    """Emit the products of each token with the matrices of its experts, gathered: only what is chosen is read."""
    x, ids, gates = (ctx.value(op[name]) for name in ("x", "ids", "gates"))
    graph, (up, down) = ctx.graph, _matrices_of(ctx, op)
    tokens, chosen = op["ids"].type.shape
    rows = ctx.node("Unsqueeze", x, graph.constant([1, 3]))
    h = ctx.node("MatMul", up.chosen_numbers(ids), rows)
    h = ctx.node("Squeeze", h, graph.constant([3]))
    h = _biased(ctx, h, up.bias, ids)
    h = ctx.node("Reshape", h, graph.constant([-1, up.rows]))
    h = emit_activation(ctx, h, op.settings.activation("act"))
    h = ctx.node("Reshape", h, graph.shape([tokens, chosen, size(down.columns), size(1)]))
    y = ctx.node("MatMul", down.chosen_numbers(ids), h)
    y = ctx.node("Reshape", y, graph.shape([tokens, chosen, size(down.rows)]))
    y = _biased(ctx, y, down.bias, ids)
    weighted = ctx.node("Mul", y, ctx.node("Unsqueeze", gates, graph.constant([2])))
    ctx.finish(op, "ReduceSum", weighted, graph.constant([1]), keepdims=0)


def _biased(ctx: Context, rows: str, bias: str, ids: str) -> str:
    return ctx.node("Add", rows, ctx.node("Gather", bias, ids, axis=0)) if bias else rows


def tiled_experts(ctx: Context, op: Op) -> None:
    """Emit the products of all tokens with the matrices of all experts; gates of experts that are not chosen are 0."""
    x, ids, gates = (ctx.value(op[name]) for name in ("x", "ids", "gates"))
    graph, (up, down) = ctx.graph, _matrices_of(ctx, op)
    tokens, experts = op["ids"].type.shape[0], size(up.experts)
    # every expert gets tokens of its own: OpenVINO's product with many matrices does not broadcast them
    copies = ctx.node("Tile", x, graph.constant([up.experts, 1]))
    copies = ctx.node("Reshape", copies, graph.shape([experts, tokens, op["x"].type.shape[1]]))
    h = _all_products(ctx, copies, up)
    h = emit_activation(ctx, ctx.node("Reshape", h, graph.constant([-1, up.rows])), op.settings.activation("act"))
    h = ctx.node("Reshape", h, graph.shape([experts, tokens, size(down.columns)]))
    y = _all_products(ctx, h, down)
    zero = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    none = ctx.node("ConstantOfShape", graph.shape([tokens, experts]), value=zero)
    shares = ctx.node("ScatterElements", none, ids, gates, axis=1, reduction="add")
    shares = ctx.node("Unsqueeze", ctx.node("Transpose", shares, perm=[1, 0]), graph.constant([2]))
    ctx.finish(op, "ReduceSum", ctx.node("Mul", y, shares), graph.constant([0]), keepdims=0)


def _all_products(ctx: Context, x: str, weights: Matrices) -> str:
    """Return [experts, tokens, rows] of x [experts, tokens, columns]."""
    product = ctx.node("MatMul", x, ctx.node("Transpose", weights.all_numbers(), perm=[0, 2, 1]))
    if not weights.bias:
        return product
    return ctx.node("Add", product, ctx.node("Unsqueeze", weights.bias, ctx.graph.constant([1])))


BODIES: Mapping[str, Kernel] = {"packed": packed_experts, "tiled": tiled_experts}
