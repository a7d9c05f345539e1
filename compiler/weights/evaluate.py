"""Evaluate a recipe for a box of its result, reading only what the box needs.

`tile_boxes` gives the boxes whose bytes, one after the other, are the tensor's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..ir.dtypes import DTYPES, torch_dtype
from ..ir.recipes import Literal, Recipe, Step, Tensor
from .sources.source import Box, ElsewhereSource, WeightSource, check_box, full_box, slice_box
from .steps.declare import box_sizes
from .steps.table import STEPS

_FRACTION_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@dataclass(frozen=True)
class RecipeEvaluator:
    """Evaluates recipes on a source; every step is given it for its items."""

    source: WeightSource

    def __call__(self, item: Recipe, part: Box) -> torch.Tensor:
        """Return what a recipe makes in a box."""
        shape = box_sizes(part)
        if 0 in shape:
            return torch.empty(shape, dtype=torch_dtype(item.type.dtype))
        match item:
            case Tensor():
                return self.source.read(item.name, part, item.type)
            case Literal():
                return _literal_box(item, part)
        return STEPS[item.name].evaluate(item, part, self)


def evaluate_recipe(recipe: Recipe, source: WeightSource, box: Box | None = None) -> torch.Tensor:
    """Return what a bound recipe (absolute names, see `recipes.bind`) makes, or the part of it in `box`.

    The result is contiguous (strides as of a new tensor), with the dtype of the recipe and the shape of the box; it
    may share memory with the source and must not be written to. Raises MoecError for tensors that the source lacks
    or holds with another type.
    """
    if isinstance(source, ElsewhereSource) and isinstance(recipe, Step):
        found: torch.Tensor = source.run(evaluate_recipe, recipe, box)
        return row_major(found)
    sizes = recipe.type.sizes
    return row_major(RecipeEvaluator(source)(recipe, full_box(sizes) if box is None else check_box(box, sizes)))


def row_major(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with its elements in row-major order and the strides of a new tensor.

    An axis of size 1 may keep any stride in a "contiguous" tensor, and then torch refuses to view it as bytes.
    """
    result = tensor.contiguous()
    return result.as_strided(result.shape, [math.prod(result.shape[k + 1 :]) for k in range(result.dim())])


def _literal_box(literal: Literal, box: Box) -> torch.Tensor:
    dtype = DTYPES[literal.type.dtype].torch
    wide = torch.tensor(literal.values, dtype=torch.float64 if dtype.is_floating_point else torch.int64)
    numbers = wide.to(dtype)
    if dtype in _FRACTION_BITS and bool(wide.isnan().any()):  # a conversion may give any NaN for one
        numbers = torch.where(wide.isnan(), _nans_with_payload(wide, dtype), numbers)
    return slice_box(numbers.reshape(literal.type.sizes), box)


def _nans_with_payload(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return NaNs with the sign and the first bits of the fraction of f64[N], in another dtype."""
    size, kept = dtype.itemsize * 8, _FRACTION_BITS[dtype]
    bits = wide.view(torch.int64)
    exponent = ((1 << (size - 1 - kept)) - 1) << kept
    fraction = (bits >> (52 - kept)) & ((1 << kept) - 1)
    fraction = torch.where(fraction == 0, 1 << (kept - 1), fraction)  # 0 would be an infinity
    found = ((bits < 0).long() << (size - 1)) | exponent | fraction
    return found.to({16: torch.int16, 32: torch.int32, 64: torch.int64}[size]).view(dtype)
