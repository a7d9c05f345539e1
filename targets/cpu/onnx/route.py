"""Emits a router as ONNX nodes."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from ....compiler.ir.module import Op
from ....compiler.ir.types import Attrs
from .core import sigmoid_of
from .graph import Context, Kernel

_IDLE_SHARE = 1e-8  # an eps of less than this share of a sum is lost in float32


def emit_route(ctx: Context, op: Op) -> None:
    """Emit the choice and the weights of moe.route, without the steps that its attributes make idle."""
    logits, bias, given, expert_scale = ctx.inputs(op)
    a = op.settings
    if a["score"] == "sparsemixer":
        weights, ids = _emit_sparsemixer(ctx, op, logits)
    else:
        if _is_softmax_of_chosen(op, a):
            a = Attrs({**a, "order": "select_score", "renorm": "none"})
        weights, ids = _choose_experts(ctx, op, a, logits, bias, given)
    weights = _renormalize_weights(ctx, op, weights, a)
    if a.number("scale") != 1.0:
        weights = ctx.node("Mul", weights, ctx.graph.constant(a.number("scale"), op.results[0].type.dtype))
    if expert_scale:
        weights = ctx.node("Mul", weights, ctx.node("Gather", expert_scale, ids, axis=0))
    for result, name in zip(op.results, (weights, ids), strict=True):
        ctx.alias(result, name)


def _is_softmax_of_chosen(op: Op, a: Attrs) -> bool:
    """Return whether the weights are the softmax of the chosen logits: the softmax of all, chosen and normalised.

    The k largest of E shares add up to k / E or more, so that a small eps and min_sum change nothing.
    """
    _, bias, given, _ = op.operands
    if bias or given or a.integer("groups") > 1 or a["weigh"] == "logits":
        return False
    if (a.text("score"), a.text("order"), a.text("renorm")) != ("softmax", "score_select", "sum"):
        return False
    experts = op.inputs[0].type.shape[1]
    share = a.integer("k") / int(experts) if experts.is_Integer else 0.0
    return bool(a.number("eps") <= _IDLE_SHARE * share and a.number("min_sum") <= share / 2)


def _choose_experts(ctx: Context, op: Op, a: Attrs, logits: str, bias: str, given: str) -> tuple[str, str]:
    """Return the weights before they are normalised, and the indices."""
    late = a["order"] == "select_score"
    scores = logits if late else _emit_score(ctx, op, logits, a.text("score"))
    choice = ctx.node("Add", scores, bias) if bias else scores
    if a.integer("groups") > 1:
        choice = _mask_expert_groups(ctx, op, choice)
    read = {"scores": scores, "choice": choice, "logits": logits}[a.text("weigh")]
    if given:
        weights, ids = "", given
    else:
        k = ctx.graph.constant([a.integer("k")])
        weights, ids = ctx.nodes("TopK", choice, k, outputs=2, axis=1, largest=1, sorted=1)
    # where experts outside the groups have -inf, none of them is chosen, and the choice holds the scores
    limited = read == scores and not bias and a.integer("groups") > 1 and a["mask"] == -np.inf
    if given or (read != choice and not limited):
        weights = ctx.node("GatherElements", read, ids, axis=1)
    return (_emit_score(ctx, op, weights, a.text("score")) if late else weights), ids


def _emit_score(ctx: Context, op: Op, x: str, score: str) -> str:
    match score:
        case "softmax":
            return ctx.node("Softmax", x, axis=1)
        case "sigmoid":
            return sigmoid_of(ctx, x, op.results[0].type.dtype)
        case "sqrtsoftplus":
            return ctx.node("Sqrt", ctx.node("Softplus", x))
    return x


def _mask_expert_groups(ctx: Context, op: Op, choice: str) -> str:
    """Return the choice with `mask` outside the best groups."""
    a, graph = op.settings, ctx.graph
    tokens, experts = op.inputs[0].type.shape
    groups, dtype = a.integer("groups"), op.results[0].type.dtype
    shape = (tokens, groups, experts / groups)
    grouped = ctx.reshape(choice, (tokens, experts), shape)
    if a["group_score"] == "max":
        best = ctx.node("ReduceMax", grouped, graph.constant([2]), keepdims=0)
    else:
        two, _ = ctx.nodes("TopK", grouped, graph.constant([2]), outputs=2, axis=2, largest=1, sorted=0)
        best = ctx.node("ReduceSum", two, graph.constant([2]), keepdims=0)
    _, kept = ctx.nodes(
        "TopK", best, graph.constant([a.integer("topk_groups")]), outputs=2, axis=1, largest=1, sorted=0
    )
    no, yes = (helper.make_tensor("value", TensorProto.BOOL, [1], [value]) for value in (False, True))
    outside = ctx.node("ConstantOfShape", graph.shape([tokens, groups]), value=yes)
    inside = ctx.node("ConstantOfShape", graph.shape([tokens, a.integer("topk_groups")]), value=no)
    outside = ctx.node("ScatterElements", outside, kept, inside, axis=1)
    outside = ctx.node("Unsqueeze", outside, graph.constant([2]))
    return ctx.reshape(
        ctx.node("Where", outside, graph.constant(a.number("mask"), dtype), grouped), shape, (tokens, experts)
    )


def _emit_sparsemixer(ctx: Context, op: Op, logits: str) -> tuple[str, str]:
    """Return weights and indices, one choice after the other.

    The softmax of the largest logit m is 1 / sum(exp(logit - m)), over the logits that are near enough.
    """
    a, graph, dtype = op.settings, ctx.graph, op.results[0].type.dtype
    zero, axis, low = graph.constant(0.0, dtype), graph.constant([1]), graph.constant([[-np.inf]], dtype)
    limit = graph.constant(2 * a.number("jitter"), dtype)
    size = ctx.node("Abs", logits)
    left, gates, ids = logits, [], []
    for _ in range(a.integer("k")):
        best, chosen = ctx.nodes("TopK", left, graph.constant([1]), outputs=2, axis=1, largest=1, sorted=1)
        far = ctx.node("Div", ctx.node("Sub", best, logits), ctx.node("Max", size, best))
        shares = ctx.node("Exp", ctx.node("Sub", left, best))
        shares = ctx.node("Where", ctx.node("Greater", far, limit), zero, shares)
        gates.append(ctx.node("Reciprocal", ctx.node("ReduceSum", shares, axis, keepdims=1)))
        ids.append(chosen)
        gone = ctx.node("Expand", low, ctx.node("Shape", chosen))
        left = ctx.node("ScatterElements", left, chosen, gone, axis=1)
    return ctx.node("Concat", *gates, axis=1), ctx.node("Concat", *ids, axis=1)


def _renormalize_weights(ctx: Context, op: Op, weights: str, a: Attrs) -> str:
    if a["renorm"] == "none":
        return weights
    graph, dtype, axis = ctx.graph, op.results[0].type.dtype, ctx.graph.constant([1])
    kinds = {1.0: "ReduceL1", 2.0: "ReduceL2"}
    if a["renorm"] == "sum":
        total = ctx.node("ReduceSum", weights, axis, keepdims=1)
    elif a.number("p") in kinds:
        total = ctx.node(kinds[a.number("p")], weights, axis, keepdims=1)
    else:
        powers = ctx.node("Pow", ctx.node("Abs", weights), graph.constant(a.number("p"), dtype))
        total = ctx.node("ReduceSum", powers, axis, keepdims=1)
        total = ctx.node("Pow", total, graph.constant(1 / a.number("p"), dtype))
    if a.number("eps"):
        total = ctx.node("Add", total, graph.constant(a.number("eps"), dtype))
    if a.number("min_sum"):
        total = ctx.node("Max", total, graph.constant(a.number("min_sum"), dtype))
    return ctx.node("Div", weights, total)


KERNELS: dict[str, Kernel] = {"moe.route": emit_route}
