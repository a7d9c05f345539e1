"""Quantized weights in recipes: `quantize` and its parts, evaluated a tile of rows at a time.

As a value, a quantized weight is the numbers that its codes stand for, in f32. A target stores its parts: the steps
`codes`, `scales`, `zeros` (see formats/format.py). A row is what lies along the last axis; it is always worked on whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, TypeGuard

from ...errors import MoecError
from ...formats.format import PART_NAMES, Format, Parts
from ...formats.table import find_format, format_of
from ...ir.deferred import torch
from ...ir.dtypes import DTYPES
from ...ir.recipes import WEIGHT, Recipe, Step, steps_of, tensors_of
from ...ir.types import Attrs, TensorType
from ..calibrated import Calibrated
from ..sources.source import Box, WeightSource
from ..tiles import tile_boxes
from .declare import Evaluator, TypeRule, Types, WeightStep, only_type, weight_step


def is_part(recipe: Recipe) -> TypeGuard[Step]:
    """Return whether a recipe is a part of a quantized weight whose parts are made row by row."""
    return isinstance(recipe, Step) and recipe.name in PART_NAMES and _format_of_step(recipe.items[0]).rows == 1


def row_tiles(weight: Recipe, limit_bytes: int) -> Iterator[Box]:
    """Yield boxes of the leading axes that cover a weight in order; whole rows of f32 in a box fill `limit_bytes`."""
    *rows, width = weight.type.shape
    return tile_boxes(TensorType("f32", tuple(rows)), max(4, limit_bytes // int(width)))


def block_tiles(quantized: Step, limit_bytes: int) -> Iterator[Box]:
    """Yield boxes as `row_tiles` does, each of rows of one matrix and with whole blocks of rows that share scales."""
    *lead, rows, width = quantized.type.sizes
    block = _format_of_step(quantized).rows
    step = max(1, limit_bytes // (4 * width) // block) * block
    for outer in itertools.product(*map(range, lead)):
        for low in range(0, rows, step):
            yield (*((i, i + 1) for i in outer), (low, min(low + step, rows)))


def _format_of_step(quantized: Recipe) -> Format:
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
    return largest / _format_of_step(quantized).tensor_scale or 1.0


def _encode_scaled(quantized: Step, box: Box, inner: Evaluator, whole: torch.Tensor | None) -> Parts:
    """Return the parts in a format with a scale for each matrix, one matrix after the other."""
    format, numbers = _format_of_step(quantized), inner(quantized.items[0], box).float()
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
            return _packed_parts(quantized, box, inner)
        if _format_of_step(quantized).tensor_scale:
            return _encode_scaled(quantized, box, inner, whole)
        (item,) = quantized.items
        numbers = inner(item, box).float()
        if quantized.attributes.get("method") == "gptq":
            return _with_inputs(quantized, numbers, box, inner.source)
        return _format_of_step(quantized).encode(numbers)
    except ValueError as error:
        names = ", ".join(dict.fromkeys(t.name for t in tensors_of(quantized)))
        raise MoecError(f"a weight cannot be quantized: {error}", model=names) from None


def _packed_parts(quantized: Step, box: Box, inner: Evaluator) -> Parts:
    """Return the parts of rows whose codes and scales the checkpoint holds."""
    from ...formats.packing import pack_bits

    format, codes = _format_of_step(quantized), quantized.items[0]
    *lead, (low, high), _ = box
    blocks = (low // format.rows, -(-high // format.rows))
    groups = (*lead, blocks, (0, codes.type.sizes[-1] // format.group))
    scales = inner(quantized.items[1], groups)
    if not torch.isfinite(scales.float()).all():
        raise ValueError("some scales are infinite or not numbers")
    parts = {
        "codes": pack_bits(inner(codes, box), format.bits),
        "scales": scales.view(torch.uint8) if format.scale == "f8e8m0" else scales.to(DTYPES[format.scale].torch),
    }
    if format.zeros:
        half = torch.full(scales.shape, 1 << (format.bits - 1), dtype=torch.uint8)
        zeros = inner(quantized.items[2], groups) if len(quantized.items) > 2 else half
        parts["zeros"] = pack_bits(zeros, format.bits)
    return parts


def _with_inputs(quantized: Step, numbers: torch.Tensor, box: Box, source: WeightSource) -> Parts:
    """Return parts chosen with the inputs of the weight; experts that saw too few tokens are rounded to nearest."""
    from ...formats.gptq import gptq_encode

    format, known = _format_of_step(quantized), source if isinstance(source, Calibrated) else Calibrated(source, {})

    def parts(rows: torch.Tensor, expert: int | None) -> Parts:
        factor = known.factor(quantized, expert)
        return format.encode(rows) if factor is None else gptq_encode(rows, factor, format)

    if numbers.dim() == 2:
        return parts(numbers, None)
    found = [parts(rows, expert) for rows, expert in zip(numbers, range(*box[0]), strict=True)]
    return {name: torch.stack([p[name] for p in found]) for name in found[0]}


def _quantize_type(types: Types, attributes: Attrs) -> TensorType:
    item = only_type(types)
    format = format_of(attributes.text("to"))
    if item.dtype != "f32" or len(item.shape) < 2:
        raise ValueError(f"f32 with two axes or more is quantized, not {item}")
    if item.sizes[-1] % format.group:
        raise ValueError(f"groups of {format.group} do not divide the {item.sizes[-1]} columns of {item}")
    return TensorType.of(format.name, *item.shape)


@weight_step("quantize", _quantize_type)
def _quantize(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Quantize to the format `to`, by `method` (rtn); the numbers are those that the codes stand for.

    `weight` names the weight for methods that look at what it is multiplied with, `starved` says what they do without.
    """
    format, wide = _format_of_step(step), _whole_blocks(step, box)
    numbers = format.decode(encode_parts(step, wide, inner), step.type.sizes[-1])
    return numbers[tuple(slice(a - w, b - w) for (a, b), (w, _) in zip(box, wide, strict=True))]


def _packed_type(types: Types, attributes: Attrs) -> TensorType:
    codes, scales, *zeros = types
    format = format_of(attributes.text("to"))
    if codes.dtype != "u8" or len(codes.shape) < 2 or codes.sizes[-1] % format.group or format.tensor_scale:
        raise ValueError(f"codes u8 in whole groups of {format.group} are kept, not {codes}")
    wanted = (*codes.sizes[:-2], -(-codes.sizes[-2] // format.rows), codes.sizes[-1] // format.group)
    if scales.sizes != wanted or len(zeros) > format.zeros or any(z.sizes != wanted for z in zeros):
        raise ValueError(f"{format.name} of {codes} has scales (and zero points) {list(wanted)}, not {types[1:]}")
    return TensorType.of(format.name, *codes.shape)


@weight_step("packed", _packed_type, reads_codes=True)
def _packed_weight(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Store codes, scales and zeros of the checkpoint in the format `to`."""
    return _quantize.evaluate(step, box, inner)


def _whole_blocks(step: Step, box: Box) -> Box:
    """Return the box with whole rows, and as many rows as share scales."""
    format, sizes = _format_of_step(step), step.type.sizes
    *outer, (low, high), _ = box
    low, high = low - low % format.rows, min(high + -high % format.rows, sizes[-2])
    return (*outer, (low, high), (0, sizes[-1]))


def _part_type(name: str) -> TypeRule:
    def rule(types: Types, attributes: Attrs) -> TensorType:
        item = only_type(types)
        format = find_format(item.dtype)
        if format is None or name not in format.part_names:
            raise ValueError(f"{item} has no {name}")
        *outer, rows, width = item.sizes
        dtype, sizes = format.part(name, rows, width)
        return TensorType.of(dtype, *outer, *sizes)

    return rule


def _declare_part(name: str) -> WeightStep:
    """Declare the step that takes a part of a quantized weight."""

    @weight_step(name, _part_type(name))
    def evaluate(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
        """Take this part of a quantized weight, as a target stores it."""
        quantized: Any = step.items[0]
        format = _format_of_step(quantized)
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


STEPS = (_quantize, *map(_declare_part, PART_NAMES), _packed_weight)


# --- what the step that quantizes says ---------------------------------------------------------------------------


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
