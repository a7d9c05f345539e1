"""E4M3, floats of eight bits, in blocks of rows and columns that share a scale: any number, or a power of two (E8M0)."""

from __future__ import annotations

import torch

from .bounds import float_cells
from .format import Cells, Format, Parts

_LARGEST = 448
_BELOW = (1 << 23) - 1  # what raises an f32 that is no power of two to the next exponent


def encode(x: torch.Tensor, format: Format, tensor_scale: float | None) -> Parts:
    """Return the parts of f32[..., N, K], which hold whole blocks of rows."""
    rows, width = x.shape[-2:]
    extra = (0, -width % format.group, 0, -rows % format.rows)
    padded = torch.nn.functional.pad(x, extra)
    blocks = padded.unflatten(-1, (-1, format.group)).unflatten(-3, (-1, format.rows))
    stored = scales = blocks.abs().amax(dim=(-3, -1)) / _LARGEST
    if format.scale == "f8e8m0":
        if not scales.isfinite().all():
            raise ValueError("some numbers are infinite or not numbers")
        exponents = (
            scales.view(torch.int32) + _BELOW
        ) >> 23  # rounded up, so that no number is beyond the largest code
        stored, scales = exponents.to(torch.uint8), (exponents << 23).view(torch.float32)
    divisor = torch.where(scales == 0, 1.0, scales).unsqueeze(-1).unsqueeze(-3)
    codes = (blocks / divisor).to(torch.float8_e4m3fn).flatten(-4, -3).flatten(-2)
    return {"codes": codes[..., :rows, :width].contiguous().view(torch.uint8), "scales": stored}


def decode(parts: Parts, format: Format, width: int) -> torch.Tensor:
    """Return the numbers f32[..., N, K] that parts stand for."""
    codes = parts["codes"]
    scales = parts["scales"].view(torch.float8_e8m0fnu).float() if format.scale == "f8e8m0" else parts["scales"]
    scales = scales.repeat_interleave(format.group, dim=-1)[..., :width]
    scales = scales.repeat_interleave(format.rows, dim=-2)[..., : codes.shape[-2], :]
    return codes.view(torch.float8_e4m3fn).float() * scales


def cells(x: torch.Tensor, format: Format) -> Cells:
    """Yield the cells of numbers f64[..., N, 1, K], and how far they lie beyond the last code."""
    scale = x.abs().amax((-3, -1), keepdim=True) / _LARGEST
    yield float_cells(x, scale.log2().ceil().exp2() if format.scale == "f8e8m0" else scale, 3, _LARGEST, -6)
