"""Fuses the linears of a gated feed-forward layer into one op: shared experts and dense layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..compiler.errors import Refuse
from ..compiler.ir.activation import KINDS
from ..compiler.ir.module import Module
from ..compiler.ir.notes import Rewritten
from ..compiler.ir.recipes import Recipe
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.editor import join_recipes_along
from ..compiler.rewrite.rules import Match, Rule, apply_rules, rule

GATED_KINDS = ("silu", "gelu", "gelu_tanh", "relu")
_TWO = """
      %g = core.linear(%x, %wg, %bg)
      %u = core.linear(%x, %wu, %bu)
"""
_HALVES = """
      %gu = core.linear(%x, %up, %up_bias)
      %g = core.slice(%gu) {axis=Axis, start=0, stop=Middle, step=1}
      %u = core.slice(%gu) {axis=Axis, start=Middle, stop=End, step=1}
"""
_OPTIONAL = ("bg", "bu", "up_bias", "down_bias")


def _rest_pattern(kind: str) -> str:
    return f"""
      {KINDS[kind]}
      %h = core.mul(%a, %u)
      %y = core.linear(%h, %down, %down_bias)
"""


def _two_linears(kind: str) -> Rule:
    after = f"%y = nn.gated_mlp(%x, %up, %down, %up_bias, %down_bias, _) {{act=gated({kind})}}"

    def guard(m: Match, target: Any) -> Mapping[str, Any]:
        """Put the rows of the gate's linear and of the other one into one weight, and read the layer as one op."""
        if m.wg.type != m.wu.type:
            raise Refuse(f"the weights are {m.wg.type} and {m.wu.type}", m.wg, m.wu)
        if (m.bg is None) != (m.bu is None):
            raise Refuse(f"only {m.bg or m.bu} has a bias of the two", m.g, m.u)
        bias = None if m.bg is None else join_recipes_along(_weight_recipe(m, "bg"), _weight_recipe(m, "bu"), axis=0)
        return {"up": join_recipes_along(_weight_recipe(m, "wg"), _weight_recipe(m, "wu"), axis=0), "up_bias": bias}

    guard.__name__ = f"two_linears_into_{kind}_mlp"
    return rule(before=_TWO + _rest_pattern(kind), after=after, optional=_OPTIONAL)(guard)


def _halves_rule(kind: str) -> Rule:
    after = f"%y = nn.gated_mlp(%x, %up, %down, %up_bias, %down_bias, _) {{act=gated({kind})}}"

    def guard(m: Match, target: Any) -> None:
        """Read a layer whose linear gives gate and other half together as one op."""
        shape = m.gu.type.shape
        if m.Axis != len(shape) - 1 or (2 * m.Middle, m.End) != (shape[-1], shape[-1]):
            raise Refuse(f"{m.Middle} and {m.Middle}:{m.End} of axis {m.Axis} are not the halves of {m.gu.type}", m.gu)

    guard.__name__ = f"halves_into_{kind}_mlp"
    return rule(before=_HALVES + _rest_pattern(kind), after=after, optional=_OPTIONAL)(guard)


def _weight_recipe(m: Match, name: str) -> Recipe:
    recipe = m.recipe(name)
    if recipe is None:
        raise Refuse(f"{m[name]} is not a weight, it cannot be put beside another beforehand", m[name])
    return recipe


@rule(
    before="""
      %y = nn.gated_mlp(%x, %up, %down, %up_bias, %down_bias, _) {act=Act}
      %s = core.linear(%x, %gate, _)
      %o = core.sigmoid(%s)
      %z = core.mul(%o, %y)
    """,
    after="%z = nn.gated_mlp(%x, %up, %down, %up_bias, %down_bias, %gate) {act=Act}",
    optional=("up_bias", "down_bias"),
)
def sigmoid_gate_into_mlp(m: Match, target: Any) -> None:
    """Multiply the layer's result by the sigmoid of its own gate inside the op."""
    if m.gate.type.shape[0] != 1:
        raise Refuse(f"the gate {m.gate.type} gives {m.gate.type.shape[0]} numbers a token, not one", m.gate)


RULES = (*map(_two_linears, GATED_KINDS), *map(_halves_rule, GATED_KINDS), sigmoid_gate_into_mlp)


@pass_(reads="moe")
def fuse_shared_experts(module: Module, target: Any) -> Rewritten:
    """Fuse gated feed-forward layers spelled as linears, with gate and up in one weight."""
    return apply_rules(module, target, RULES)
