"""Quantized weights in recipes: `quantize` and its parts, evaluated a tile of rows at a time.

As a value, a quantized weight is the numbers that its codes stand for, in f32. A target stores its parts: the steps
`codes`, `scales`, `zeros` (see formats/format.py). A row is what lies along the last axis; it is always worked on whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch

from ..errors import MoecError
from ..formats.format import PART_NAMES, Format, Parts
from ..formats.gptq import gptq
from ..formats.packing import pack
from ..formats.table import format_of
from ..ir.recipes import Recipe, Step, tensors
from ..ir.types import TensorType
from .calibrated import Calibrated
from .evaluator import Evaluator
from .sources.source import Box, WeightSource
from .tiles import tiles


def is_part(recipe: Recipe) -> TypeGuard[Step]:
    """Return whether a recipe is a part of a quantized weight whose parts are made row by row."""
    return isinstance(recipe, Step) and recipe.name in PART_NAMES and _format(recipe.items[0]).rows == 1


def row_tiles(quantized: Step, limit_bytes: int) -> Iterator[Box]:
    """Yield boxes of the leading axes that cover a weight in order; whole rows of f32 in a box fill `limit_bytes`."""
    *rows, width = quantized.type.shape
    return tiles(TensorType("f32", tuple(rows)), max(4, limit_bytes // int(width)))


def block_tiles(quantized: Step, limit_bytes: int) -> Iterator[Box]:
    """Yield boxes as `row_tiles` does, each of rows of one matrix and with whole blocks of rows that share scales."""
    *lead, rows, width = quantized.type.sizes
    block = _format(quantized).rows
    step = max(1, limit_bytes // (4 * width) // block) * block
    for outer in itertools.product(*map(range, lead)):
        for low in range(0, rows, step):
            yield (*((i, i + 1) for i in outer), (low, min(low + step, rows)))


def _format(quantized: Recipe) -> Format:
    return format_of(quantized.type.dtype)


_SCALED_AT_ONCE = 4 << 20  # bytes of f32 that are looked at for the largest number of a matrix


def matrix_scale(
    quantized: Step, index: tuple[int, ...], inner: Evaluator, limit_bytes: int = _SCALED_AT_ONCE
) -> float:
    """Return the scale of one matrix in a format that has one: with it the scale of the largest group is the largest."""
    (item,), (rows, width) = quantized.items, quantized.type.sizes[-2:]
    step = max(1, limit_bytes // (4 * width))
    largest = 0.0
    for low in range(0, rows, step):
        box = (*((i, i + 1) for i in index), (low, min(low + step, rows)), (0, width))
        largest = max(largest, float(inner(item, box).float().abs().max()))
    return largest / _format(quantized).tensor_scale or 1.0


def _encode_scaled(quantized: Step, box: Box, inner: Evaluator, whole: torch.Tensor | None) -> Parts:
    """Return the parts in a format with a scale for each matrix, one matrix after the other."""
    format, numbers = _format(quantized), inner(quantized.items[0], box).float()
    found = []
    for place in itertools.product(*(range(n) for n in numbers.shape[:-2])):
        index = tuple(low + i for i, (low, _) in zip(place, box, strict=False))
        scale = matrix_scale(quantized, index, inner) if whole is None else float(whole[index])
        found.append(format.encode(numbers[place], scale))
    lead = numbers.shape[:-2]
    return {name: torch.stack([p[name] for p in found]).reshape((*lead, *found[0][name].shape)) for name in found[0]}


def encode_parts(quantized: Step, box: Box, inner: Evaluator, whole: torch.Tensor | None = None) -> Parts:
    """Return the parts of whole rows in a box; MoecError for numbers that are not finite."""
    try:
        if quantized.name == "packed":
            return _packed(quantized, box, inner)
        if _format(quantized).tensor_scale:
            return _encode_scaled(quantized, box, inner, whole)
        (item,) = quantized.items
        numbers = inner(item, box).float()
        if quantized.attributes.get("method") == "gptq":
            return _with_inputs(quantized, numbers, box, inner.source)
        return _format(quantized).encode(numbers)
    except ValueError as error:
        names = ", ".join(dict.fromkeys(t.name for t in tensors(quantized)))
        raise MoecError(f"a weight cannot be quantized: {error}", model=names) from None


def _packed(quantized: Step, box: Box, inner: Evaluator) -> Parts:
    """Return the parts of rows whose codes and scales the checkpoint holds."""
    format, codes = _format(quantized), quantized.items[0]
    *lead, (low, high), _ = box
    blocks = (low // format.rows, -(-high // format.rows))
    groups = (*lead, blocks, (0, codes.type.sizes[-1] // format.group))
    scales = inner(quantized.items[1], groups)
    if not torch.isfinite(scales.float()).all():
        raise ValueError("some scales are infinite or not numbers")
    parts = {
        "codes": pack(inner(codes, box), format.bits),
        "scales": scales.view(torch.uint8) if format.scale == "f8e8m0" else scales.float(),
    }
    if format.zeros:
        half = torch.full(scales.shape, 1 << (format.bits - 1), dtype=torch.uint8)
        zeros = inner(quantized.items[2], groups) if len(quantized.items) > 2 else half
        parts["zeros"] = pack(zeros, format.bits)
    return parts


def _with_inputs(quantized: Step, numbers: torch.Tensor, box: Box, source: WeightSource) -> Parts:
    """Return parts chosen with the inputs of the weight; experts that saw too few tokens are rounded to nearest."""
    format, known = _format(quantized), source if isinstance(source, Calibrated) else Calibrated(source, {})

    def parts(rows: torch.Tensor, expert: int | None) -> Parts:
        factor = known.factor(quantized, expert)
        return format.encode(rows) if factor is None else gptq(rows, factor, format)

    if numbers.dim() == 2:
        return parts(numbers, None)
    found = [parts(rows, expert) for rows, expert in zip(numbers, range(*box[0]), strict=True)]
    return {name: torch.stack([p[name] for p in found]) for name in found[0]}


def _quantize(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Evaluate to the numbers that the codes stand for."""
    format, wide = _format(step), _whole_blocks(step, box)
    numbers = format.decode(encode_parts(step, wide, inner), step.type.sizes[-1])
    return numbers[tuple(slice(a - w, b - w) for (a, b), (w, _) in zip(box, wide, strict=True))]


def _whole_blocks(step: Step, box: Box) -> Box:
    """Return the box with whole rows, and as many rows as share scales."""
    format, sizes = _format(step), step.type.sizes
    *outer, (low, high), _ = box
    low, high = low - low % format.rows, min(high + -high % format.rows, sizes[-2])
    return (*outer, (low, high), (0, sizes[-1]))


def _part(name: str) -> Callable[[Step, Box, Evaluator], torch.Tensor]:
    def evaluate(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
        quantized: Any = step.items[0]
        format = _format(quantized)
        rows = quantized.type.sizes[-2]
        *outer, (low, high), columns = box
        if name == "scales" and format.rows > 1:
            span = (low * format.rows, min(high * format.rows, rows))
        else:
            span = (low - low % format.rows, min(high + -high % format.rows, rows))
        found = encode_parts(quantized, (*outer, span, (0, quantized.type.sizes[-1])), inner)[name]
        first = 0 if name == "scales" and format.rows > 1 else low - span[0]
        return found[..., first : first + high - low, slice(*columns)]

    return evaluate


# the steps of recipes.STEPS on quantized weights, as in pull.EVALUATE
QUANTIZED = {"quantize": _quantize, "packed": _quantize, **{name: _part(name) for name in PART_NAMES}}
