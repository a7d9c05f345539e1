"""The stored formats that there are: dtypes of weights, such as `uint4_g128`.

int4_g128   signed integers, one f32 scale for 128 codes along the last axis: w = scale q
uint4_g128  the same with a zero point for each scale: w = scale (q - zero)
mxfp4       E2M1, one power of two (E8M0) for 32 codes (OCP Microscaling Formats 1.0)
nvfp4       E2M1, one E4M3 scale for 16 codes, times one f32 scale for the matrix
fp8_b128    E4M3, one f32 scale for a block of 128 x 128
mxfp8       E4M3, one power of two for 32 codes (OCP Microscaling Formats 1.0)
fp8_g128    E4M3, one f32 scale for 128 codes: what activations are rounded to before such a weight
grid4_g64   16 whole numbers at unequal distances, one bf16 scale for 64 codes; grid3_g64 the same with 8 numbers
nf4         quantiles of the normal distribution, one bf16 scale for 64 codes (QLoRA, Dettmers et al. 2023)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from .format import Codec, Format

GROUPS = (16, 32, 64, 128, 256)
INTEGER_BITS = (2, 4, 8)
GRID_BITS = (3, 4)

# numbers that codes stand for: E2M1 (OCP Microscaling Formats 1.0); the tables of IQ4_NL (ggml-common.h) and of NF4
# (QLoRA, appendix E). Those of grid3 and grid4 are what Lloyd's algorithm (1982) finds for the least squared error on
# normal numbers divided by the one of 32 that is farthest from 0, times what makes the last 127, rounded: a kernel
# multiplies them as int8
ELEMENTS: Mapping[str, tuple[float, ...]] = {
    "e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
    "grid3": (-105, -66, -35, -7, 19, 48, 82, 127),
    "grid4": (-114, -92, -74, -57, -43, -29, -16, -3, 9, 22, 35, 49, 65, 82, 102, 127),
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
}  # fmt: skip


def _integer_codec() -> Codec:
    from . import integers

    return integers


def _e2m1_codec() -> Codec:
    from . import e2m1

    return e2m1


def _e4m3_codec() -> Codec:
    from . import e4m3

    return e4m3


def _grid_codec() -> Codec:
    from . import grid

    return grid


_NAMED = {
    f.name: f
    for f in (
        Format("mxfp4", 4, 32, _e2m1_codec, "e2m1", ELEMENTS["e2m1"], scale="f8e8m0"),
        Format("nvfp4", 4, 16, _e2m1_codec, "e2m1", ELEMENTS["e2m1"], scale="f8e4m3", tensor_scale=6 * 448),
        Format("fp8_b128", 8, 128, _e4m3_codec, "e4m3", rows=128),
        Format("fp8_g128", 8, 128, _e4m3_codec, "e4m3"),
        Format("mxfp8", 8, 32, _e4m3_codec, "e4m3", scale="f8e8m0"),
        Format("nf4", 4, 64, _grid_codec, "nf4", ELEMENTS["nf4"], scale="bf16"),
    )
}
NAMED: tuple[Format, ...] = tuple(_NAMED.values())  # the formats that are no integers
FORMAT_NAMES = (
    *(f"{sign}int{bits}_gN" for sign in ("", "u") for bits in INTEGER_BITS), *(f"grid{bits}_gN" for bits in GRID_BITS), *_NAMED,
)  # fmt: skip  # N: one of GROUPS


def integers_of(bits: int, group: int, zeros: bool) -> Format:
    """Return the format of integers with any group."""
    return Format(f"{'u' * zeros}int{bits}_g{group}", bits, group, _integer_codec, zeros=zeros)


@lru_cache(maxsize=256)
def find_format(name: str) -> Format | None:
    """Return the format of a dtype name; None for a plain dtype and for an unknown name."""
    if name in _NAMED:
        return _NAMED[name]
    found = re.fullmatch(r"(u?int|grid)(\d+)_g(\d+)", name)
    if found is None or int(found[3]) not in GROUPS:
        return None
    kind, bits, group = found[1], int(found[2]), int(found[3])
    if kind == "grid":
        table = f"grid{bits}"
        return (
            Format(name, bits, group, _grid_codec, table, ELEMENTS[table], scale="bf16") if bits in GRID_BITS else None
        )
    return integers_of(bits, group, kind == "uint") if bits in INTEGER_BITS else None


def format_of(name: str) -> Format:
    """Return the format of a dtype name; ValueError if no format has it."""
    found = find_format(name)
    if found is None:
        raise ValueError(f"{name} is no quantized format; there are {', '.join(FORMAT_NAMES)}")
    return found
