"""Fuses a residual add and the norm that follows it into one op."""

from __future__ import annotations

from typing import Any

from ..compiler.errors import Refuse
from ..compiler.ir.module import Module
from ..compiler.ir.notes import Rewritten
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.rules import Match, apply_rules, rule


@rule(
    before="""
      %s = core.add(%x, %residual)
      %y = nn.rms_norm(%s, %w) {eps=Eps}
    """,
    after="%y, %s = nn.add_rms_norm(%x, %residual, %w) {eps=Eps}",
)
def add_into_rms_norm(m: Match, target: Any) -> None:
    """Norm a sum where it is made, and keep the sum for the next residual add."""
    if m.x.type != m.residual.type:
        raise Refuse(f"the add broadcasts {m.x.type} and {m.residual.type}", m.s)


RULES = (add_into_rms_norm,)


@pass_(reads="moe")
def fuse_norm(module: Module, target: Any) -> Rewritten:
    """Fuse a residual add and the RMSNorm behind it."""
    return apply_rules(module, target, RULES)
