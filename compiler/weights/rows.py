"""Evaluate the parts of quantized weights for a box of rows, for writers that work a tile at a time."""

from __future__ import annotations

import itertools
from functools import partial

import torch

from ..formats.format import Parts
from ..ir.recipes import Step
from .evaluate import RecipeEvaluator
from .sources.source import Box, ElsewhereSource, WeightSource
from .steps.quantized import encode_parts, matrix_scale


def encode_rows(quantized: Step, source: WeightSource, box: Box, whole: torch.Tensor | None = None) -> Parts:
    """Return the parts of the rows in a box of the leading axes; MoecError for numbers that are not finite.

    Rows that share scales must be whole in the box. `whole` is what `tensor_scales` gives, where it is known.
    """
    if isinstance(source, ElsewhereSource):
        parts: Parts = source.run(encode_rows, quantized, box, whole)
        return parts
    columns = (0, quantized.type.sizes[-1])
    return encode_parts(quantized, (*box, columns), RecipeEvaluator(source), whole)


def tensor_scales(quantized: Step, source: WeightSource, limit_bytes: int) -> torch.Tensor:
    """Return the scale f32[...] of each matrix of a weight in a format that has one, reading a tile of rows at a time."""
    lead = quantized.type.sizes[:-2]
    boxes = [tuple((i, i + 1) for i in index) for index in itertools.product(*map(range, lead))]
    jobs = [partial(_scale_in_box, quantized, source, box, limit_bytes) for box in boxes]
    found = source.run_all(jobs) if isinstance(source, ElsewhereSource) else [job() for job in jobs]
    return torch.tensor(found).reshape(lead)


def _scale_in_box(quantized: Step, source: WeightSource, box: Box, limit_bytes: int) -> float:
    """Return the scale of the one matrix in a box of the leading axes."""
    if isinstance(source, ElsewhereSource):
        return float(source.run(_scale_in_box, quantized, box, limit_bytes))
    return matrix_scale(quantized, tuple(low for low, _ in box), RecipeEvaluator(source), limit_bytes)
