"""E2M1, floats of four bits, in groups: under a power of two, or under an E4M3 scale and one scale for the matrix."""

from __future__ import annotations

from functools import lru_cache

import torch

from .bounds import float_cells
from .format import Cells, Format, Parts
from .packing import pack_bits, unpack_bits

_LARGEST = 6.0
# the least number that goes up at each half way between neighbours: half ways themselves go to the even code
_HALF_WAYS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_STEPS = torch.where(torch.arange(7) % 2 == 0, _HALF_WAYS.nextafter(torch.tensor(_LARGEST)), _HALF_WAYS)


def encode(x: torch.Tensor, format: Format, tensor_scale: float | None) -> Parts:
    """Return the parts of f32[..., K]; `tensor_scale` is computed from them if it is not given."""
    groups = x.unflatten(-1, (-1, format.group))
    largest = groups.abs().amax(dim=-1)
    parts: dict[str, torch.Tensor] = {}
    if format.tensor_scale:
        whole = float(largest.max()) / format.tensor_scale if tensor_scale is None else tensor_scale
        whole = whole or 1.0
        scales = (largest / (_LARGEST * whole)).to(torch.float8_e4m3fn)
        parts["tensor_scale"] = torch.tensor(whole)
        values = scales.float() * whole
        stored = scales
    else:
        # the power of two under which the largest number is at most 6, or one below it where that errs less
        exponent = torch.ceil(torch.log2(largest / _LARGEST)).nan_to_num(neginf=-127).clamp(-127, 126)
        candidates = [exponent, (exponent - 1).clamp(min=-127)]
        errors = [(groups - _nearest_codes(groups, e.exp2(), format)[1]).square().sum(-1) for e in candidates]
        exponent = torch.where(errors[1] < errors[0], candidates[1], candidates[0])
        values = exponent.exp2()
        stored = (exponent + 127).to(torch.uint8)
        if not torch.isfinite(largest).all():
            raise ValueError("some numbers are infinite or not numbers")
    codes, _ = _nearest_codes(groups, values, format)
    return {**parts, "codes": pack_bits(codes.flatten(-2), 4), "scales": stored}


def decode(parts: Parts, format: Format, width: int) -> torch.Tensor:
    """Return the numbers f32[..., K] that parts stand for."""
    codes = unpack_bits(parts["codes"], format.bits, width)
    scales = parts["scales"].view(torch.float8_e8m0fnu) if format.scale == "f8e8m0" else parts["scales"]
    numbers = _values_of_codes(format)[codes.long()].unflatten(-1, (-1, format.group)) * scales.float().unsqueeze(-1)
    if format.tensor_scale:  # one for each matrix
        whole = parts["tensor_scale"]
        numbers = numbers * whole.reshape(*whole.shape, *(1 for _ in range(numbers.dim() - whole.dim())))
    return numbers.flatten(-2)


def cells(x: torch.Tensor, format: Format) -> Cells:
    """Yield the cells of numbers f64[..., G] in groups, and how far they lie beyond the last code."""
    scale = x.abs().amax(-1, keepdim=True) / _LARGEST
    if format.scale == "f8e8m0":
        power = scale.log2().ceil().exp2()
        yield from (float_cells(x, s, 1, _LARGEST, 0) for s in (power, power / 2))
    else:
        yield float_cells(x, scale, 1, _LARGEST, 0)


def _nearest_codes(groups: torch.Tensor, scales: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes whose numbers are nearest, and those numbers; ties go to the even code."""
    scaled = groups / torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    codes = torch.bucketize(scaled.abs(), _STEPS, right=True).to(torch.uint8)
    codes |= (scaled < 0).to(torch.uint8) << 3
    return codes, _values_of_codes(format)[codes.long()] * scales.unsqueeze(-1)


@lru_cache(maxsize=8)
def _values_of_codes(format: Format) -> torch.Tensor:
    return torch.tensor(format.values)
