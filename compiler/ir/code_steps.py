"""Weight steps that read quantized checkpoints: from packed codes, scales and zero points to numbers, or to `packed`.

Codes of `bits` bits are u8 from 0 to 2^bits - 1, whatever the checkpoint stores; a signed integer has half of the range
added. These are the rules for the types; weights/codes.py evaluates the steps a tile at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..formats.table import ELEMENTS, format_of
from .dtypes import DTYPES
from .types import Attr, Attrs, TensorType

Types = list[TensorType]


@dataclass(frozen=True)
class Blocks:
    """A block type of GGUF: its elements and bytes, the elements that share a scale, and what a code is."""

    elements: int
    bytes: int
    group: int
    bits: int
    element: str = "int"  # int, or a key of ELEMENTS
    minimums: bool = False  # w = scale q - minimum; without it half of the range is subtracted from a code


# ggml-common.h of llama.cpp has the structs
BLOCKS: Mapping[str, Blocks] = {
    "q4_0": Blocks(32, 18, 32, 4),
    "q4_1": Blocks(32, 20, 32, 4, minimums=True),
    "q5_0": Blocks(32, 22, 32, 5),
    "q5_1": Blocks(32, 24, 32, 5, minimums=True),
    "q8_0": Blocks(32, 34, 32, 8),
    "q2_k": Blocks(256, 84, 16, 2, minimums=True),
    "q3_k": Blocks(256, 110, 16, 3),
    "q4_k": Blocks(256, 144, 32, 4, minimums=True),
    "q5_k": Blocks(256, 176, 32, 5, minimums=True),
    "q6_k": Blocks(256, 210, 16, 6),
    "mxfp4": Blocks(32, 17, 32, 4, "e2m1"),
    "iq4_nl": Blocks(32, 18, 32, 4, "iq4_nl"),
}


def _unpack(types: Types, attributes: Attrs) -> TensorType:
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


def _affine(types: Types, attributes: Attrs) -> TensorType:
    (item,) = types
    return TensorType.of(_dtype(attributes["to"]), *item.shape)


def _view(types: Types, attributes: Attrs) -> TensorType:
    (item,) = types
    dtype = _dtype(attributes["to"])
    if DTYPES[dtype].bits != item.bits:
        raise ValueError(f"{item} cannot be seen as {dtype}: elements of another size")
    return TensorType.of(dtype, *item.shape)


def _decode(types: Types, attributes: Attrs) -> TensorType:
    (item,) = types
    if item.dtype != "u8" or attributes["of"] not in ELEMENTS:
        raise ValueError(f"codes u8 of {', '.join(ELEMENTS)} are decoded, not {item} of {attributes['of']}")
    return TensorType.of("f32", *item.shape)


def _gather(types: Types, attributes: Attrs) -> TensorType:
    item, index = types
    axis = attributes.integer("axis")
    if index.dtype not in ("i32", "i64") or len(index.shape) != 1 or not 0 <= axis < len(item.shape):
        raise ValueError(f"axis {axis} of {item} is gathered with i32 or i64 of one axis, not {index}")
    return TensorType.of(item.dtype, *item.sizes[:axis], index.sizes[0], *item.sizes[axis + 1 :])


def _repeat(types: Types, attributes: Attrs) -> TensorType:
    (item,) = types
    axis, times = attributes.integer("axis"), attributes.integer("times")
    if not 0 <= axis < len(item.shape) or times < 1:
        raise ValueError(f"axis {axis} of {item} cannot be repeated {times} times")
    return TensorType.of(item.dtype, *item.sizes[:axis], item.sizes[axis] * times, *item.sizes[axis + 1 :])


def _blocks(types: Types, attributes: Attrs) -> TensorType:
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


def _dequantize(types: Types, attributes: Attrs) -> TensorType:
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


def _packed(types: Types, attributes: Attrs) -> TensorType:
    codes, scales, *zeros = types
    format = format_of(attributes.text("to"))
    if codes.dtype != "u8" or len(codes.shape) < 2 or codes.sizes[-1] % format.group or format.tensor_scale:
        raise ValueError(f"codes u8 in whole groups of {format.group} are kept, not {codes}")
    wanted = (*codes.sizes[:-2], -(-codes.sizes[-2] // format.rows), codes.sizes[-1] // format.group)
    if scales.sizes != wanted or len(zeros) > format.zeros or any(z.sizes != wanted for z in zeros):
        raise ValueError(f"{format.name} of {codes} has scales (and zero points) {list(wanted)}, not {types[1:]}")
    return TensorType.of(format.name, *codes.shape)


def _dtype(name: Attr) -> str:
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return str(name)


CODE_STEPS = {
    "unpack": _unpack,  # bits, axis, size, order: words to codes, the first in the lowest bits (or code i at order[i])
    "affine": _affine,  # to, add=0, factor=1, bits: item * factor + add; of an integer the lowest `bits` bits
    "view": _view,  # to: the same bits as another dtype
    "decode": _decode,  # of: the numbers of codes, a key of ELEMENTS
    "gather": _gather,  # item, index; axis
    "repeat": _repeat,  # axis, times: every element `times` times in a row
    "blocks": _blocks,  # of, part: codes, scales or minimums of GGUF blocks
    # codes, scales, zeros; block, bits, divide=false: (codes[i, j] - zeros[i', j']) * scales[i', j'], i' = i // block[0].
    # With bits and without zeros half of the range is subtracted. Zeros that are floats are minimums: codes * scales - zeros.
    "dequantize": _dequantize,
    "packed": _packed,  # codes, scales, zeros; to: a quantized weight whose codes are those of the checkpoint
}
