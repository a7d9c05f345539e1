"""`moe.route`: which experts a token goes to, and with which weights."""

from __future__ import annotations

from math import inf, isfinite

from ..ir.deferred import torch
from ..ir.dims import Size
from ..ir.types import TensorType
from .define import Attributes, Types, inference_error, op

# floating-point operations of a score for one logit
SCORES = {"softmax": 5, "sigmoid": 4, "sqrtsoftplus": 4, "identity": 0, "sparsemixer": 8}

_CHOICES = {
    "score": tuple(SCORES),
    "order": ("score_select", "select_score"),
    "weigh": ("scores", "choice", "logits"),
    "renorm": ("none", "sum", "norm"),
    "group_score": ("max", "top2"),
    "mask": (-inf, 0.0),
}
_PLAIN = {"order": "score_select", "weigh": "scores", "groups": 1}  # what sparsemixer has


def _infer_route(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    logits, bias, given, _ = types
    a = attributes
    for name, known in _CHOICES.items():
        if a[name] not in known:
            raise inference_error(f"moe.route does not know {name}={a[name]}; it knows {', '.join(map(str, known))}")
    _check_numbers(a)
    _check_groups(logits.shape[1], a)
    if given and (bias or a["groups"] != 1 or a["weigh"] == "choice"):
        raise inference_error(
            "moe.route: where the experts are given nothing is chosen, so no bias, no groups, no weigh=choice"
        )
    if a["score"] == "sparsemixer" and (bias or given or any(a[n] != v for n, v in _PLAIN.items())):
        raise inference_error(
            "moe.route: score=sparsemixer chooses by itself, without bias, given experts, order, weigh or groups"
        )
    if a["weigh"] == "logits" and a["order"] == "select_score":
        raise inference_error(
            "moe.route: order=select_score scores the chosen logits, weigh=logits takes them as they are"
        )
    tokens = logits.shape[0]
    return TensorType.of(logits.dtype, tokens, a["k"]), TensorType.of("i64", tokens, a["k"])


def _check_numbers(a: Attributes) -> None:
    if not (0 <= a["eps"] < inf and 0 <= a["min_sum"] < inf and 0 < a["p"] < inf and isfinite(a["scale"])):
        raise inference_error(
            "moe.route: eps and min_sum are 0 or more, p is above 0, and with scale all of them finite"
        )
    if a["renorm"] == "none" and (a["eps"] or a["min_sum"]):
        raise inference_error("moe.route: eps and min_sum belong to a sum, renorm=none has none")
    if a["renorm"] != "norm" and a["p"] != 1:
        raise inference_error(f"moe.route: p={a['p']} belongs to renorm=norm")
    if not 0 <= a["jitter"] < inf or (a["jitter"] and a["score"] != "sparsemixer"):
        raise inference_error("moe.route: jitter is 0 or more and belongs to score=sparsemixer")


def _check_groups(experts: Size, a: Attributes) -> None:
    k, groups, kept = a["k"], a["groups"], a["topk_groups"]
    if k < 1 or (experts.is_Integer and k > experts):
        raise inference_error(f"moe.route: k={k} of {experts} experts")
    if not 1 <= kept <= groups or (groups > 1 and (not experts.is_Integer or experts % groups != 0)):
        raise inference_error(f"moe.route: topk_groups={kept} of groups={groups} with {experts} experts")
    if groups == 1:
        return
    width = int(experts) // groups
    if a["group_score"] == "top2" and width < 2:
        raise inference_error("moe.route: group_score=top2 wants groups of two experts or more")
    if a["mask"] != 0 and k > kept * width:
        raise inference_error(
            f"moe.route: k={k}, but {kept} groups of {width} leave {kept * width} experts to choose from"
        )


@op(
    "moe.route",
    "logits: A[T, E], bias: A[E]?, given: i64[T, k]?, expert_scale: A[E]? -> gates: A[T, k], ids: i64[T, k]",
    infer=_infer_route,
    flops=lambda o, r, a: o[0].elements * (SCORES[a["score"]] + bool(o[1]) + (not o[2])) + 3 * r[0].elements,
    domains={"given": lambda types, attributes: types[0].shape[1]},
    distinct=("given",),
)
def route(
    logits, bias, given, expert_scale, *,
    k: int, score: str = "softmax", order: str = "score_select", weigh: str = "scores",
    renorm: str = "none", eps: float = 0.0, min_sum: float = 0.0, p: float = 1.0, scale: float = 1.0,
    groups: int = 1, topk_groups: int = 1, group_score: str = "max", mask: float = -inf, jitter: float = 0.0,
):  # fmt: skip
    """Choose k experts for each token, and the weights that their results are mixed with.

    scores = score(logits); choice = scores + bias; ids = the k largest of choice, largest first; w = scores[ids].
    With order=select_score, choice = logits + bias and w = score(logits[ids]): softmax then runs over the k chosen.
    score is softmax (over the experts), sigmoid, sqrtsoftplus = sqrt(log(1 + exp(x))) (DeepSeek-V4), identity, or
    sparsemixer, which chooses by itself, see `sparsemixer`.
    groups: the experts lie in so many groups of equal size; only experts of the topk_groups best ones are chosen,
    others get `mask` for their choice. A group is as good as its best choice (max) or its two best together (top2).
    weigh: w is taken from scores, from choice (after bias and mask), or from logits as they are.
    given: the experts are known beforehand (hash routing), only w is computed; given becomes ids.
    gates = scale expert_scale[ids] w / max(n + eps, min_sum) with n the sum of w (renorm=sum), or
    (sum |w|^p)^(1/p) (renorm=norm); renorm=none does not divide.
    """
    if score == "sparsemixer":
        w, ids = sparsemixer(logits, k, jitter)
    else:
        scores = logits if order == "select_score" else apply_score(logits, score)
        choice = scores if bias is None else scores + bias
        if groups > 1:
            choice = _mask_expert_groups(choice, groups, topk_groups, group_score, mask)
        ids = torch.topk(choice, k, dim=1).indices if given is None else given
        w = {"scores": scores, "choice": choice, "logits": logits}[weigh].gather(1, ids)
        w = apply_score(w, score) if order == "select_score" else w
    if renorm != "none":
        n = w.sum(1, keepdim=True) if renorm == "sum" else w.abs().pow(p).sum(1, keepdim=True).pow(1 / p)
        w = w / (n + eps).clamp(min=min_sum)
    w = w * scale
    return w if expert_scale is None else w * expert_scale[ids], ids


def apply_score(x: torch.Tensor, score: str) -> torch.Tensor:
    """Return the scores of logits along the last axis."""
    match score:
        case "softmax":
            return torch.softmax(x, dim=-1)
        case "sigmoid":
            return torch.sigmoid(x)
        case "sqrtsoftplus":
            return torch.nn.functional.softplus(x).sqrt()
    return x


def _mask_expert_groups(choice: torch.Tensor, groups: int, kept: int, group_score: str, mask: float) -> torch.Tensor:
    grouped = choice.unflatten(1, (groups, -1))
    best = grouped.amax(2) if group_score == "max" else grouped.topk(2, dim=2).values.sum(2)
    outside = torch.ones_like(best, dtype=torch.bool).scatter(1, best.topk(kept, dim=1).indices, False)
    return grouped.masked_fill(outside[:, :, None], mask).flatten(1)


def sparsemixer(logits: torch.Tensor, k: int, jitter: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one expert after the other, as SparseMixer does without training noise (arXiv 2409.12136, PhiMoE).

    The largest logit m of those not chosen yet wins. Its weight is its softmax among those with
    (m - logit) / max(|logit|, m) at most 2 jitter.
    """
    left, gates, ids = logits, [], []
    for _ in range(k):
        best, chosen = left.max(1, keepdim=True)
        far = (best - logits) / torch.maximum(logits.abs(), best) > 2 * jitter
        gates.append(torch.softmax(left.masked_fill(far, -inf), 1).gather(1, chosen))
        ids.append(chosen)
        left = left.scatter(1, chosen, -inf)
    return torch.cat(gates, 1), torch.cat(ids, 1)
