"""Recipes of weights without what a calibration made of them."""

from __future__ import annotations

from collections.abc import Callable

from ..ir.recipes import Recipe, Step
from .steps.table import step


def without_quantization(recipe: Recipe) -> Recipe:
    """Return the recipe of a weight's own numbers: not quantized, and not scaled for that."""
    return _rebuild_recipe(recipe, lambda s: s.items[0] if s.name in ("quantize", "scale") else s)


def without_calibration(recipe: Recipe) -> Recipe:
    """Return the recipe of a weight without known inputs, as where its numbers are pseudo-random: rounded to nearest."""
    return _rebuild_recipe(
        recipe, lambda s: step("quantize", *s.items, to=s.attributes["to"]) if s.name == "quantize" else s
    )


def _rebuild_recipe(recipe: Recipe, change: Callable[[Step], Recipe]) -> Recipe:
    if not isinstance(recipe, Step):
        return recipe
    items = tuple(_rebuild_recipe(item, change) for item in recipe.items)
    return change(recipe if items == recipe.items else step(recipe.name, *items, **recipe.attributes))
