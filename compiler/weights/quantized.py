"""Quantized weights in recipes: `quantize` and its parts, evaluated a tile of rows at a time.

As a value, a quantized weight is the numbers that its codes stand for, in f32. A target stores its parts: the steps
`codes`, `scales`, `zeros` (see encode). A row is what lies along the last axis; it is always worked on whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch

from ..errors import MoecError
from ..formats import Format, format_of
from ..ir import TensorType
from ..recipes import PARTS, Recipe, Step, tensors
from .calibrated import Calibrated
from .encode import Parts, decode, encode, pack
from .gptq import gptq
from .pull import Pull, tiles
from .sources import Box, WeightSource


def is_part(recipe: Recipe) -> TypeGuard[Step]:
    """Return whether a recipe is a part of a quantized weight whose parts are made row by row."""
    return isinstance(recipe, Step) and recipe.name in PARTS and _format(recipe.items[0]).rows == 1


def part_names(quantized: Step) -> list[str]:
    """Return the parts that the weight's format has, in the order in which they are stored."""
    format = _format(quantized)
    return [name for name in PARTS if name != "zeros" or format.zeros]


def row_tiles(quantized: Step, limit_bytes: int) -> Iterator[Box]:
    """Yield boxes of the leading axes that cover a weight in order; whole rows of f32 in a box fill `limit_bytes`."""
    *rows, width = quantized.type.shape
    return tiles(TensorType("f32", tuple(rows)), max(4, limit_bytes // int(width)))


def encode_rows(quantized: Step, source: WeightSource, box: Box) -> Parts:
    """Return the parts of the rows in a box of the leading axes; MoecError for numbers that are not finite."""
    whole = (*box, (0, quantized.type.sizes[-1]))
    return _encode(quantized, whole, Pull(source))


def _format(quantized: Recipe) -> Format:
    return format_of(quantized.type.dtype)


def _encode(quantized: Step, box: Box, inner: Pull) -> Parts:
    try:
        if quantized.name == "packed":
            return _packed(quantized, box, inner)
        (item,) = quantized.items
        numbers = inner(item, box).float()
        if quantized.attributes.get("method") == "gptq" and isinstance(inner.source, Calibrated):
            return _with_inputs(item, numbers, box, _format(quantized), inner.source)
        return encode(numbers, _format(quantized))
    except ValueError as error:
        names = ", ".join(dict.fromkeys(t.name for t in tensors(quantized)))
        raise MoecError(f"a weight cannot be quantized: {error}", model=names) from None


def _packed(quantized: Step, box: Box, inner: Pull) -> Parts:
    """Return the parts of rows whose codes and scales the checkpoint holds."""
    format, codes = _format(quantized), quantized.items[0]
    *rows, _ = box
    groups = (*rows, (0, codes.type.sizes[-1] // format.group))
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


def _with_inputs(item: Recipe, numbers: torch.Tensor, box: Box, format: Format, source: Calibrated) -> Parts:
    """Return parts chosen with the inputs of the weight; rounded to nearest where there are none, as for starved experts."""
    if numbers.dim() == 2:
        factor = source.factor(item, None)
        return encode(numbers, format) if factor is None else gptq(numbers, factor, format)
    found = []
    for rows, expert in zip(numbers, range(*box[0]), strict=True):
        factor = source.factor(item, expert)
        found.append(encode(rows, format) if factor is None else gptq(rows, factor, format))
    return {name: torch.stack([parts[name] for parts in found]) for name in found[0]}


def _quantize(step: Step, box: Box, inner: Pull) -> torch.Tensor:
    """Evaluate to the numbers that the codes stand for."""
    format, wide = _format(step), _whole_blocks(step, box)
    numbers = decode(_encode(step, wide, inner), format, step.type.sizes[-1])
    return numbers[tuple(slice(a - w, b - w) for (a, b), (w, _) in zip(box, wide, strict=True))]


def _whole_blocks(step: Step, box: Box) -> Box:
    """Return the box with whole rows, and as many rows as share scales."""
    format, sizes = _format(step), step.type.sizes
    *outer, (low, high), _ = box
    low, high = low - low % format.rows, min(high + -high % format.rows, sizes[-2])
    return (*outer, (low, high), (0, sizes[-1]))


def _part(name: str) -> Callable[[Step, Box, Pull], torch.Tensor]:
    def evaluate(step: Step, box: Box, inner: Pull) -> torch.Tensor:
        quantized: Any = step.items[0]
        format = _format(quantized)
        rows = quantized.type.sizes[-2]
        *outer, (low, high), columns = box
        if name == "scales" and format.rows > 1:
            span = (low * format.rows, min(high * format.rows, rows))
        else:
            span = (low - low % format.rows, min(high + -high % format.rows, rows))
        found = _encode(quantized, (*outer, span, (0, quantized.type.sizes[-1])), inner)[name]
        first = 0 if name == "scales" and format.rows > 1 else low - span[0]
        return found[..., first : first + high - low, slice(*columns)]

    return evaluate


# the steps of recipes.STEPS on quantized weights, as in pull.EVALUATE
QUANTIZED = {"quantize": _quantize, "packed": _quantize, **{name: _part(name) for name in PARTS}}
