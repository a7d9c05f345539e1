"""The block types of GGUF and their parts: codes, scales and minimums, from the bytes as they lie in the file.

What reads a block type takes u8[blocks, bytes] and the part that is wanted, and returns u8[blocks, elements] of codes (unsigned,
half of the range added to signed ones) or f32[blocks, groups]. The layouts are those of ggml-common.h and
ggml-quants.c of llama.cpp: low and high nibbles hold codes that lie far apart, not beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..ir.deferred import torch

Part = Callable[["torch.Tensor", str], "torch.Tensor"]


@dataclass(frozen=True)
class Blocks:
    """A block type of GGUF: its elements and bytes, the elements that share a scale, what a code is, and how it is read."""

    elements: int
    bytes: int
    group: int
    bits: int
    read: Part
    element: str = "int"  # int, or a key of table.ELEMENTS
    minimums: bool = False  # w = scale q - minimum; without it half of the range is subtracted from a code


def _read_f16(raw: torch.Tensor, start: int) -> torch.Tensor:
    """Return the f16 at a byte as f32[blocks, 1]."""
    return raw[:, start : start + 2].contiguous().view(torch.float16).float()


def _split_nibbles(raw: torch.Tensor) -> torch.Tensor:
    """Return the low nibbles of the bytes along the last axis, then the high ones."""
    return torch.cat([raw & 15, raw >> 4], dim=-1)


def _bit_rows(raw: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes in the lowest bits of all bytes, then those above them, and so on up to the highest."""
    return torch.cat([(raw >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], dim=-1)


def _fifth_bit(raw: torch.Tensor) -> torch.Tensor:
    """Return bit i of a little-endian word of 32 bits as element i, at the place of the fifth bit of a code."""
    return (((raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1) << 4).flatten(-2)


def _q4_0(raw: torch.Tensor, part: str) -> torch.Tensor:
    return _split_nibbles(raw[:, 2:]) if part == "codes" else _read_f16(raw, 0)


def _q4_1(raw: torch.Tensor, part: str) -> torch.Tensor:
    if part == "codes":
        return _split_nibbles(raw[:, 4:])
    return _read_f16(raw, 0) if part == "scales" else -_read_f16(raw, 2)


def _q5_0(raw: torch.Tensor, part: str) -> torch.Tensor:
    return _split_nibbles(raw[:, 6:]) | _fifth_bit(raw[:, 2:6]) if part == "codes" else _read_f16(raw, 0)


def _q5_1(raw: torch.Tensor, part: str) -> torch.Tensor:
    if part == "codes":
        return _split_nibbles(raw[:, 8:]) | _fifth_bit(raw[:, 4:8])
    return _read_f16(raw, 0) if part == "scales" else -_read_f16(raw, 2)


def _q8_0(raw: torch.Tensor, part: str) -> torch.Tensor:
    return raw[:, 2:] ^ 128 if part == "codes" else _read_f16(raw, 0)


def _read_mxfp4(raw: torch.Tensor, part: str) -> torch.Tensor:
    return _split_nibbles(raw[:, 1:]) if part == "codes" else raw[:, :1].contiguous().view(torch.float8_e8m0fnu).float()


def _q2_k(raw: torch.Tensor, part: str) -> torch.Tensor:
    """16 bytes of scale (low) and minimum (high nibble), 64 bytes of codes, d, dmin."""
    if part == "codes":
        return _bit_rows(raw[:, 16:80].unflatten(1, (2, 32)), 2).flatten(1)
    if part == "scales":
        return _read_f16(raw, 80) * (raw[:, :16] & 15).float()
    return _read_f16(raw, 82) * (raw[:, :16] >> 4).float()


def _q3_k(raw: torch.Tensor, part: str) -> torch.Tensor:
    """32 bytes of third bits, 64 bytes of codes, 12 bytes of scales of 6 bits less 32, d."""
    if part == "codes":
        third = _bit_rows(raw[:, :32], 1) << 2
        return _bit_rows(raw[:, 32:96].unflatten(1, (2, 32)), 2).flatten(1) | third
    low, high = _split_nibbles(raw[:, 96:104]), _bit_rows(raw[:, 104:108], 2)
    return _read_f16(raw, 108) * ((low | (high << 4)).float() - 32)


def _unpack_six_bits(raw: torch.Tensor, part: str) -> torch.Tensor:
    """Return the eight scales or minimums of 6 bits in 12 bytes as f32[blocks, 8].

    Four stand in the low bits of bytes 0 to 3 (minimums: 4 to 7), whose two high bits belong to the other four;
    the low bits of these are the low (minimums: high) nibbles of bytes 8 to 11.
    """
    own = raw[:, :4] if part == "scales" else raw[:, 4:8]
    rest = raw[:, 8:12] & 15 if part == "scales" else raw[:, 8:12] >> 4
    return torch.cat([own & 63, rest | ((own >> 6) << 4)], dim=1).float()


def _q4_k(raw: torch.Tensor, part: str) -> torch.Tensor:
    """d, dmin, 12 bytes of scales and minimums, 128 bytes of codes in fours of 32."""
    if part == "codes":
        return _split_nibbles(raw[:, 16:].unflatten(1, (4, 32))).flatten(1)
    return _read_f16(raw, 0 if part == "scales" else 2) * _unpack_six_bits(raw[:, 4:16], part)


def _q5_k(raw: torch.Tensor, part: str) -> torch.Tensor:
    """As q4_k, with 32 bytes of fifth bits before the codes."""
    if part == "codes":
        fifth = _bit_rows(raw[:, 16:48], 1) << 4
        return _split_nibbles(raw[:, 48:].unflatten(1, (4, 32))).flatten(1) | fifth
    return _q4_k(raw, part)


def _q6_k(raw: torch.Tensor, part: str) -> torch.Tensor:
    """128 bytes of low nibbles, 64 bytes of two high bits, 16 scales i8, d."""
    if part == "codes":
        low = _split_nibbles(raw[:, :128].unflatten(1, (2, 64)))
        high = _bit_rows(raw[:, 128:192].unflatten(1, (2, 32)), 2)
        return (low | (high << 4)).flatten(1)
    return _read_f16(raw, 208) * raw[:, 192:208].view(torch.int8).float()


# ggml-common.h of llama.cpp has the structs
BLOCKS: Mapping[str, Blocks] = {
    "q4_0": Blocks(32, 18, 32, 4, _q4_0),
    "q4_1": Blocks(32, 20, 32, 4, _q4_1, minimums=True),
    "q5_0": Blocks(32, 22, 32, 5, _q5_0),
    "q5_1": Blocks(32, 24, 32, 5, _q5_1, minimums=True),
    "q8_0": Blocks(32, 34, 32, 8, _q8_0),
    "q2_k": Blocks(256, 84, 16, 2, _q2_k, minimums=True),
    "q3_k": Blocks(256, 110, 16, 3, _q3_k),
    "q4_k": Blocks(256, 144, 32, 4, _q4_k, minimums=True),
    "q5_k": Blocks(256, 176, 32, 5, _q5_k, minimums=True),
    "q6_k": Blocks(256, 210, 16, 6, _q6_k),
    "mxfp4": Blocks(32, 17, 32, 4, _read_mxfp4, "e2m1"),
    "iq4_nl": Blocks(32, 18, 32, 4, _q4_0, "iq4_nl"),
}
