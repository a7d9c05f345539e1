"""Weights in a shorter float: the recipe that makes it from what the checkpoint holds, without a detour through f32."""

from __future__ import annotations

from ..ir.recipes import Recipe, Step
from .steps.table import STEPS, step

# dtype -> the dtypes whose numbers it has all of
_HOLDS = {"bf16": ("bf16", "f8e4m3", "f8e5m2", "f8e8m0"), "f16": ("f16", "f8e4m3", "f8e5m2")}


def demoted_recipe(recipe: Recipe, to: str = "bf16") -> tuple[Recipe, bool]:
    """Return the recipe of the same weight in a shorter float, and whether its numbers are all the same there.

    A cast from what the checkpoint holds falls away where that is already the dtype; otherwise numbers are rounded.
    """
    if recipe.type.dtype == to:
        return recipe, True
    if isinstance(recipe, Step):
        if recipe.name == "cast" and recipe.attributes["to"] == "f32":
            return demoted_recipe(recipe.items[0], to)
        if STEPS[recipe.name].moves:
            items, exact = zip(*(demoted_recipe(item, to) for item in recipe.items), strict=True)
            return step(recipe.name, *items, **recipe.attributes), all(exact)
    return step("cast", recipe, to=to), recipe.type.dtype in _HOLDS[to]


def is_demotion(recipe: Step) -> bool:
    """Return whether a step rounds floats to a dtype that has not all of them."""
    held = _HOLDS.get(recipe.type.dtype)
    return recipe.name == "cast" and held is not None and recipe.items[0].type.dtype not in held
