"""Looks back from values of a graph to what they were computed of."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from ...ir.dims import Size
from ...ir.module import Op, Value
from .graph import OnnxGraph

VIEWS = ("core.expand", "core.reshape")


def number_of(g: OnnxGraph, value: Value) -> float | None:
    """Return the number that a value holds everywhere, if it is a constant."""
    made = g.producer(value)
    if made is None or made.name not in ("core.constant", "core.full"):
        return None
    found = made.attributes["value"]
    return float(found) if isinstance(found, (int, float)) else None


def origin_of(g: OnnxGraph, value: Value, through: Sequence[str]) -> tuple[Value, Op | None]:
    """Return the value, and the op that makes it, before ops of these names."""
    made = g.producer(value)
    while made is not None and made.name in through:
        value = made.inputs[0]
        made = g.producer(value)
    return value, made


def count_of(g: OnnxGraph, value: Value) -> tuple[Size, Size] | None:
    """Return where a count in steps of 1 begins and how long it is; None for another value."""
    _, made = origin_of(g, value, (*VIEWS, "core.cast"))
    if made is None:
        return None
    if made.name == "core.iota":
        return sympy.Integer(0), made.attributes.size("size")
    if made.name != "core.add":
        return None
    for counted, start in (made.inputs, made.inputs[::-1]):
        found, first = count_of(g, counted), _size_of(g, start)
        if found is not None and first is not None:
            return sympy.expand(found[0] + first), found[1]
    return None


def _size_of(g: OnnxGraph, value: Value) -> Size | None:
    """Return the size that a scalar holds, as a graph computes it: one number of a count."""
    if value.type.elements != 1:
        return None
    _, made = origin_of(g, value, (*VIEWS, "core.cast"))
    if made is None or made.name != "core.slice":
        number = number_of(g, value)
        return None if number is None else sympy.Integer(int(number))
    counted = count_of(g, made.inputs[0])
    return None if counted is None else sympy.expand(counted[0] + made.attributes.size("start"))
