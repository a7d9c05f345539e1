"""How a router is said in ONNX."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from ...compiler.ir import Op
from .graph import Context, Kernel
from .onnx_core import sigmoid_of


def route(ctx: Context, op: Op) -> None:
    """Emit the choice and the weights of moe.route, without the steps that its attributes make idle."""
    logits, bias, given, expert_scale = ctx.inputs(op)
    a = ctx.attributes(op)
    gates, ids = (ctx.value(v) for v in op.results)
    plain = not bias and not given and a["groups"] == 1
    if plain and (a["score"], a["order"], a["renorm"]) == ("softmax", "score_select", "sum") and _is_small(op):
        # the softmax of all, chosen and normalised, is the softmax of the chosen
        a = {**a, "order": "select_score", "renorm": "none"}
    late = a["order"] == "select_score"
    scores = logits if late else _score(ctx, op, logits, a["score"])
    choice = ctx.node("Add", scores, bias) if bias else scores
    if a["groups"] > 1:
        choice = _limit(ctx, op, choice)
    weights = ""
    if given:
        ctx.graph.node(ctx.label, "Identity", [given], [ids], ctx.doc)
    else:
        weights, top = ctx.nodes("TopK", choice, ctx.graph.constant([a["k"]]), outputs=2, axis=1, largest=1, sorted=1)
        ctx.alias(op.results[1], top)
        ids = top
    read = choice if a["weigh"] == "choice" else scores
    masked_out = a["groups"] > 1 and a["mask"] != -np.inf  # then an expert outside the groups may be chosen
    if given or (read == scores and (bias or masked_out)):
        weights = ctx.node("GatherElements", read, ids, axis=1)
    if late:
        weights = _score(ctx, op, weights, a["score"])
    weights = _renorm(ctx, op, weights, a["renorm"])
    if a["scale"] != 1.0:
        weights = ctx.node("Mul", weights, ctx.graph.constant(a["scale"], op.results[0].type.dtype))
    if expert_scale:
        weights = ctx.node("Mul", weights, ctx.node("Gather", expert_scale, ids, axis=0))
    ctx.alias(op.results[0], weights)


def _is_small(op: Op) -> bool:
    """Return whether eps and min_sum change nothing where the sum is at least k of E shares."""
    attributes = dict(op.attributes)
    experts = op.inputs[0].type.shape[1]
    share = int(attributes["k"]) / int(experts)  # type: ignore[call-overload]
    return float(attributes.get("eps", 0.0)) <= 1e-8 * share and float(attributes.get("min_sum", 0.0)) <= share / 2  # type: ignore[arg-type]


def _score(ctx: Context, op: Op, x: str, score: str) -> str:
    match score:
        case "softmax":
            return ctx.node("Softmax", x, axis=1)
        case "sigmoid":
            return sigmoid_of(ctx, x, op.results[0].type.dtype)
        case "sqrtsoftplus":
            return ctx.node("Sqrt", ctx.node("Softplus", x))
    return x


def _limit(ctx: Context, op: Op, choice: str) -> str:
    """Return the choice with `mask` outside the best groups."""
    a, graph = ctx.attributes(op), ctx.graph
    tokens, experts = op.inputs[0].type.shape
    groups, dtype = a["groups"], op.results[0].type.dtype
    shape = (tokens, groups, experts / groups)
    grouped = ctx.reshape(choice, (tokens, experts), shape)
    if a["group_score"] == "max":
        best = ctx.node("ReduceMax", grouped, graph.constant([2]), keepdims=0)
    else:
        two, _ = ctx.nodes("TopK", grouped, graph.constant([2]), outputs=2, axis=2, largest=1, sorted=0)
        best = ctx.node("ReduceSum", two, graph.constant([2]), keepdims=0)
    _, kept = ctx.nodes("TopK", best, graph.constant([a["topk_groups"]]), outputs=2, axis=1, largest=1, sorted=0)
    no, yes = (helper.make_tensor("value", TensorProto.BOOL, [1], [value]) for value in (False, True))
    outside = ctx.node("ConstantOfShape", graph.shape([tokens, groups]), value=yes)
    inside = ctx.node("ConstantOfShape", graph.shape([tokens, a["topk_groups"]]), value=no)
    outside = ctx.node("ScatterElements", outside, kept, inside, axis=1)
    outside = ctx.node("Unsqueeze", outside, graph.constant([2]))
    return ctx.reshape(ctx.node("Where", outside, graph.constant(a["mask"], dtype), grouped), shape, (tokens, experts))


def _renorm(ctx: Context, op: Op, weights: str, renorm: str) -> str:
    if renorm == "none":
        return weights
    a, graph, dtype = ctx.attributes(op), ctx.graph, op.results[0].type.dtype
    kind = "ReduceSum" if renorm == "sum" else "ReduceL2"
    total = ctx.node(kind, weights, graph.constant([1]), keepdims=1)
    if a["eps"]:
        total = ctx.node("Add", total, graph.constant(a["eps"], dtype))
    if a["min_sum"]:
        total = ctx.node("Max", total, graph.constant(a["min_sum"], dtype))
    return ctx.node("Div", weights, total)


KERNELS: dict[str, Kernel] = {"moe.route": route}
