"""Finds rotary position embedding in the arithmetic that an exported model spells it with."""

from __future__ import annotations

from typing import Any

from ..compiler.errors import Refuse
from ..compiler.ir import Module
from ..compiler.pipeline import pass_
from ..compiler.rewrite import Match, Why, apply, rule


@rule(
    before="""
      %first = core.slice(%x) {axis=3, start=0, stop=Half}
      %second = core.slice(%x) {axis=3, start=Half, stop=Stop}
      %turned = core.neg(%second)
      %rotated = core.concat(%turned, %first) {axis=3}
      %cos4 = core.reshape(%cos)
      %sin4 = core.reshape(%sin)
      %a = core.mul(%x, %cos4)
      %b = core.mul(%rotated, %sin4)
      %y = core.add(%a, %b)
    """,
    after="%y = nn.rope(%x, %cos, %sin)",
    shared=("cos4", "sin4"),
)
def halves_into_rope(m: Match, target: Any) -> None:
    """Read x cos + [-x2, x1] sin, with the halves x1 and x2 of each head, as one rotary embedding."""
    batch, _, length, width = m.x.type.shape
    if (m.Stop, 2 * m.Half) != (width, width):
        raise Refuse(f"the slices {m.Half} and {m.Half}:{m.Stop} are not the halves of {width}", m.first, m.second)
    for angles, broadcast in ((m.cos, m.cos4), (m.sin, m.sin4)):
        shape = angles.type.shape
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1:] != (length, width):
            raise Refuse(f"the angles are {angles.type}, not [batch or 1, {length}, {width}]", angles)
        if broadcast.type.shape != (shape[0], 1, *shape[1:]):
            raise Refuse(f"the angles are not the same for all heads: {broadcast.type}", broadcast)
    if m.cos.type != m.sin.type:
        raise Refuse(f"the cosines are {m.cos.type}, the sines {m.sin.type}", m.cos, m.sin)


RULES = (halves_into_rope,)


@pass_(reads="graph")
def raise_rope(module: Module, target: Any, why: Why) -> Module:
    """Raise the arithmetic of rotary embedding to nn.rope."""
    return apply(module, target, RULES, why)
