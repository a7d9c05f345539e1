"""The steps that there are, and `step`, which makes one on recipes."""

from __future__ import annotations

from collections.abc import Mapping

from ...ir.recipes import Recipe, Step, range_length
from ...ir.types import Attr, Attrs, make_attrs
from . import codes, quantized, shapes
from .declare import WeightStep

STEPS: Mapping[str, WeightStep] = {s.name: s for s in (*shapes.STEPS, *quantized.STEPS, *codes.STEPS)}


def step(name: str, *items: Recipe, **attributes: Attr) -> Step:
    """Return a step with its type inferred; ValueError says what does not fit."""
    if name not in STEPS:
        raise ValueError(f"there is no weight step {name!r}; there are {', '.join(sorted(STEPS))}")
    attrs, declared = make_attrs(attributes), STEPS[name]
    types = [item.type for item in items]
    if declared.spreads:
        types = [item.type for item in items for _ in range(range_length(item))]
    return Step(name, tuple(items), attrs, declared.infer(types, Attrs(attrs)), declared.spreads)
