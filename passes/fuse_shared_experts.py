"""Fuses the linears of a gated feed-forward layer into one op: shared experts and dense layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..compiler.errors import Refuse
from ..compiler.ir.activation import KINDS
from ..compiler.ir.module import Module
from ..compiler.ir.notes import Rewritten
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.rules import Match, Rule, apply_rules, rule
from .fuse_dispatch import join_gate_and_up

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
        return join_gate_and_up(m, 0)

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
