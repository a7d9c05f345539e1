"""Emits routed experts as com.microsoft.MoE, or as a Loop over the experts that were chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx import TensorProto, helper

from ....compiler.ir.activation import Activation
from ....compiler.ir.module import Op
from .graph import CONTRIB, END, ONNX_TYPES, Context, Kernel

_UNGATED = {"gelu_tanh": "gelu"}  # what MoE and QMoE call gelu is the one with tanh
_UNUSED = -1e30  # router score of an expert that was not chosen


def emit_moe(ctx: Context, op: Op) -> None:
    """Emit com.microsoft.MoE with a routing that is already done.

    The op takes scores, picks the K largest and mixes by their softmax. The scores log(gate) of the chosen experts,
    scattered over very low ones, give back the choice and gate / sum(gates); the result is multiplied by the sum, where it
    is not known to be 1.
    """
    x, ids, gates, up, down, up_bias, down_bias = ctx.inputs(op)
    attributes = op.settings
    tokens, experts, chosen = _expert_counts(op)
    graph = ctx.graph
    low = helper.make_tensor("value", TensorProto.FLOAT, [1], [_UNUSED])
    scores = ctx.node("ConstantOfShape", graph.shape([tokens, experts]), value=low)
    scores = ctx.node("ScatterElements", scores, ids, ctx.node("Log", gates), axis=1)
    options = activation_options(attributes.activation("act"))
    inputs = [x, scores, up, up_bias, down, *([down_bias] if down_bias else [])]
    options |= {"k": chosen, "normalize_routing_weights": 1, "domain": CONTRIB}
    if attributes["gate_sum"] == 1.0:
        ctx.finish(op, "MoE", *inputs, **options)
        return
    mixed = ctx.node("MoE", *inputs, **options)
    if attributes["gate_sum"]:
        ctx.finish(op, "Mul", mixed, graph.constant(attributes["gate_sum"], "f32"))
        return
    total = ctx.node("ReduceSum", gates, graph.constant([1]), keepdims=1)
    ctx.finish(op, "Mul", mixed, total)


def activation_options(act: Activation) -> dict[str, Any]:
    """Return the attributes of MoE and QMoE for an activation; gate and up rows are interleaved."""
    if not act.gated:
        return {"activation_type": _UNGATED.get(act.kind, act.kind)}
    options = {"activation_type": "swiglu", "swiglu_fusion": 1}
    options |= {"activation_alpha": act.alpha, "activation_beta": act.beta}
    return options | ({"swiglu_limit": act.limit} if act.clamped else {})


def emit_expert_loop(ctx: Context, op: Op) -> None:
    """Emit the Loop over the experts that were chosen, each with its part of the stacked weights."""
    up, down, up_bias, down_bias = ctx.inputs(op)[3:]
    gather = lambda name: lambda expert: ctx.node("Gather", name, expert, axis=0)  # noqa: E731
    expert_loop(ctx, op, up=gather(up), down=gather(down), biases=(up_bias, down_bias))


def expert_loop(
    ctx: Context, op: Op, up: Callable[[str], str], down: Callable[[str], str], biases: tuple[str, str]
) -> None:
    """Emit a Loop over the distinct experts that were chosen: gather their tokens, compute, add the weighted rows.

    `up` and `down` add what makes the matrix of the expert whose number they are given, `biases` are those of all.
    """
    x, ids, gates = ctx.inputs(op)[:3]
    tokens, chosen = op["ids"].type.shape
    type_ = op.results[0].type
    width = int(type_.shape[1])
    graph = ctx.graph
    flat_ids = ctx.node("Reshape", ids, graph.constant([-1]))
    flat_gates = ctx.node("Reshape", gates, graph.constant([-1, 1]))
    used = ctx.node("Unique", flat_ids, sorted=1)
    zero = helper.make_tensor("value", ONNX_TYPES[type_.dtype], [1], [0.0])
    start = ctx.node("ConstantOfShape", graph.shape([tokens, width]), value=zero)
    step, go, go_on, total, added = (graph.fresh(f"{ctx.label}/{n}") for n in ("step", "go", "go_on", "sum", "added"))
    with graph.body() as nodes:
        expert = ctx.node("Gather", used, step, axis=0)
        hits = ctx.node("NonZero", ctx.node("Equal", flat_ids, expert))
        hits = ctx.node("Squeeze", hits, graph.constant([0]))
        rows = ctx.node("Div", hits, graph.constant(int(chosen)))
        h = _expert_linear(ctx, ctx.node("Gather", x, rows, axis=0), expert, up(expert), biases[0])
        h = emit_activation(ctx, h, op.settings.activation("act"))
        h = _expert_linear(ctx, h, expert, down(expert), biases[1])
        h = ctx.node("Mul", h, ctx.node("Gather", flat_gates, hits, axis=0))
        where = ctx.node("Unsqueeze", rows, graph.constant([1]))
        graph.node(ctx.label, "ScatterND", [total, where, h], [added], ctx.doc, reduction="add")
        graph.node(ctx.label, "Identity", [go], [go_on])
    dtype = ONNX_TYPES[type_.dtype]
    inputs = [(step, TensorProto.INT64, []), (go, TensorProto.BOOL, []), (total, dtype, [None, width])]
    outputs = [(go_on, TensorProto.BOOL, []), (added, dtype, [None, width])]
    body = helper.make_graph(
        nodes, f"{ctx.label}/expert",
        [helper.make_tensor_value_info(*i) for i in inputs], [helper.make_tensor_value_info(*o) for o in outputs],
    )  # fmt: skip
    ctx.finish(op, "Loop", ctx.node("Size", used), "", start, body=body)


def _expert_counts(op: Op) -> tuple[Any, int, int]:
    """Return the number of tokens, of experts, and of experts for each token."""
    tokens, chosen = op["ids"].type.shape
    return tokens, int(op["up"].type.shape[0]), int(chosen)


def _expert_linear(ctx: Context, x: str, expert: str, weight: str, bias: str) -> str:
    inputs = [x, weight, *([ctx.node("Gather", bias, expert, axis=0)] if bias else [])]
    return ctx.node("Gemm", *inputs, transB=1)


def emit_activation(ctx: Context, h: str, act: Activation) -> str:
    """Add the activation between the two matrices."""
    if not act.gated:
        return _emit_activation_function(ctx, act, h)
    g, u = _split_halves(ctx, h, act.layout)
    below = ("", ctx.graph.constant(act.limit, "f32")) if act.clamped else ()
    if below and not act.clamp_after:
        g = ctx.node("Clip", g, *below)
    if below:
        u = ctx.node("Clip", u, ctx.graph.constant(-act.limit, "f32"), below[1])
    if act.beta:
        u = ctx.node("Add", u, ctx.graph.constant(act.beta, "f32"))
    g = _emit_activation_function(ctx, act, g)
    return ctx.node("Mul", ctx.node("Clip", g, *below) if act.clamp_after else g, u)


def _split_halves(ctx: Context, h: str, layout: str) -> tuple[str, str]:
    graph = ctx.graph
    if layout == "concat":
        g, u = ctx.nodes("Split", h, outputs=2, axis=1, num_outputs=2)
        return g, u
    ends = [graph.constant([END]), graph.constant([1]), graph.constant([2])]  # to the end, along axis 1, every second
    return ctx.node("Slice", h, graph.constant([0]), *ends), ctx.node("Slice", h, graph.constant([1]), *ends)


def _emit_activation_function(ctx: Context, act: Activation, x: str) -> str:
    match act.kind:
        case "identity":
            return x
        case "silu":
            scaled = x if act.alpha == 1.0 else ctx.node("Mul", x, ctx.graph.constant(act.alpha, "f32"))
            return ctx.node("Mul", x, ctx.node("Sigmoid", scaled))
        case "gelu" | "gelu_tanh":
            return ctx.node("Gelu", x, approximate="none" if act.kind == "gelu" else "tanh")
        case _:
            y = ctx.node("Relu", x)
            return ctx.node("Mul", y, y) if act.kind == "relu2" else y


KERNELS: dict[str, Kernel] = {"moe.experts": emit_expert_loop, "ort.moe": emit_moe}
