"""The kernel of moe.route: scores, the choice of k experts by groups or over all, and the weights of the chosen.

A tile is t tokens by all experts. The experts of a group lie in a run of columns that is padded to a power of two, so a
group is an axis of a three-axis tile, whatever its size; columns that are no expert are never chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from ....compiler.errors import MoecError
from ..tile.builder import Builder, Layout
from ..tile.tiles import Program
from .norm import power_of_two


@dataclass(frozen=True)
class Route:
    """moe.route with its attributes; `bias`, `given` and `expert_scale` say which operands there are."""

    experts: int
    k: int
    score: str = "softmax"
    order: str = "score_select"
    weigh: str = "scores"
    renorm: str = "none"
    eps: float = 0.0
    min_sum: float = 0.0
    p: float = 1.0
    scale: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    mask: float = -inf
    jitter: float = 0.0
    bias: bool = False
    given: bool = False
    expert_scale: bool = False

    @property
    def size(self) -> int:
        """Experts in a group."""
        return self.experts // self.groups

    @property
    def wide(self) -> tuple[int, int]:
        """Groups and experts in a group as a tile has them."""
        return power_of_two(self.groups), power_of_two(self.size)


def route_kernel(p: Route, rows: int, layout: Layout) -> Program:
    """Return gates f32 [T, k] and ids i32 [T, k] of logits f32 [T, E], `rows` tokens for each point of the grid.

    Of equal numbers the lowest expert is chosen first. MoecError for a score or a renorm that moe.route does not have.
    """
    if p.score not in _SCORES and p.score not in ("softmax", "sparsemixer"):
        raise MoecError(f"moe.route has no score={p.score}")
    if p.renorm not in ("none", "sum", "norm") or p.group_score not in ("max", "top2"):
        raise MoecError(f"moe.route has no renorm={p.renorm} or group_score={p.group_score}")
    b = Builder("route", layout, "ids[t] = the k experts of token t, gates[t] = their weights")
    b.scalar("T")
    b.grid("tile", f"cdiv(T, {rows})")
    b.tensor("logits", "f32", "T", p.experts)
    for name, there in (("bias", p.bias), ("expert_scale", p.expert_scale)):
        if there:
            b.tensor(name, "f32", p.experts, role="weight")
    if p.given:
        b.tensor("given", "i32", "T", p.k)
    b.tensor("gates", "f32", "T", p.k, role="output")
    b.tensor("ids", "i32", "T", p.k, role="output")
    _add_logits(b, p, rows)
    if p.score == "sparsemixer":
        _add_sparsemixer(b, p, rows)
    else:
        _add_choice(b, p, rows)
        _add_selection(b, p, rows)
    _add_gates(b, p, rows)
    at = ["t[:, None]", "choice_number[None, :]"]
    b.store("gates", at, "w", "chosen_live")
    b.store("ids", at, "chosen", "chosen_live")
    return b.program()


_SCORES = {
    "sigmoid": "sigmoid({0})",
    "sqrtsoftplus": "sqrt(maximum({0}, 0.0) + log(1.0 + exp(-abs({0}))))",
    "identity": "{0}",
}


def _add_logits(b: Builder, p: Route, rows: int) -> None:
    """Add `logit` [rows, columns], the expert of each column, and what is kept of the chosen ones."""
    groups, size = p.wide
    wide, kept = groups * size, power_of_two(p.k)
    b.let("t", f"tile * {rows} + arange({rows})")
    b.let("live", "t < T")
    b.let("column", f"arange({wide})")
    b.let("expert", f"column // {size} * {p.size} + column % {size}")
    b.let("is_expert", f"(column // {size} < {p.groups}) & (column % {size} < {p.size})")
    mask = "live[:, None] & is_expert[None, :]"
    b.load("read", "logits", ["t[:, None]", "expert[None, :]"], mask, shape=(rows, wide))
    b.let("logit", "where(is_expert[None, :], read, -inf)", (rows, wide), "f32")
    b.let("choice_number", f"arange({kept})")
    b.let("chosen_live", f"live[:, None] & (choice_number < {p.k})[None, :]", (rows, kept), "bool")
    b.let("chosen", f'full({rows}, {kept}, 0, "i32")', (rows, kept), "i32")
    b.let("w", f'full({rows}, {kept}, 0.0, "f32")', (rows, kept), "f32")


def _score_text(b: Builder, name: str, score: str, there: str, shape: tuple[int, int]) -> str:
    """Return the expression of the scores along the last axis; softmax is taken over the columns that are `there`."""
    if score != "softmax":
        return _SCORES[score].format(name)
    b.let("largest", f"max(where({there}, {name}, -inf), 1)")
    b.let("exponential", f"where({there}, exp({name} - largest[:, None]), 0.0)", shape, "f32")
    return "exponential / sum(exponential, 1)[:, None]"


def _add_choice(b: Builder, p: Route, rows: int) -> None:
    """Add `left` [rows, columns]: what the choice is made by, -inf where there is no expert; and `source`, the weights."""
    groups, size = p.wide
    shape = (rows, groups * size)
    if p.order == "select_score":
        b.let("scores", "logit", shape, "f32")
    else:
        b.let("scores", _score_text(b, "logit", p.score, "is_expert[None, :]", shape), shape, "f32")
    text = "scores"
    if p.bias:
        b.load("bias_row", "bias", ["expert"], "is_expert")
        text = "scores + bias_row[None, :]"
    b.let("left", f"where(is_expert[None, :], {text}, -inf)", shape, "f32")
    if p.groups > 1:
        _add_group_mask(b, p, rows)
    b.let("source", {"scores": "scores", "choice": "left", "logits": "logit"}[p.weigh], shape, "f32")


def _add_group_mask(b: Builder, p: Route, rows: int) -> None:
    """Give `mask` to the experts outside of the best groups."""
    groups, size = p.wide
    b.let("grouped", f"reshape(left, {rows}, {groups}, {size})", (rows, groups, size), "f32")
    b.let("best", "max(grouped, 2)", (rows, groups), "f32")
    if p.group_score == "top2":
        b.let("first_of", "argmax(grouped, 2)", (rows, groups), "i32")
        others = f"where(arange({size})[None, None, :] == first_of[:, :, None], -inf, grouped)"
        b.let("best", f"best + max({others}, 2)", (rows, groups), "f32")
    b.let("best", f"where((arange({groups}) < {p.groups})[None, :], best, -inf)", (rows, groups), "f32")
    b.let("allowed", f'full({rows}, {groups}, 0, "i32")', (rows, groups), "i32")
    with b.loop("g", 0, p.topk_groups, 1):
        b.let("top_group", "argmax(best, 1)")
        b.let("is_top", f"arange({groups})[None, :] == top_group[:, None]", (rows, groups), "bool")
        b.let("allowed", "where(is_top, 1, allowed)", (rows, groups), "i32")
        b.let("best", "where(is_top, -inf, best)", (rows, groups), "f32")
    mask = "-inf" if p.mask == -inf else str(p.mask)
    b.let("limited", f"where((allowed > 0)[:, :, None], grouped, {mask})", (rows, groups, size), "f32")
    wide = groups * size
    b.let("left", f"where(is_expert[None, :], reshape(limited, {rows}, {wide}), -inf)", (rows, wide), "f32")


def _add_selection(b: Builder, p: Route, rows: int) -> None:
    """Add the loop that chooses one expert after the other, or takes the given ones, and takes their weights."""
    groups, size = p.wide
    shape, kept = (rows, groups * size), (rows, power_of_two(p.k))
    with b.loop("i", 0, p.k, 1):
        if p.given:
            b.load("found", "given", ["t", "i"], "live", other=0)
            b.let("hit", "(expert[None, :] == found[:, None]) & is_expert[None, :]", shape, "bool")
        else:
            b.let("top", "argmax(left, 1)")
            b.let("hit", "column[None, :] == top[:, None]", shape, "bool")
            b.let("found", "sum(where(hit, expert[None, :], 0), 1)")
        b.let("here", "(choice_number == i)[None, :]", (1, kept[1]), "bool")
        b.let("w", "where(here, sum(where(hit, source, 0.0), 1)[:, None], w)", kept, "f32")
        b.let("chosen", "where(here, found[:, None], chosen)", kept, "i32")
        if not p.given:
            b.let("left", "where(hit, -inf, left)", shape, "f32")


def _add_sparsemixer(b: Builder, p: Route, rows: int) -> None:
    """Add the choice of sparsemixer: an expert's weight is its softmax among those that are not far behind it.

    The chosen one is the largest of those left, so that its own exponential is 1.
    """
    shape, kept = (rows, p.wide[0] * p.wide[1]), (rows, power_of_two(p.k))
    b.let("left", "logit", shape, "f32")
    with b.loop("i", 0, p.k, 1):
        b.let("best", "max(left, 1)")
        b.let("top", "argmax(left, 1)")
        b.let("hit", "column[None, :] == top[:, None]", shape, "bool")
        b.let("found", "sum(where(hit, expert[None, :], 0), 1)")
        b.let("reach", "maximum(abs(read), best[:, None])", shape, "f32")
        behind = "(best[:, None] - read) / where(reach == 0, 1.0, reach)"
        near = f"is_expert[None, :] & ({behind} <= {2 * p.jitter})"
        b.let("exponential", f"where({near}, exp(left - best[:, None]), 0.0)", shape, "f32")
        b.let("here", "(choice_number == i)[None, :]", (1, kept[1]), "bool")
        b.let("w", "where(here, (1.0 / sum(exponential, 1))[:, None], w)", kept, "f32")
        b.let("chosen", "where(here, found[:, None], chosen)", kept, "i32")
        b.let("left", "where(hit, -inf, left)", shape, "f32")


def _add_gates(b: Builder, p: Route, rows: int) -> None:
    """Turn the weights of the chosen into gates."""
    kept = (rows, power_of_two(p.k))
    if p.order == "select_score" and p.score != "sparsemixer":
        b.let("w", _score_text(b, "w", p.score, f"(choice_number < {p.k})[None, :]", kept), kept, "f32")
    if p.renorm != "none":
        size = "w" if p.renorm == "sum" else "abs(w)"
        if p.renorm == "norm" and p.p != 1:
            size = f"exp({p.p} * log(abs(w)))"
        b.let("whole", f"sum(where((choice_number < {p.k})[None, :], {size}, 0.0), 1)")
        if p.renorm == "norm" and p.p != 1:
            b.let("whole", f"exp(log(whole) / {p.p})")
        divisor = f"where(live, maximum(whole + {p.eps}, {p.min_sum}), 1.0)"
        b.let("w", f"w / {divisor}[:, None]", kept, "f32")
    text = "w" if p.scale == 1 else f"w * {p.scale}"
    if p.expert_scale:
        b.load("factor", "expert_scale", ["chosen"], "chosen_live", shape=kept)
        text += " * factor"
    if text != "w":
        b.let("w", text, kept, "f32")
