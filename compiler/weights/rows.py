"""Evaluate the parts of quantized weights for a box of rows, for writers that work a tile at a time."""

from __future__ import annotations

import itertools

import torch

from ..formats.format import Parts
from ..ir.recipes import Step
from .evaluate import RecipeEvaluator
from .sources.source import Box, WeightSource
from .steps.quantized import encode_parts, matrix_scale


def encode_rows(quantized: Step, source: WeightSource, box: Box, whole: torch.Tensor | None = None) -> Parts:
    """Return the parts of the rows in a box of the leading axes; MoecError for numbers that are not finite.

    Rows that share scales must be whole in the box. `whole` is what `tensor_scales` gives, where it is known.
    """
    columns = (0, quantized.type.sizes[-1])
    return encode_parts(quantized, (*box, columns), RecipeEvaluator(source), whole)


def tensor_scales(quantized: Step, source: WeightSource, limit_bytes: int) -> torch.Tensor:
    """Return the scale f32[...] of each matrix of a weight in a format that has one, reading a tile of rows at a time."""
    lead = quantized.type.sizes[:-2]
    found = [
        matrix_scale(quantized, index, RecipeEvaluator(source), limit_bytes)
        for index in itertools.product(*map(range, lead))
    ]
    return torch.tensor(found).reshape(lead)
