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
CHUNK = 1 << 18  # numbers that are worked on at once, each with some 40 bytes beside it
_TINY = 1e-30


def encode(x: torch.Tensor, format: Format, tensor_scale: float | None) -> Parts:
    """Return the parts of f32[..., K]."""
    groups = x.reshape(-1, format.group)
    scales = search_scales(groups, format)
    codes = torch.empty(groups.shape, dtype=torch.uint8)
    for part in _group_chunks(groups):
        codes[part] = _look_up(_codes_of_cells(format), _cells_of(groups[part], scales[part].unsqueeze(-1), format))
    return stored_parts(codes.reshape(x.shape), (scales.reshape(*x.shape[:-1], -1),), format)


def search_scales(groups: torch.Tensor, format: Format, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Return for groups f32[N, G] the scales f32[N], as they are stored, with which they are rounded best.

    With `importance` f32[G] the square of the error of each column counts that much.
    """
    scales = torch.empty(len(groups))
    for part in _group_chunks(groups):
        scales[part] = _scales_of_chunk(groups[part], format, importance)
    return scales.to(_SCALES[format.scale]).float()


def _scales_of_chunk(groups: torch.Tensor, format: Format, importance: torch.Tensor | None) -> torch.Tensor:
    far = groups.abs().amax(-1, keepdim=True)
    unit = groups / torch.where(far == 0, 1.0, far)  # squares of numbers of any size would leave the range of f32
    gain, best = torch.full_like(far, -1.0), torch.zeros_like(far)
    counted = unit if importance is None else unit * importance
    for scale in _candidate_scales(unit, format):
        numbers = _look_up(_values_of_cells(format), _cells_of(unit, scale, format))
        product = (counted * numbers).sum(-1, keepdim=True)
        squares = numbers.square() if importance is None else numbers.square() * importance
        square = squares.sum(-1, keepdim=True).clamp_(min=_TINY)
        # the error of the scale of least squares is the sum of squares of the numbers less this
        found = product.square() / square
        gain, best = torch.maximum(gain, found), torch.where(found > gain, product / square, best)
    return (best * far).squeeze(-1)


def search_group(x: torch.Tensor, format: Format, importance: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what a group f32[N, G] is rounded with: its scale."""
    return (search_scales(x, format, importance),)


def round_column(
    column: torch.Tensor, settings: tuple[torch.Tensor, ...], format: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of f32[N] with what `search_group` found, and the numbers that they stand for."""
    (scale,) = settings
    cells = _cells_of(column, scale, format)
    return _look_up(_codes_of_cells(format), cells), _look_up(_values_of_cells(format), cells) * scale


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


def _group_chunks(groups: torch.Tensor) -> Iterator[slice]:
    """Yield slices of groups [N, G] that are worked on at once."""
    step = max(1, CHUNK // groups.shape[1])
    for start in range(0, len(groups), step):
        yield slice(start, start + step)


def _candidate_scales(x: torch.Tensor, format: Format) -> Iterator[torch.Tensor]:
    """Yield the scales [..., 1] that are tried for groups [..., G]."""
    far = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    for end, width in itertools.product((format.values[-1], format.values[0]), WIDTHS[format.bits]):
        yield far * (width / end)


# --- the nearest number, by tables: of a grid of whole numbers the half ways between neighbours are multiples of a half, so
# that all numbers of a cell of that width have the same code; searching among the half ways takes several times as long


def _cells_of(x: torch.Tensor, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """Return the cells i32 that numbers under a scale [..., 1] lie in."""
    size = x / torch.where(scale == 0, 1.0, scale)
    if not _is_whole(format):
        return torch.bucketize(size, _half_ways(format), out_int32=True)
    low, high = 2 * format.values[0], 2 * format.values[-1]
    return size.mul_(2).ceil_().clamp_(low, high).sub_(low).nan_to_num_().to(torch.int32)


def _look_up(table: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, cells.reshape(-1)).reshape(cells.shape)


def _is_whole(format: Format) -> bool:
    return all(value == int(value) for value in format.values)


def _half_ways(format: Format) -> torch.Tensor:
    values = _values_of_codes(format)
    return (values[1:] + values[:-1]) / 2


@lru_cache(maxsize=8)
def _codes_of_cells(format: Format) -> torch.Tensor:
    """Return the code u8 of each cell."""
    if not _is_whole(format):
        return torch.arange(len(format.values), dtype=torch.uint8)
    ends = torch.arange(2 * format.values[0], 2 * format.values[-1] + 1) / 2
    return torch.bucketize(ends, _half_ways(format)).to(torch.uint8)


@lru_cache(maxsize=8)
def _values_of_cells(format: Format) -> torch.Tensor:
    return _values_of_codes(format)[_codes_of_cells(format).int()]


@lru_cache(maxsize=8)
def _values_of_codes(format: Format) -> torch.Tensor:
    return torch.tensor(format.values, dtype=torch.float32)
