"""Makes one op of routed experts that are spelled out: no token is copied once for every expert it goes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..compiler.draft import join
from ..compiler.errors import Refuse
from ..compiler.ir import Module
from ..compiler.pipeline import pass_
from ..compiler.recipes import Recipe
from ..compiler.rewrite import Match, Rule, Why, apply, rule

_DISPATCH = """
      %rows, %offsets, %perm = moe.dispatch(%x, %ids)
"""
_COMBINE = """
      %o = moe.grouped_linear(%h, %down, %offsets, %down_bias)
      %y = moe.combine(%o, %gates, %perm)
"""
_OPTIONAL = ("bg", "bu", "up_bias", "down_bias")

# where the gate %g and the other half %u come from: two weights, or one with the halves one behind the other or in turn
_HALVES = {
    "apart": """
      %g = moe.grouped_linear(%rows, %wg, %offsets, %bg)
      %u = moe.grouped_linear(%rows, %wu, %offsets, %bu)
""",
    "concat": """
      %gu = moe.grouped_linear(%rows, %up, %offsets, %up_bias)
      %g = core.slice(%gu) {axis=1, start=0, stop=Middle, step=1}
      %u = core.slice(%gu) {axis=1, start=Middle, stop=End, step=1}
""",
    "interleaved": """
      %gu = moe.grouped_linear(%rows, %up, %offsets, %up_bias)
      %g = core.slice(%gu) {axis=1, start=0, stop=End, step=2}
      %u = core.slice(%gu) {axis=1, start=1, stop=End, step=2}
""",
}
_ACTS = {
    "silu": "%a = core.silu(%g)",
    "gelu": "%a = core.gelu(%g) {approximate=none}",
    "gelu_tanh": "%a = core.gelu(%g) {approximate=tanh}",
    "relu": "%a = core.relu(%g)",
}
_CLAMPED = """
      %gc = core.clamp(%g) {min=Low, max=Limit}
      %uc = core.clamp(%u) {min=Lower, max=Upper}
"""
# what makes %h of %g and %u, and the attributes that say so
_GATED = {
    **{act: (f"{text}\n      %h = core.mul(%a, %u)\n", f"act={act}") for act, text in _ACTS.items()},
    "clamped_silu": (
        _CLAMPED + "      %a = core.silu(%gc)\n      %h = core.mul(%a, %uc)\n", "act=silu, limit=Limit",
    ),
    "gpt_oss": (
        _CLAMPED + """
      %s = core.mul(%gc, %alpha)
      %t = core.sigmoid(%s)
      %a = core.mul(%gc, %t)
      %v = core.add(%uc, %beta)
      %h = core.mul(%v, %a)
""", "act=silu, alpha=Alpha, beta=Beta, limit=Limit",
    ),
}  # fmt: skip
_PLAIN = {
    **{act: f"{text.replace('%a', '%h')}\n" for act, text in _ACTS.items()},
    "relu2": "%a = core.relu(%g)\n      %h = core.mul(%a, %a)\n",
}


def _gated(halves: str, act: str) -> Rule:
    middle, attrs = _GATED[act]
    layout = "interleaved" if halves == "interleaved" else "concat"
    operands = "%x, %ids, %gates, %up, %down, %up_bias, %down_bias"
    after = f"%y = moe.experts({operands}) {{{attrs}, layout={layout}}}"

    def guard(m: Match, target: Any) -> Mapping[str, Any]:
        """Read tokens where they are and add results where they belong, instead of copying a row for each expert."""
        bindings: dict[str, Any] = _one_weight(m) if halves == "apart" else {}
        if halves != "apart":
            _check_halves(m, halves)
        if "Limit" in m.attrs:
            _check_limits(m)
        if act == "gpt_oss":
            bindings |= {"Alpha": _number(m, "alpha"), "Beta": _number(m, "beta")}
        return bindings

    guard.__name__ = f"{halves}_{act}_into_experts"
    before = f"{_DISPATCH}{_HALVES[halves]}      {middle}{_COMBINE}"
    return rule(before=before, after=after, optional=_OPTIONAL)(guard)


def _plain(act: str) -> Rule:
    operands = "%x, %ids, %gates, %up, %down, %up_bias, %down_bias"

    def guard(m: Match, target: Any) -> None:
        """Read experts without a gate as one op."""

    guard.__name__ = f"plain_{act}_into_experts"
    before = f"{_DISPATCH}      %g = moe.grouped_linear(%rows, %up, %offsets, %up_bias)\n      {_PLAIN[act]}{_COMBINE}"
    after = f"%y = moe.experts({operands}) {{act={act}, gated=false}}"
    return rule(before=before, after=after, optional=_OPTIONAL)(guard)


def _one_weight(m: Match) -> dict[str, Any]:
    """Return the weight with the rows of the gate and those of the other half behind them, and its bias."""
    if m.wg.type != m.wu.type:
        raise Refuse(f"the weights are {m.wg.type} and {m.wu.type}", m.wg, m.wu)
    if (m.bg is None) != (m.bu is None):
        raise Refuse(f"only {m.bg or m.bu} has a bias of the two", m.g, m.u)
    bias = None if m.bg is None else join(_weight(m, "bg"), _weight(m, "bu"), axis=1)
    return {"up": join(_weight(m, "wg"), _weight(m, "wu"), axis=1), "up_bias": bias}


def _weight(m: Match, name: str) -> Recipe:
    recipe = m.recipe(name)
    if recipe is None:
        raise Refuse(f"{m[name]} is not a weight, it cannot be put beside another beforehand", m[name])
    return recipe


def _check_halves(m: Match, layout: str) -> None:
    width = m.gu.type.shape[1]
    if m.End != width or (layout == "concat" and 2 * m.Middle != width):
        raise Refuse(f"{m.g} and {m.u} are not the halves of {m.gu.type}", m.gu)


def _check_limits(m: Match) -> None:
    if m.Low != float("-inf") or (m.Lower, m.Upper) != (-m.Limit, m.Limit):
        limits = f"{m.Low}..{m.Limit} and {m.Lower}..{m.Upper}"
        raise Refuse(f"the halves are clamped to {limits}, not to -inf..limit and -limit..limit", m.gc, m.uc)


def _number(m: Match, name: str) -> float:
    number = m.number(name)
    if number is None:
        raise Refuse(f"{m[name]} is not a constant", m[name])
    return float(number)


RULES = (*(_gated(halves, act) for halves in _HALVES for act in _GATED), *map(_plain, _PLAIN))


@pass_(reads="moe")
def fuse_dispatch(module: Module, target: Any, why: Why) -> Module:
    """Fuse dispatch, grouped linears, activation and weighted sum into moe.experts, without a copy of the tokens."""
    return apply(module, target, RULES, why)
