"""Replaces the arithmetic of rotary position embedding, as exported models have it, by nn.rope."""

from __future__ import annotations

from typing import Any

from ..compiler.errors import Refuse
from ..compiler.ir.dims import Size
from ..compiler.ir.module import Module
from ..compiler.ir.notes import Rewritten
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.rules import Match, apply_rules, rule


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
    width = m.x.type.shape[3]
    if (m.Stop, 2 * m.Half) != (width, width):
        raise Refuse(f"the slices {m.Half} and {m.Half}:{m.Stop} are not the halves of {width}", m.first, m.second)
    _check_angles(m, width)


# the other spelling: angles given once, for one half, and the two halves of the result put together at the end
_HALVES = """
      %cos4 = core.reshape(%cos)
      %sin4 = core.reshape(%sin)
      %a = core.mul(%first, %cos4)
      %b = core.mul(%second, %sin4)
      %left = core.sub(%a, %b)
      %c = core.mul(%second, %cos4)
      %d = core.mul(%first, %sin4)
      %right = core.add(%c, %d)
      %y = core.concat(%left, %right) {axis=3}
"""
_DOUBLE = """
      %cos2 = core.concat(%cos, %cos) {axis=2}
      %sin2 = core.concat(%sin, %sin) {axis=2}
"""


@rule(
    before="""
      %first = core.slice(%x) {axis=3, start=0, stop=Half, step=1}
      %second = core.slice(%x) {axis=3, start=Half, stop=Stop, step=1}"""
    + _HALVES,
    after=_DOUBLE + "%y = nn.rope(%x, %cos2, %sin2)",
    shared=("cos4", "sin4"),
)
def split_halves_into_rope(m: Match, target: Any) -> None:
    """Read [x1 cos - x2 sin, x2 cos + x1 sin], with the halves x1 and x2, as one rotary embedding."""
    if (m.Stop, 2 * m.Half) != (m.x.type.shape[3],) * 2:
        raise Refuse(f"the slices {m.Half} and {m.Half}:{m.Stop} are not the halves of {m.x.type.shape[3]}", m.first)
    _check_half_angles(m)


@rule(
    before="""
      %first = core.slice(%x) {axis=3, start=0, stop=Stop, step=2}
      %second = core.slice(%x) {axis=3, start=1, stop=Stop, step=2}"""
    + _HALVES,
    after="""
      %first = core.slice(%x) {axis=3, start=0, stop=Stop, step=2}
      %second = core.slice(%x) {axis=3, start=1, stop=Stop, step=2}
      %sorted = core.concat(%first, %second) {axis=3}"""
    + _DOUBLE
    + "%y = nn.rope(%sorted, %cos2, %sin2)",
    shared=("cos4", "sin4"),
)
def pairs_into_rope(m: Match, target: Any) -> None:
    """Read [x1 cos - x2 sin, x2 cos + x1 sin], with x1 the even and x2 the odd elements, as sorting and one embedding."""
    if m.Stop != m.x.type.shape[3] or m.Stop % 2:
        raise Refuse(f"the slices end at {m.Stop}, not at {m.x.type.shape[3]}", m.first, m.second)
    _check_half_angles(m)


def _check_half_angles(m: Match) -> None:
    _check_angles(m, m.x.type.shape[3] / 2)


def _check_angles(m: Match, width: Size) -> None:
    """Refuse angles that are not one row of `width` numbers for each token, the same for all heads."""
    batch, _, length, _ = m.x.type.shape
    for angles, broadcast in ((m.cos, m.cos4), (m.sin, m.sin4)):
        shape = angles.type.shape
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1:] != (length, width):
            raise Refuse(f"the angles are {angles.type}, not [batch or 1, {length}, {width}]", angles)
        if broadcast.type.shape != (shape[0], 1, *shape[1:]):
            raise Refuse(f"the angles are not the same for all heads: {broadcast.type}", broadcast)
    if m.cos.type != m.sin.type:
        raise Refuse(f"the cosines are {m.cos.type}, the sines {m.sin.type}", m.cos, m.sin)


RULES = (halves_into_rope, split_halves_into_rope, pairs_into_rope)


@pass_(reads="graph")
def raise_rope(module: Module, target: Any) -> Rewritten:
    """Raise the arithmetic of rotary embedding to nn.rope."""
    return apply_rules(module, target, RULES)
