"""Bounds on the error of rounding a weight to a format, derived from the format and the numbers, not measured.

The error of a rounded number has two parts (Gersho and Gray, Vector Quantization and Signal Compression, chapter 5).
Within the range of the grid it is at most half the cell that the number falls in, and its mean square over many numbers
is cell^2 / 12; beyond the range it is the distance to the range's end (overload). The cell of integers of b bits is
range / (2^b - 1); that of a float with m bits after the point is 2^(exponent - m). Encoders try several widths of the
range for each group and keep the best one, so that the least of what the widths promise holds for each group.
"""

from __future__ import annotations

import torch

from .format import Format

# of what the formulas give: a zero point and the scales of nvfp4 are rounded themselves, and few numbers are no mean
MARGIN = 1.2
# half a cell of 2 bits is more than half of most numbers: only the mean tells such a weight from one twice as large
_HELD_TO_MEAN = 2


def rounding_bounds(numbers: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest norms f64 of the errors of f32[..., N, K] that honest rounding leaves: of matrices, and of rows."""
    groups = numbers.double()
    groups = groups.unsqueeze(-2) if format.rows > 1 else groups.unflatten(-1, (-1, format.group))
    found = [(c.square() / 12 + o.square(), (c / 2 + o).square()) for c, o in format.codec().cells(groups, format)]
    mean, most = (torch.stack([pair[i].sum(-1) for pair in found]).amin(0).sum(-1) for i in range(2))
    whole = (mean if format.bits <= _HELD_TO_MEAN else most).sum(-1)
    return whole.sqrt() * MARGIN, most.sqrt() * MARGIN


def float_cells(
    x: torch.Tensor, scale: torch.Tensor, mantissa: int, largest: float, least: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cells of floats times a scale, and how far numbers lie beyond the largest.

    The floats have `mantissa` bits after the point and exponents from `least` on.
    """
    size = (x.abs() / scale).nan_to_num(0.0)
    exponent = size.clamp(min=2.0**least, max=largest).log2().floor()
    return (exponent - mantissa).exp2() * scale, (size - largest).clamp(min=0) * scale
