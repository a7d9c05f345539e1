"""Quantized storage: formats that are dtypes of weights, such as `uint4_g128`.

A format says how many bits a code has, how many codes along the last axis share a scale, and what a code means.
Only weights have such a dtype; an op that reads one computes with the numbers that the codes stand for, in f32.

    int4_g128   signed integers, one f32 scale for 128 codes along the last axis: w = scale q
    uint4_g128  the same with a zero point for each scale: w = scale (q - zero)
    mxfp4       E2M1, one power of two (E8M0) for 32 codes (OCP Microscaling Formats 1.0)
    nvfp4       E2M1, one E4M3 scale for 16 codes, times one f32 scale for the matrix
    fp8_b128    E4M3, one f32 scale for a block of 128 x 128
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

GROUPS = (16, 32, 64, 128, 256)
_INTEGER = re.compile(r"(u?)int([248])_g(\d+)")


@dataclass(frozen=True)
class Format:
    """A format; `group` codes along the last axis share a scale, for `rows` rows."""

    name: str
    bits: int
    group: int
    element: str = "int"  # int, e2m1 or e4m3
    zeros: bool = False  # a zero point for each scale
    rows: int = 1
    scale: str = "f32"
    tensor_scale: bool = False  # one more f32 scale for the whole matrix

    @property
    def bits_per_weight(self) -> Fraction:
        """Bits of one weight as stored, with its share of scales and zero points."""
        scale = {"f32": 32, "f8e8m0": 8, "f8e4m3": 8}[self.scale]
        return self.bits + Fraction(scale, self.group * self.rows) + Fraction(self.bits * self.zeros, self.group)


_FLOATS = {
    "mxfp4": Format("mxfp4", 4, 32, "e2m1", scale="f8e8m0"),
    "nvfp4": Format("nvfp4", 4, 16, "e2m1", scale="f8e4m3", tensor_scale=True),
    "fp8_b128": Format("fp8_b128", 8, 128, "e4m3", rows=128),
}


@lru_cache(maxsize=256)
def find_format(name: str) -> Format | None:
    """Return the format of a dtype name; None for a plain dtype and for an unknown name."""
    if name in _FLOATS:
        return _FLOATS[name]
    found = _INTEGER.fullmatch(name)
    if found is None or int(found[3]) not in GROUPS:
        return None
    return Format(name, int(found[2]), int(found[3]), zeros=bool(found[1]))


def format_of(name: str) -> Format:
    """Return the format of a dtype name; ValueError if no format has it."""
    found = find_format(name)
    if found is None:
        raise ValueError(f"{name} is no quantized format; there are {', '.join(FORMAT_NAMES)}")
    return found


FORMAT_NAMES = ("int2_gN", "int4_gN", "int8_gN", "uint2_gN", "uint4_gN", "uint8_gN", *_FLOATS)  # N: one of GROUPS
