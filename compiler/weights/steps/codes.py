"""Steps that read quantized checkpoints: from packed codes, scales and zero points to numbers.

Codes of `bits` bits are u8 from 0 to 2^bits - 1, whatever the checkpoint stores; a signed integer has half of the range
added.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TypeGuard

import numpy as np

from ...errors import MoecError
from ...formats.table import ELEMENTS
from ...ir.deferred import torch
from ...ir.dtypes import DTYPES, find_dtype
from ...ir.recipes import Recipe, Step, tensors_of
from ...ir.types import Attr, Attrs, TensorType
from ..ggml import BLOCKS
from ..sources.source import Box
from .declare import Evaluator, Types, box_sizes, weight_step, with_span

_FLOAT8 = ("f8e4m3", "f8e5m2")


@cache
def _numbers_of_codes(name: str) -> torch.Tensor:
    """Return the numbers of codes of 4 bits."""
    return torch.tensor(ELEMENTS[name], dtype=torch.float32)


@cache
def _numbers_of_bytes(name: str) -> np.ndarray:
    """Return what a byte of two codes stands for, the low one first, as one element of 8 bytes.

    A lookup of whole bytes in numpy is several times as fast as one of codes in torch.
    """
    numbers, byte = _numbers_of_codes(name), torch.arange(256)
    return torch.stack((numbers[byte & 15], numbers[byte >> 4]), dim=-1).numpy().view(np.int64).ravel()


@cache
def _numbers_of_float8(name: str) -> np.ndarray:
    """Return the numbers of all bytes of a float8: a lookup is several times as fast as torch's conversion."""
    return torch.arange(256).to(torch.uint8).view(DTYPES[name].torch).float().numpy()


def _checked_dtype(name: Attr) -> str:
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return str(name)


def _unpack_type(types: Types, attributes: Attrs) -> TensorType:
    (item,) = types
    bits, axis = attributes.integer("bits"), attributes.integer("axis")
    if item.dtype not in ("u8", "i8", "i32") or not 0 <= axis < len(item.shape):
        raise ValueError(
            f"codes are unpacked from u8, i8 or i32 along an axis that is there, not axis {axis} of {item}"
        )
    word = DTYPES[item.dtype].bits
    order = attributes.integers("order") if "order" in attributes else None
    if order is not None and (word % bits or sorted(order) != list(range(word // bits))):
        raise ValueError(f"the order {order} does not order the codes of {bits} bits in {word}")
    room = item.sizes[axis] * word // bits
    count = attributes.integer("size", room)
    if not 0 < bits <= 8 or math.ceil(count * bits / word) != item.sizes[axis]:
        raise ValueError(
            f"{count} codes of {bits} bits take {math.ceil(count * bits / word)} words, not those of {item}"
        )
    return TensorType.of("u8", *item.sizes[:axis], count, *item.sizes[axis + 1 :])


@weight_step("unpack", _unpack_type, reads_codes=True)
def _unpack(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Take codes of `bits` bits out of words along `axis`, `size` of them, the first in the lowest bits or code i at order[i]."""
    item, bits, axis = step.items[0], step.attributes.integer("bits"), step.attributes.integer("axis")
    word = DTYPES[item.type.dtype].bits
    low, high = box[axis]
    first, last = low * bits // word, math.ceil(high * bits / word)
    words = inner(item, with_span(box, axis, first, last))
    if word % bits:
        return _unpack_across_words(
            words, word, bits, axis, range(low * bits - first * word, high * bits - first * word, bits)
        )
    order = step.attributes.integers("order") if "order" in step.attributes else range(word // bits)
    shape = list(words.shape)
    codes = torch.empty([*shape[: axis + 1], word // bits, *shape[axis + 1 :]], dtype=torch.uint8)
    for i, place in enumerate(order):
        codes.select(axis + 1, i).copy_((words >> (place * bits)) & ((1 << bits) - 1))
    start = low - first * word // bits
    return codes.flatten(axis, axis + 1).narrow(axis, start, high - low)


def _unpack_across_words(words: torch.Tensor, word: int, bits: int, axis: int, places: range) -> torch.Tensor:
    """Return codes that begin at bit places of a row of words, and may end in the next word."""
    wide = words.to(torch.int64).bitwise_and_((1 << word) - 1)
    bit = torch.tensor(places)
    at, shift = bit // word, bit % word
    shift = shift.reshape([-1] + [1] * (words.dim() - axis - 1))
    codes = wide.index_select(axis, at) >> shift
    # where a code ends in its own word, what the next one adds lies above its bits
    codes |= wide.index_select(axis, (at + 1).clamp_(max=words.shape[axis] - 1)) << (word - shift)
    return codes.bitwise_and_((1 << bits) - 1).to(torch.uint8)


def _affine_type(types: Types, attributes: Attrs) -> TensorType:
    (item,) = types
    return TensorType.of(_checked_dtype(attributes["to"]), *item.shape)


@weight_step("affine", _affine_type, reads_codes=True)
def _affine(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Return item * `factor` (1) + `add` (0) in the dtype `to`; of integers the lowest `bits` bits."""
    item, attributes = inner(step.items[0], box), step.attributes
    add, factor = attributes.number("add", 0), attributes.number("factor", 1)
    exact = not item.is_floating_point() and isinstance(add, int) and isinstance(factor, int)
    numbers = item.to(torch.int32 if exact else torch.float32)
    numbers = (numbers * factor if factor != 1 else numbers) + add
    if bits := step.attributes.integer("bits", 0):
        numbers = numbers & ((1 << bits) - 1)
    return numbers.to(DTYPES[step.type.dtype].torch)


def _view_type(types: Types, attributes: Attrs) -> TensorType:
    (item,) = types
    dtype = _checked_dtype(attributes["to"])
    if DTYPES[dtype].bits != item.bits:
        raise ValueError(f"{item} cannot be seen as {dtype}: elements of another size")
    return TensorType.of(dtype, *item.shape)


@weight_step("view", _view_type, reads_codes=True)
def _view(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Return the same bits as another dtype `to`."""
    return inner(step.items[0], box).view(DTYPES[step.type.dtype].torch)


def _decode_type(types: Types, attributes: Attrs) -> TensorType:
    (item,) = types
    if item.dtype != "u8" or attributes["of"] not in ELEMENTS:
        raise ValueError(f"codes u8 of {', '.join(ELEMENTS)} are decoded, not {item} of {attributes['of']}")
    return TensorType.of("f32", *item.shape)


@weight_step("decode", _decode_type, reads_codes=True)
def _decode(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Return the numbers of codes, by the table `of` of formats."""
    kind, item = str(step.attributes["of"]), step.items[0]
    if not _is_two_in_a_byte(item):
        return _numbers_of_codes(kind)[inner(item, box).int()]
    *outer, (low, high) = box
    codes = inner(item.items[0], (*outer, (low // 2, -(-high // 2)))).contiguous().view(torch.uint8)
    pairs = np.take(
        _numbers_of_bytes(kind), codes.numpy(), mode="clip"
    )  # a byte is never out of range: nothing to check
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
    ) == (
        4,
        last,
    )


def _gather_type(types: Types, attributes: Attrs) -> TensorType:
    item, index = types
    axis = attributes.integer("axis")
    if index.dtype not in ("i32", "i64") or len(index.shape) != 1 or not 0 <= axis < len(item.shape):
        raise ValueError(f"axis {axis} of {item} is gathered with i32 or i64 of one axis, not {index}")
    return TensorType.of(item.dtype, *item.sizes[:axis], index.sizes[0], *item.sizes[axis + 1 :])


@weight_step("gather", _gather_type, reads_codes=True)
def _gather(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Gather elements of an item along `axis`, by an index."""
    (item, index), axis = step.items, step.attributes.integer("axis")
    places = inner(index, (box[axis],)).long()
    low, high = int(places.min()), int(places.max())
    if low < 0 or high >= item.type.sizes[axis]:
        names = ", ".join(t.name for t in tensors_of(index))
        raise MoecError(f"{names} points outside the {item.type.sizes[axis]} groups of scales", model=names)
    return inner(item, with_span(box, axis, low, high + 1)).index_select(axis, places - low)


def _repeat_type(types: Types, attributes: Attrs) -> TensorType:
    (item,) = types
    axis, times = attributes.integer("axis"), attributes.integer("times")
    if not 0 <= axis < len(item.shape) or times < 1:
        raise ValueError(f"axis {axis} of {item} cannot be repeated {times} times")
    return TensorType.of(item.dtype, *item.sizes[:axis], item.sizes[axis] * times, *item.sizes[axis + 1 :])


@weight_step("repeat", _repeat_type, reads_codes=True)
def _repeat(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Repeat every element `times` times in a row along `axis`."""
    axis, times = step.attributes.integer("axis"), step.attributes.integer("times")
    low, high = box[axis]
    first, last = low // times, -(-high // times)
    part = inner(step.items[0], with_span(box, axis, first, last)).repeat_interleave(times, dim=axis)
    return part.narrow(axis, low - first * times, high - low)


def _blocks_type(types: Types, attributes: Attrs) -> TensorType:
    (item,) = types
    kind, part = BLOCKS.get(attributes.text("of")), attributes["part"]
    if kind is None or part not in ("codes", "scales", "minimums") or (part == "minimums" and not kind.minimums):
        raise ValueError(f"blocks of {attributes['of']} have no {part}; there are {', '.join(BLOCKS)}")
    *outer, width = item.sizes
    if item.dtype != "u8" or width % kind.bytes:
        raise ValueError(f"{item} does not hold whole blocks of {kind.bytes} bytes")
    count = width // kind.bytes * kind.elements
    if part == "codes":
        return TensorType.of("u8", *outer, count)
    return TensorType.of("f32", *outer, count // kind.group)


@weight_step("blocks", _blocks_type, reads_codes=True)
def _blocks(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Take a `part` of GGUF blocks of a type `of`: codes, scales or minimums."""
    kind, part = BLOCKS[str(step.attributes["of"])], str(step.attributes["part"])
    count = kind.elements if part == "codes" else kind.elements // kind.group  # of the result, a block
    *outer, (low, high) = box
    first, last = low // count, -(-high // count)
    raw = inner(step.items[0], (*outer, (first * kind.bytes, last * kind.bytes)))
    made = kind.read(raw.reshape(-1, kind.bytes), part)
    return made.reshape([*box_sizes(tuple(outer)), (last - first) * count]).narrow(-1, low - first * count, high - low)


def _dequantize_type(types: Types, attributes: Attrs) -> TensorType:
    codes, *others = types
    block = attributes.integers("block")
    if not 1 <= len(others) <= 2 or len(block) != len(codes.shape):
        raise ValueError(
            f"{codes} with {len(others)} items beside it and blocks of {block}: scales, or scales and zeros"
        )
    wanted = tuple(-(-n // b) for n, b in zip(codes.sizes, block, strict=True))
    for name, found in zip(("scales", "zeros"), others, strict=False):
        if found.sizes != wanted:
            raise ValueError(f"{name} of {codes} in blocks of {block} are {list(wanted)}, not {found}")
    return TensorType.of("f32", *codes.shape)


@weight_step("dequantize", _dequantize_type, reads_codes=True)
def _dequantize(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Return (codes[i, j] - zeros[i', j']) * scales[i', j'] of codes, scales and zeros, where i' = i // block[0] and so on.

    With `bits` and without zeros half of the range is subtracted; with `divide` scales divide. Zeros that are floats are
    minimums: codes * scales - zeros.
    """
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

    numbers = _codes_to_f32(codes)
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
    return wide.reshape(box_sizes(box))


def _codes_to_f32(codes: torch.Tensor) -> torch.Tensor:
    """Return codes as f32; those that are f32 already are not copied."""
    name = find_dtype(codes.dtype)
    if name not in _FLOAT8:
        return codes.to(torch.float32)
    return torch.from_numpy(
        np.take(_numbers_of_float8(name), codes.contiguous().view(torch.uint8).numpy(), mode="clip")
    )


STEPS = (_unpack, _affine, _view, _decode, _gather, _repeat, _blocks, _dequantize)
