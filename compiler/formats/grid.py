"""Grids of numbers at unequal distances, in groups: the nearest number of a table times a scale, with a search for it.

For each group the number farthest from 0 is taken to one end of the grid and to the other, and a little beyond; for
each of these the scale is the one of least squares for its codes, and the scale with the smallest error is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import torch

from .format import Cells, Format, Parts
from .packing import pack_bits, unpack_bits

WIDTHS = {3: (1.0, 0.85, 0.7), 4: (1.0, 0.9)}  # of the grid, as shares of the range of the numbers
_SCALES = {"bf16": torch.bfloat16}
_TINY = 1e-30


def encode(x: torch.Tensor, format: Format, tensor_scale: float | None) -> Parts:
    """Return the parts of f32[..., K]."""
    groups = x.unflatten(-1, (-1, format.group))
    scales = search_scales(groups, format)
    codes = _nearest_codes(groups, scales.unsqueeze(-1), format)
    return stored_parts(codes.to(torch.uint8).flatten(-2), (scales,), format)


def search_scales(groups: torch.Tensor, format: Format, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Return for groups f32[..., G] the scales f32[...], as they are stored, with which they are rounded best.

    With `importance` f32[G] the square of the error of each column counts that much.
    """
    far = groups.abs().amax(-1, keepdim=True)
    unit = groups / torch.where(far == 0, 1.0, far)  # squares of numbers of any size would leave the range of f32
    gain, best = torch.full_like(far, -1.0), torch.zeros_like(far)
    counted = unit if importance is None else unit * importance
    for scale in _candidate_scales(unit, format):
        numbers = _values_of_codes(format)[_nearest_codes(unit, scale, format)]
        product = (counted * numbers).sum(-1, keepdim=True)
        squares = numbers.square() if importance is None else numbers.square() * importance
        square = squares.sum(-1, keepdim=True).clamp_(min=_TINY)
        # the error of the scale of least squares is the sum of squares of the numbers less this
        found = product.square() / square
        gain, best = torch.maximum(gain, found), torch.where(found > gain, product / square, best)
    return (best * far).squeeze(-1).to(_SCALES[format.scale]).float()


def search_group(x: torch.Tensor, format: Format, importance: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what a group f32[N, G] is rounded with: its scale."""
    return (search_scales(x, format, importance),)


def round_column(
    column: torch.Tensor, settings: tuple[torch.Tensor, ...], format: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of f32[N] with what `search_group` found, and the numbers that they stand for."""
    (scale,) = settings
    codes = _nearest_codes(column, scale, format)
    return codes, _values_of_codes(format)[codes] * scale


def stored_parts(codes: torch.Tensor, settings: tuple[torch.Tensor, ...], format: Format) -> Parts:
    """Return the parts of codes u8[..., K] and what their groups were rounded with, [..., K / group]."""
    return {"codes": pack_bits(codes, format.bits), "scales": settings[0].to(_SCALES[format.scale])}


def decode(parts: Parts, format: Format, width: int) -> torch.Tensor:
    """Return the numbers f32[..., K] that parts stand for."""
    codes = unpack_bits(parts["codes"], format.bits, width).int()
    numbers = _values_of_codes(format)[codes].unflatten(-1, (-1, format.group))
    return (numbers * parts["scales"].float().unsqueeze(-1)).flatten(-2)


def cells(x: torch.Tensor, format: Format) -> Cells:
    """Yield the cells of numbers f64[..., G] in groups, and how far they lie beyond the ends of the grid."""
    values = _values_of_codes(format).double()
    for scale in _candidate_scales(x, format):
        size = (x / scale).nan_to_num(0.0)
        above = torch.bucketize(size, values).clamp_(1, len(values) - 1)
        beyond = (values[0] - size).clamp(min=0) + (size - values[-1]).clamp(min=0)
        yield (values[above] - values[above - 1]) * scale.abs(), beyond * scale.abs()


def _candidate_scales(x: torch.Tensor, format: Format) -> Iterator[torch.Tensor]:
    """Yield the scales [..., 1] that are tried for groups [..., G]."""
    far = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    for end, width in itertools.product((format.values[-1], format.values[0]), WIDTHS[format.bits]):
        yield far * (width / end)


def _nearest_codes(x: torch.Tensor, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """Return the codes of the numbers that are nearest under a scale [..., 1]."""
    values = _values_of_codes(format)
    return torch.bucketize(x / torch.where(scale == 0, 1.0, scale), (values[1:] + values[:-1]) / 2)


@lru_cache(maxsize=8)
def _values_of_codes(format: Format) -> torch.Tensor:
    return torch.tensor(format.values, dtype=torch.float32)
