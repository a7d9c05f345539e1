"""Replaces the arithmetic of RMSNorm, as exported models have it, by nn.rms_norm."""

from __future__ import annotations

from typing import Any

from ..compiler.errors import Refuse
from ..compiler.ir.module import Module
from ..compiler.ir.notes import Rewritten
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.rules import Match, apply_rules, rule


@rule(
    before="""
      %p = core.pow(%x, %two)
      %m = core.mean(%p) {axes=Axes, keepdim=true}
      %e = core.add(%m, %eps)
      %r = core.rsqrt(%e)
      %n = core.mul(%x, %r)
      %y = core.mul(%w, %n)
    """,
    after="%y = nn.rms_norm(%x, %w) {eps=Eps}",
)
def power_into_rms_norm(m: Match, target: Any) -> dict[str, float]:
    """Read x / sqrt(mean(x ** 2) + eps) * w as one RMSNorm."""
    if m.number("two") != 2:
        raise Refuse("the exponent is not 2", m.two)
    return _norm_epsilon(m)


@rule(
    before="""
      %p = core.mul(%x, %x)
      %m = core.mean(%p) {axes=Axes, keepdim=true}
      %e = core.add(%m, %eps)
      %r = core.rsqrt(%e)
      %n = core.mul(%x, %r)
      %y = core.mul(%w, %n)
    """,
    after="%y = nn.rms_norm(%x, %w) {eps=Eps}",
)
def square_into_rms_norm(m: Match, target: Any) -> dict[str, float]:
    """Read x / sqrt(mean(x x) + eps) * w as one RMSNorm."""
    return _norm_epsilon(m)


def _norm_epsilon(m: Match) -> dict[str, float]:
    """Return the epsilon; refuse what is no norm over the last axis with one weight for each of its elements."""
    last = len(m.x.type.shape) - 1
    if m.Axes != (last,):
        raise Refuse(f"the mean is over axes {list(m.Axes)}, not over the last one", m.m)
    if m.w.type.shape != m.x.type.shape[-1:]:
        raise Refuse(f"the weight is {m.w.type}, not one number for each of the {m.x.type.shape[-1]} elements", m.w)
    eps = m.number("eps")
    if eps is None:
        raise Refuse("the epsilon is not a constant", m.eps)
    return {"Eps": float(eps)}


RULES = (power_into_rms_norm, square_into_rms_norm)


@pass_(reads="graph")
def raise_norm(module: Module, target: Any) -> Rewritten:
    """Raise the arithmetic of RMSNorm to nn.rms_norm."""
    return apply_rules(module, target, RULES)
