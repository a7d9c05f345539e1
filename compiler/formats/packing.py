"""Codes of 2, 3, 4 and 8 bits packed into bytes, and taken out of them.

Codes of 3 bits are stored as two rows of codes: their lower two bits, and behind those of the whole row their highest one.
"""

from __future__ import annotations

import numpy as np
import torch


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack u8 codes along the last axis, the first in the lowest bits; the last byte is filled up with zeros."""
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat((pack_bits(codes & 3, 2), pack_bits(codes >> 2, 1)), -1)
    per_byte = 8 // bits
    if extra := -codes.shape[-1] % per_byte:
        codes = torch.nn.functional.pad(codes, (0, extra))
    if not codes.numel():
        return codes[..., : codes.shape[-1] // per_byte]
    # the codes of a byte as one word, the first in its lowest bits: shifting the word brings the others beside it
    words = np.ascontiguousarray(codes.numpy()).view(f"<u{per_byte}")
    packed = words >> (8 - bits)
    packed |= words
    for i in range(2, per_byte):
        packed |= words >> (i * (8 - bits))
    return torch.from_numpy(packed.astype(np.uint8))


def unpack_bits(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Return the first `width` codes of packed ones, as u8."""
    if bits == 8:
        return packed
    if bits == 3:
        low, high = packed.split((-(-width // 4), -(-width // 8)), -1)
        return unpack_bits(low, 2, width) | unpack_bits(high, 1, width) << 2
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :width]
