"""What the step that quantizes a weight says: its method, and the name by which calibration knows the weight."""

from __future__ import annotations

from .recipes import WEIGHT, Recipe, steps_of


def method_of(recipe: Recipe) -> str:
    """Return the method by which a weight is quantized."""
    return option_of(recipe, "method")


def weight_of(recipe: Recipe) -> str:
    """Return the name of a weight that is quantized with its inputs, bound as its tensors are; nothing for others."""
    return next((str(s.attributes[WEIGHT]) for s in steps_of(recipe) if WEIGHT in s.attributes), "")


def option_of(recipe: Recipe, name: str) -> str:
    """Return an option of the step that quantizes a weight; rtn where it says nothing."""
    found = next((s for s in steps_of(recipe) if s.name == "quantize"), None)
    return str(found.attributes.get(name, "rtn")) if found else "rtn"
