"""Rows of a cache in 8 bits: E4M3 codes, and one f32 scale for the row of a token and head.

The scale is the row's largest number over the largest code. Scores are multiplied by it, and weights before the sum of
values, so that no number of a cache is multiplied by itself; MI300X's E4M3 has the same bits as others', at half.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..tile.builder import Builder
from .low_precision import FNUZ, LARGEST

CODES, SCALES = "f8e4m3", "f32"


def declare_cache(b: Builder, name: str, dtype: str, eight_bits: bool, *shape: int | str, role: str = "input") -> None:
    """Declare a cache of a program, one in 8 bits as its codes and scales."""
    if not eight_bits:
        b.tensor(name, dtype, *shape, role=role)
        return
    b.tensor(f"{name}_codes", CODES, *shape, role=role)
    b.tensor(f"{name}_scales", SCALES, *shape[:-1], 1, role=role)


def add_row_scale(b: Builder, tiles: Sequence[str]) -> None:
    """Add `by`, what rows are divided by: their numbers are in several tiles of f32, zeros where there are none."""
    most = f"max(abs({tiles[0]}), 1)"
    for tile in tiles[1:]:
        most = f"maximum({most}, max(abs({tile}), 1))"
    b.let("by", f"{most} / {LARGEST}")
    b.let("divisor", "where(by == 0.0, 1.0, by)")


def row_codes(value: str, bits: str) -> str:
    """Return the codes of a tile, over `divisor`; `bits` as in Packing."""
    rounded = f"({value}) / divisor[:, None]"
    return f'bitcast(cast({rounded} * 0.5, "{FNUZ}"), "{CODES}")' if bits == FNUZ else f'cast({rounded}, "{CODES}")'
