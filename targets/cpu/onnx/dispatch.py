"""Emits routed experts that no pass could fuse: rows copied for each expert, and a Loop over the experts."""

from __future__ import annotations

from onnx import TensorProto, helper

from ....compiler.ir.module import Op, Value
from .graph import ONNX_TYPES, Context, Kernel


def emit_dispatch(ctx: Context, op: Op) -> None:
    """Emit a stable sort of the choices, a Gather of the tokens, and a count of the choices below each expert."""
    x, ids = ctx.inputs(op)
    graph = ctx.graph
    rows, offsets, perm = op.results
    chosen = op.inputs[1].type.shape[1]
    flat = ctx.reshape(ids, op.inputs[1].type.shape, perm.type.shape)
    sorted_, order = graph.fresh(f"{ctx.label}/sorted"), ctx.value(perm)
    graph.node(ctx.label, "TopK", [flat, graph.size(perm.type.shape[0])], [sorted_, order], ctx.doc, axis=0, largest=0)
    tokens = ctx.node("Div", order, graph.scalar(chosen))
    graph.node(ctx.label, "Gather", [x, tokens], [ctx.value(rows)], ctx.doc, axis=0)
    experts = graph.constant([[e] for e in range(int(offsets.type.shape[0]))])
    below = ctx.node("Cast", ctx.node("Less", ctx.node("Unsqueeze", flat, graph.constant([0])), experts), to=7)
    graph.node(ctx.label, "ReduceSum", [below, graph.constant([1])], [ctx.value(offsets)], ctx.doc, keepdims=0)


def grouped_linear(ctx: Context, op: Op) -> None:
    """Emit a Loop over the experts that multiplies the rows of each and concatenates the results."""
    rows, _, offsets = ctx.inputs(op)[:3]
    graph = ctx.graph
    type_ = op.results[0].type
    width = int(type_.shape[1])
    zero = helper.make_tensor("value", ONNX_TYPES[type_.dtype], [1], [0.0])
    start = ctx.node("ConstantOfShape", graph.constant([0, width]), value=zero)
    expert, go, go_on, done, longer = (
        graph.fresh(f"{ctx.label}/{n}") for n in ("expert", "go", "go_on", "y", "longer")
    )
    with graph.body() as nodes:
        after = ctx.node("Add", expert, graph.constant(1))
        first, last = (
            ctx.node("Unsqueeze", ctx.node("Gather", offsets, n, axis=0), graph.constant([0])) for n in (expert, after)
        )
        own = ctx.node("Slice", rows, first, last, graph.constant([0]))
        inputs = [own, *(ctx.node("Gather", ctx.value(w), expert, axis=0) for w in _linear_weights(op))]
        graph.node(ctx.label, "Concat", [done, ctx.node("Gemm", *inputs, transB=1)], [longer], ctx.doc, axis=0)
        graph.node(ctx.label, "Identity", [go], [go_on])
    dtype = ONNX_TYPES[type_.dtype]
    taken = [(expert, TensorProto.INT64, []), (go, TensorProto.BOOL, []), (done, dtype, [None, width])]
    given = [(go_on, TensorProto.BOOL, []), (longer, dtype, [None, width])]
    body = helper.make_graph(
        nodes, f"{ctx.label}/experts",
        [helper.make_tensor_value_info(*i) for i in taken], [helper.make_tensor_value_info(*o) for o in given],
    )  # fmt: skip
    count = _linear_weights(op)[0].type.shape[0]
    ctx.finish(op, "Loop", graph.constant(int(count)), "", start, body=body)


def _linear_weights(op: Op) -> list[Value]:
    return [v for v in (op["w"], op.get("bias")) if v is not None]


def emit_combine(ctx: Context, op: Op) -> None:
    """Emit the rows put back in the order of the choices, multiplied by the gates and added up for each token."""
    rows, gates, perm = ctx.inputs(op)
    graph = ctx.graph
    type_, (tokens, chosen) = op.inputs[0].type, op.inputs[1].type.shape
    zero = helper.make_tensor("value", ONNX_TYPES[type_.dtype], [1], [0.0])
    blank = ctx.node("ConstantOfShape", graph.shape(type_.shape), value=zero)
    ordered = ctx.node("ScatterND", blank, ctx.node("Unsqueeze", perm, graph.constant([1])), rows)
    each = ctx.reshape(ordered, type_.shape, (tokens, chosen, type_.shape[1]))
    weighted = ctx.node("Mul", each, ctx.node("Unsqueeze", gates, graph.constant([2])))
    ctx.finish(op, "ReduceSum", weighted, graph.constant([1]), keepdims=0)


KERNELS: dict[str, Kernel] = {
    "moe.dispatch": emit_dispatch,
    "moe.grouped_linear": grouped_linear,
    "moe.combine": emit_combine,
}
