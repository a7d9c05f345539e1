"""Bounds on the error of rounding a weight to a format, derived from the format and the numbers, not measured.

The error of a rounded number has two parts (Gersho and Gray, Vector Quantization and Signal Compression, chapter 5).
Within the range of the grid it is at most half the cell that the number falls in, and its mean square over many numbers
is cell^2 / 12; beyond the range it is the distance to the range's end (overload). The cell of integers of b bits is
range / (2^b - 1); that of a float with m bits after the point is 2^(exponent - m). Encoders try several widths of the
range for each group and keep the best one, so that the least of what the widths promise holds for each group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..formats.encode import WIDTHS
from ..ir.storage import Format

# of what the formulas give: a zero point and the scales of nvfp4 are rounded themselves, and few numbers are no mean
MARGIN = 1.2
_MANTISSA = {"e2m1": (1, 6.0, 0), "e4m3": (3, 448.0, -6)}  # bits after the point, largest number, least exponent
# half a cell of 2 bits is more than half of most numbers: only the mean tells such a weight from one twice as large
_HELD_TO_MEAN = 2


def rounding_bounds(numbers: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest norms f64 of the errors of f32[..., N, K] that honest rounding leaves: of matrices, and of rows."""
    groups = numbers.double()
    groups = groups.unsqueeze(-2) if format.rows > 1 else groups.unflatten(-1, (-1, format.group))
    candidates = _integers(groups, format) if format.element == "int" else _floats(groups, format)
    found = [(c.square() / 12 + o.square(), (c / 2 + o).square()) for c, o in candidates]
    mean, most = (torch.stack([pair[i].sum(-1) for pair in found]).amin(0).sum(-1) for i in range(2))
    whole = (mean if format.bits <= _HELD_TO_MEAN else most).sum(-1)
    return whole.sqrt() * MARGIN, most.sqrt() * MARGIN


Cells = Iterator[
    tuple[torch.Tensor, torch.Tensor]
]  # for each width of the range: cells, and how far numbers lie beyond


def _integers(x: torch.Tensor, format: Format) -> Cells:
    for width in WIDTHS[format.bits]:
        if format.zeros:  # 0 is always in the range
            low, high = x.amin(-1, keepdim=True).clamp(max=0) * width, x.amax(-1, keepdim=True).clamp(min=0) * width
            cell = (high - low) / (2**format.bits - 1)
        else:  # the number farthest from 0 is one end; the range reaches a cell less far on the other side of 0
            end = x.gather(-1, x.abs().argmax(-1, keepdim=True)) * width
            cell = end.abs() / 2 ** (format.bits - 1)
            other = -end.sign() * (end.abs() - cell)
            low, high = torch.minimum(end, other), torch.maximum(end, other)
        yield cell.expand_as(x), (low - x).clamp(min=0) + (x - high).clamp(min=0)


def _floats(x: torch.Tensor, format: Format) -> Cells:
    bits, largest, least = _MANTISSA[format.element]
    far = x.abs().amax(-1, keepdim=True) if format.rows == 1 else x.abs().amax((-3, -1), keepdim=True)
    scales = [far / largest]
    if format.scale == "f8e8m0":
        power = (far / largest).log2().ceil().exp2()
        scales = [power, power / 2]
    for scale in scales:
        size = (x.abs() / scale).nan_to_num(0.0)
        exponent = size.clamp(min=2.0**least, max=largest).log2().floor()
        yield (exponent - bits).exp2() * scale, (size - largest).clamp(min=0) * scale
