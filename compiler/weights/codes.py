"""Evaluate the steps of `code_steps`: codes and scales of quantized checkpoints, read for a box of the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeGuard

import numpy as np
import torch

from ..errors import MoecError
from ..formats.ggml import PARTS
from ..formats.table import ELEMENTS
from ..ir.code_steps import BLOCKS
from ..ir.dtypes import DTYPES
from ..ir.recipes import Recipe, Step, tensors
from .evaluator import Evaluator
from .sources.source import Box

_NUMBERS = {name: torch.tensor(values, dtype=torch.float32) for name, values in ELEMENTS.items()}
# what a byte of two codes stands for, the low one first, as one element of 8 bytes: a lookup of whole bytes in numpy is
# several times as fast as one of codes in torch
_BYTES = torch.arange(256)
_PAIRS = {
    name: torch.stack((numbers[_BYTES & 15], numbers[_BYTES >> 4]), dim=-1).numpy().view(np.int64).ravel()
    for name, numbers in _NUMBERS.items()
}
# the numbers of all bytes of float8: a lookup is several times as fast as torch's conversion
_FLOAT8 = {
    dtype: _BYTES.to(torch.uint8).view(dtype).float().numpy() for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
}


def _span(box: Box, axis: int, start: int, stop: int) -> Box:
    return (*box[:axis], (start, stop), *box[axis + 1 :])


def _shape(box: Box) -> list[int]:
    return [stop - start for start, stop in box]


def _unpack(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    item, bits, axis = step.items[0], step.attributes.integer("bits"), step.attributes.integer("axis")
    word = DTYPES[item.type.dtype].bits
    low, high = box[axis]
    first, last = low * bits // word, math.ceil(high * bits / word)
    words = inner(item, _span(box, axis, first, last))
    if word % bits:
        return _straddling(words, word, bits, axis, range(low * bits - first * word, high * bits - first * word, bits))
    order = step.attributes.integers("order") if "order" in step.attributes else range(word // bits)
    shape = list(words.shape)
    codes = torch.empty([*shape[: axis + 1], word // bits, *shape[axis + 1 :]], dtype=torch.uint8)
    for i, place in enumerate(order):
        codes.select(axis + 1, i).copy_((words >> (place * bits)) & ((1 << bits) - 1))
    start = low - first * word // bits
    return codes.flatten(axis, axis + 1).narrow(axis, start, high - low)


def _straddling(words: torch.Tensor, word: int, bits: int, axis: int, places: range) -> torch.Tensor:
    """Return codes that begin at bit places of a row of words, and may end in the next word."""
    wide = words.to(torch.int64).bitwise_and_((1 << word) - 1)
    bit = torch.tensor(places)
    at, shift = bit // word, bit % word
    shift = shift.reshape([-1] + [1] * (words.dim() - axis - 1))
    codes = wide.index_select(axis, at) >> shift
    # where a code ends in its own word, what the next one adds lies above its bits
    codes |= wide.index_select(axis, (at + 1).clamp_(max=words.shape[axis] - 1)) << (word - shift)
    return codes.bitwise_and_((1 << bits) - 1).to(torch.uint8)


def _affine(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    item, attributes = inner(step.items[0], box), step.attributes
    add, factor = attributes.number("add", 0), attributes.number("factor", 1)
    exact = not item.is_floating_point() and isinstance(add, int) and isinstance(factor, int)
    numbers = item.to(torch.int32 if exact else torch.float32)
    numbers = (numbers * factor if factor != 1 else numbers) + add
    if bits := step.attributes.integer("bits", 0):
        numbers = numbers & ((1 << bits) - 1)
    return numbers.to(DTYPES[step.type.dtype].torch)


def _view(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    return inner(step.items[0], box).view(DTYPES[step.type.dtype].torch)


def _decode(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    kind, item = str(step.attributes["of"]), step.items[0]
    if not _is_two_in_a_byte(item):
        return _NUMBERS[kind][inner(item, box).int()]
    *outer, (low, high) = box
    codes = inner(item.items[0], (*outer, (low // 2, -(-high // 2)))).contiguous().view(torch.uint8)
    pairs = np.take(_PAIRS[kind], codes.numpy(), mode="clip")  # a byte is never out of range: nothing to check
    numbers = torch.from_numpy(pairs.view(np.float32))
    return numbers.narrow(-1, low % 2, high - low)


def _is_step(item: Recipe, name: str) -> TypeGuard[Step]:
    return isinstance(item, Step) and item.name == name


def _is_two_in_a_byte(item: Recipe) -> TypeGuard[Step]:
    if not _is_step(item, "unpack") or "order" in item.attributes:
        return False
    last = len(item.type.shape) - 1
    return DTYPES[item.items[0].type.dtype].bits == 8 and (
        item.attributes.integer("bits"),
        item.attributes.integer("axis"),
    ) == (4, last)


def _gather(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    (item, index), axis = step.items, step.attributes.integer("axis")
    places = inner(index, (box[axis],)).long()
    low, high = int(places.min()), int(places.max())
    if low < 0 or high >= item.type.sizes[axis]:
        names = ", ".join(t.name for t in tensors(index))
        raise MoecError(f"{names} points outside the {item.type.sizes[axis]} groups of scales", model=names)
    return inner(item, _span(box, axis, low, high + 1)).index_select(axis, places - low)


def _repeat(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    axis, times = step.attributes.integer("axis"), step.attributes.integer("times")
    low, high = box[axis]
    first, last = low // times, -(-high // times)
    part = inner(step.items[0], _span(box, axis, first, last)).repeat_interleave(times, dim=axis)
    return part.narrow(axis, low - first * times, high - low)


def _blocks(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    kind, part = BLOCKS[str(step.attributes["of"])], str(step.attributes["part"])
    count = kind.elements if part == "codes" else kind.elements // kind.group  # of the result, a block
    *outer, (low, high) = box
    first, last = low // count, -(-high // count)
    raw = inner(step.items[0], (*outer, (first * kind.bytes, last * kind.bytes)))
    made = PARTS[str(step.attributes["of"])](raw.reshape(-1, kind.bytes), part)
    return made.reshape([*_shape(tuple(outer)), (last - first) * count]).narrow(-1, low - first * count, high - low)


def _dequantize(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    blocks = step.attributes.integers("block")
    around = tuple((a // n, -(-b // n)) for (a, b), n in zip(box, blocks, strict=True))
    codes, scales, *zeros = (inner(item, part) for item, part in zip(step.items, (box, around, around), strict=False))
    split: list[int] = []  # the shape of the codes with whole blocks as an axis of their own: scales broadcast over it
    for (low, high), block in zip(box, blocks, strict=True):
        size = high - low
        split += [size // block, block] if low % block == 0 and size % block == 0 else [size]

    def over_blocks(values: torch.Tensor) -> torch.Tensor:
        """Return one value for each block in a shape that broadcasts over the split codes."""
        values, axis = values.to(torch.float32), 0
        for (low, high), block in zip(box, blocks, strict=True):
            size = high - low
            if low % block == 0 and size % block == 0:
                values = values.unsqueeze(axis + 1)
                axis += 2
            else:  # an edge cuts a block: the values of this axis are written out
                values = values.repeat_interleave(block, dim=axis).narrow(axis, low % block, size)
                axis += 1
        return values

    numbers = _floats(codes)
    wide = numbers.reshape(split)
    if wide.data_ptr() == codes.data_ptr() and not _is_step(step.items[0], "decode"):
        wide = wide.clone()  # codes that were float32 may belong to the source
    minimums = bool(zeros) and zeros[0].is_floating_point()
    if bits := step.attributes.integer("bits", 0) if not minimums else 0:
        wide -= over_blocks(zeros[0]) if zeros else 1 << (bits - 1)
    if step.attributes.get("divide"):
        wide /= over_blocks(scales)
    else:
        wide *= over_blocks(scales)
    if minimums:
        wide -= over_blocks(zeros[0])
    return wide.reshape(_shape(box))


def _floats(codes: torch.Tensor) -> torch.Tensor:
    """Return codes as f32; those that are f32 already are not copied."""
    if codes.dtype not in _FLOAT8:
        return codes.to(torch.float32)
    return torch.from_numpy(np.take(_FLOAT8[codes.dtype], codes.contiguous().view(torch.uint8).numpy(), mode="clip"))


# the step's name in code_steps.CODE_STEPS -> how it is evaluated, as in pull.EVALUATE; `packed` is in quantized.py
CODES: dict[str, Callable[[Step, Box, Evaluator], torch.Tensor]] = {
    "unpack": _unpack,
    "affine": _affine,
    "view": _view,
    "decode": _decode,
    "gather": _gather,
    "repeat": _repeat,
    "blocks": _blocks,
    "dequantize": _dequantize,
}
