"""Recipes put together: those that differ in one number of their names only are written as one, with {0..63} in its names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Sequence
from dataclasses import replace

from ..ir.recipes import Recipe, Step, Tensor
from ..ir.types import Attr
from .steps.table import step

FLOATS = {"f16", "bf16", "f32", "f64"}


def join_recipes(name: str, recipes: Sequence[Recipe], **attributes: Attr) -> Step:
    """Return a step that joins recipes (`stack`, `concat`, `interleave`), which may be stored in different floats."""
    return step(name, *gather_range(with_common_dtype(recipes)), **attributes)


def with_common_dtype(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Return recipes that can be joined: floats of several dtypes become f32, which all arithmetic is done in."""
    dtypes = {r.type.dtype for r in recipes}
    if len(dtypes) == 1 or not dtypes <= FLOATS:
        return list(recipes)
    return [r if r.type.dtype == "f32" else step("cast", r, to="f32") for r in recipes]


def gather_range(recipes: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """Return the recipes with every run of those that are alike but for one number that counts up as one template."""
    found: list[Recipe] = []
    for key, run in itertools.groupby(recipes, _shape_of):
        own = list(run)
        template = _template_of_range(own) if len(own) > 1 and key is not None else None
        found += [template] if template is not None else own
    return tuple(found)


def _shape_of(recipe: Recipe) -> Hashable:
    """Return what recipes have in common that may be one template: everything but the numbers in their names."""
    match recipe:
        case Tensor():
            return (re.sub(r"\d+", "#", recipe.name), recipe.type)
        case Step() if not recipe.spreads:
            return (recipe.name, recipe.attrs, recipe.type, tuple(map(_shape_of, recipe.items)))
    return None


def _template_of_range(recipes: Sequence[Recipe]) -> Recipe | None:
    first = recipes[0]
    if isinstance(first, Tensor):
        if any(not isinstance(r, Tensor) or r.type != first.type for r in recipes):
            return None
        name = _name_range([r.name for r in recipes if isinstance(r, Tensor)])
        return Tensor(name, first.type) if name else None
    if not isinstance(first, Step):
        return None
    if any(
        not isinstance(r, Step) or (r.name, r.attrs, r.type) != (first.name, first.attrs, first.type) for r in recipes
    ):
        return None
    if first.spreads:
        return None
    columns = zip(*(r.items for r in recipes if isinstance(r, Step)), strict=True)
    items = [_template_of_range(column) for column in columns]
    if any(item is None for item in items):
        return None
    return replace(first, items=tuple(i for i in items if i is not None))


def _name_range(names: Sequence[str]) -> str | None:
    parts = [n.split(".") for n in names]
    if len({len(p) for p in parts}) != 1:
        return None
    differing = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    if len(differing) != 1:
        return None
    numbers = [p[differing[0]] for p in parts]
    if not numbers[0].isdigit() or numbers != [str(int(numbers[0]) + i) for i in range(len(numbers))]:
        return None
    parts[0][differing[0]] = f"{{{numbers[0]}..{numbers[-1]}}}"
    return ".".join(parts[0])
