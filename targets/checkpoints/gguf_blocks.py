"""Codes of moec's formats as blocks of GGUF: each has 32 codes, and what they are scaled by in f16.

The layouts are those that compiler/weights/ggml.py reads (ggml-common.h of llama.cpp): low nibbles hold the first half of a block.
"""

from __future__ import annotations

import torch

from ...compiler.errors import MoecError
from ...compiler.formats.format import Format, Parts
from ...compiler.formats.packing import unpack_bits
from ...compiler.ir.module import Op
from ...compiler.weights.ggml import BLOCKS
from .layouts import HOLDERS

_GROUP = 32
_INTEGERS = {(4, False): "q4_0", (4, True): "q4_1", (8, False): "q8_0"}  # bits, zero points


def block_type(format: Format) -> str | None:
    """Return the block type that holds the codes of a format; None where there is none."""
    if format.name == "mxfp4":
        return "mxfp4"
    if format.element != "int" or format.group % _GROUP:
        return None
    return _INTEGERS.get((format.bits, format.zeros))


def why_not_held(op: Op, format: Format) -> str | None:
    """Return why an op of stage moe cannot have its weights in a format, None if it can."""
    if op.name not in HOLDERS:
        return f"{op.name} is no linear, and only the weights of these are stored as codes"
    if block_type(format) is None:
        return f"no block type of GGUF has the codes of {format.name}; int4, uint4 and int8 in groups from 32 on and mxfp4 have one"
    return None


def row_bytes(kind: str, width: int) -> int:
    """Return the bytes of a row of blocks."""
    block = BLOCKS[kind]
    return width // block.elements * block.bytes


def pack_blocks(parts: Parts, format: Format, width: int) -> torch.Tensor:
    """Return the blocks of rows, u8[rows, bytes]; MoecError for scales that f16 does not hold."""
    codes = unpack_bits(parts["codes"], format.bits, width).unflatten(-1, (-1, _GROUP))
    if format.name == "mxfp4":
        return torch.cat([parts["scales"].view(torch.uint8).unsqueeze(-1), _nibbles(codes)], -1).flatten(1)
    times = format.group // _GROUP
    scales = parts["scales"].float().repeat_interleave(times, -1).unsqueeze(-1)
    if format.bits == 8:
        return torch.cat([_halves(scales), codes ^ 128], -1).flatten(1)
    if not format.zeros:
        return torch.cat([_halves(scales), _nibbles(codes)], -1).flatten(1)
    zeros = unpack_bits(parts["zeros"], format.bits, width // format.group).repeat_interleave(times, -1).unsqueeze(-1)
    # a code counts from the minimum there: w = scale code + minimum
    return torch.cat([_halves(scales), _halves(-scales * zeros), _nibbles(codes)], -1).flatten(1)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    low, high = codes.split(_GROUP // 2, -1)
    return low | (high << 4)


def _halves(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers as the bytes of f16."""
    found = numbers.half()
    if not found.isfinite().all():
        raise MoecError("a scale is larger than f16 holds", todo="leave the role of this weight as it is (role=f32)")
    return found.view(torch.uint8)
