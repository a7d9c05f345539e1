"""Numbers to codes and back, for every format of `compiler.formats`: rounding to nearest, with a search for the scale.

For each group the range of the codes is tried at a few widths; for each width the scale is the one of least squares
for its codes, and the width with the smallest error is kept. Everything works on rows: `[..., K]`, groups along K.

What comes out are the parts that a target stores: `codes` u8[..., K bits / 8], packed along K, the first code in the
lowest bits, integers with half of their range added (so that 0 is stored as 8 for 4 bits); `scales` f32[..., K / G]
(or u8 of E8M0, or E4M3 for nvfp4); `zeros` u8[..., ceil(K / G bits / 8)], packed as the codes; `tensor_scale` f32[...], one for each matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ..code_steps import ELEMENTS
from ..formats import Format

Parts = Mapping[str, torch.Tensor]

# widths of the codes' range that are tried, as shares of the range of the numbers; fewer levels gain from clipping more
WIDTHS = {2: (1.0, 0.85, 0.7, 0.55), 4: (1.0, 0.9), 8: (1.0,)}
CHUNK = 1 << 19  # elements that are worked on at once: measured; fewer cost more calls, more leave the caches
_TINY = 1e-30

_E2M1 = torch.tensor(ELEMENTS["e2m1"])
# the least number that goes up at each half way between neighbours: half ways themselves go to the even code
_HALF_WAYS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_E2M1_STEPS = torch.where(torch.arange(7) % 2 == 0, _HALF_WAYS.nextafter(torch.tensor(6.0)), _HALF_WAYS)


def encode(x: torch.Tensor, format: Format, tensor_scale: float | None = None) -> Parts:
    """Return the parts of f32[..., K]; K is a multiple of the group. ValueError for numbers that are not finite.

    `tensor_scale` is what nvfp4 divides all scales by (computed from `x` if it is not given); fp8 blocks want x to
    hold whole blocks of rows.
    """
    if format.element == "int":
        parts = _encode_integers(x, format)
    elif format.rows > 1:
        parts = _encode_blocks(x, format)
    else:
        parts = _encode_e2m1(x, format, tensor_scale)
    if not torch.isfinite(parts["scales"].float()).all():
        raise ValueError("some numbers are infinite, not numbers, or too large")
    return parts


def decode(parts: Parts, format: Format, width: int) -> torch.Tensor:
    """Return the numbers f32[..., K] that parts stand for; `width` is K."""
    codes = unpack(parts["codes"], format.bits, width)
    if format.element == "int":
        numbers = codes.float().unflatten(-1, (-1, format.group))
        half = float(1 << (format.bits - 1))
        groups = width // format.group
        zeros = unpack(parts["zeros"], format.bits, groups).float() if format.zeros else torch.tensor(half)
        return ((numbers - zeros.unsqueeze(-1)) * parts["scales"].unsqueeze(-1)).flatten(-2)
    if format.element == "e4m3":
        scales = parts["scales"].repeat_interleave(format.group, dim=-1)[..., :width]
        scales = scales.repeat_interleave(format.rows, dim=-2)[..., : codes.shape[-2], :]
        return codes.view(torch.float8_e4m3fn).float() * scales
    scales = parts["scales"].view(torch.float8_e8m0fnu) if format.scale == "f8e8m0" else parts["scales"]
    numbers = _E2M1[codes.long()].unflatten(-1, (-1, format.group)) * scales.float().unsqueeze(-1)
    if format.tensor_scale:  # one for each matrix
        whole = parts["tensor_scale"]
        numbers = numbers * whole.reshape(*whole.shape, *(1 for _ in range(numbers.dim() - whole.dim())))
    return numbers.flatten(-2)


# --- packing ---------------------------------------------------------------------------------------------------


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack u8 codes along the last axis, the first in the lowest bits; the last byte is filled up with zeros."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    if extra := -codes.shape[-1] % per_byte:
        codes = torch.nn.functional.pad(codes, (0, extra))
    if not codes.numel():
        return codes[..., : codes.shape[-1] // per_byte]
    # the codes of a byte as one word, the first in its lowest bits: shifting the word brings the others beside it
    words = np.ascontiguousarray(codes.numpy()).view(f"<u{per_byte}")
    packed = words >> (8 - bits)
    packed |= words
    for i in range(2, per_byte):
        packed |= words >> (i * (8 - bits))
    return torch.from_numpy(packed.astype(np.uint8))


def unpack(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Return the first `width` codes of packed ones, as u8."""
    if bits == 8:
        return packed
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :width]


# --- integers --------------------------------------------------------------------------------------------------


def _encode_integers(x: torch.Tensor, format: Format) -> Parts:
    shape, group, bits = x.shape, format.group, format.bits
    flat = x.reshape(-1, group)
    codes = torch.empty(flat.shape[0], group * bits // 8, dtype=torch.uint8)
    scales = torch.empty(flat.shape[0])
    zeros = torch.empty(flat.shape[0] if format.zeros else 0)
    step = max(1, CHUNK // group)
    room = torch.empty(2, step, group)
    for start in range(0, flat.shape[0], step):
        part = flat[start : start + step]
        found, scale, zero = search(part, format, room)
        with np.errstate(invalid="ignore"):  # scales that are not finite are refused at the end
            whole = found.numpy().astype(np.uint8)  # six times as fast as torch's conversion
        codes[start : start + step] = pack(torch.from_numpy(whole), bits)
        scales[start : start + step] = scale
        if format.zeros:
            zeros[start : start + step] = zero
    parts = {
        "codes": codes.reshape(*shape[:-1], shape[-1] * bits // 8),
        "scales": scales.reshape(*shape[:-1], shape[-1] // group),
    }
    if format.zeros:
        parts["zeros"] = pack(zeros.to(torch.uint8).reshape(*shape[:-1], shape[-1] // group), bits)
    return parts


def search(
    x: torch.Tensor, format: Format, room: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes f32[N, G] (0 .. 2^bits - 1), scales f32[N] and zero points f32[N] of groups f32[N, G].

    For given codes c, the scale of least squares is s = (x c) / (c c), and the error is x x - (x c)^2 / (c c): the
    width with the largest (x c)^2 / (c c) is the best one. `room` is f32[2, N or more, G] to work in; the codes lie
    there. Fresh memory costs more than the arithmetic, for the system clears its pages.
    """
    top, count = float((1 << format.bits) - 1), len(x)
    low, high = x.amin(1), x.amax(1)  # twice as fast as aminmax
    if format.zeros:
        low, high = low.clamp_(max=0), high.clamp_(min=0)  # 0 stays a number that the codes can say
    else:
        low, high = _one_sided(low, high, top)
    widths = torch.tensor(WIDTHS[format.bits]).unsqueeze(1)
    scale = (high - low) * (widths / top)
    scale = torch.where(scale.abs() < _TINY, 1.0, scale)
    half = torch.full_like(scale, (top + 1) / 2)
    zero = (low * -widths / scale).round_().clamp_(0, top) if format.zeros else half
    factor = scale.reciprocal()
    codes, products = torch.empty(2, *x.shape) if room is None else room[:, :count]
    product, square = torch.empty(2, len(widths), count)
    for i in range(len(widths)):
        centred = _rounded(x, factor[i], zero[i], top, codes).sub_(zero[i].unsqueeze(1))
        torch.sum(torch.mul(x, centred, out=products), 1, out=product[i])
        torch.sum(torch.mul(centred, centred, out=products), 1, out=square[i])
    square.clamp_(min=_TINY)
    if len(widths) == 1:
        return codes.add_(zero[0].unsqueeze(1)), (product / square)[0], zero[0]
    candidates = torch.stack((product * product / square, product / square, factor, zero), 1)
    best = candidates[0]
    for found in candidates[1:]:
        best = torch.where(found[0] > best[0], found, best)
    _, scale, factor, zero = best
    # computing the chosen codes again is quicker than keeping those of every width
    return _rounded(x, factor, zero, top, codes), scale, zero


def _rounded(x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor, top: float, out: torch.Tensor) -> torch.Tensor:
    """Return the codes of groups f32[N, G] in `out`, for factors and zero points f32[N]."""
    return torch.mul(x, factor.unsqueeze(1), out=out).add_(zero.unsqueeze(1)).round_().clamp_(0, top)


def _one_sided(low: torch.Tensor, high: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a range whose lowest code is the number farthest from 0, which may make the scale negative.

    Signed codes reach one step farther below than above: -8 .. 7.
    """
    far = torch.where(-low > high, low, high)
    return far, far * -((top - 1) / (top + 1))


# --- floating-point codes ------------------------------------------------------------------------------------------


def _encode_e2m1(x: torch.Tensor, format: Format, tensor_scale: float | None) -> Parts:
    groups = x.unflatten(-1, (-1, format.group))
    largest = groups.abs().amax(dim=-1)
    parts: dict[str, torch.Tensor] = {}
    if format.tensor_scale:
        whole = float(largest.max()) / (6 * 448) if tensor_scale is None else tensor_scale
        whole = whole or 1.0
        scales = (largest / (6 * whole)).to(torch.float8_e4m3fn)
        parts["tensor_scale"] = torch.tensor(whole)
        values = scales.float() * whole
        stored = scales
    else:
        # the power of two under which the largest number is at most 6, or one below it where that errs less
        exponent = torch.ceil(torch.log2(largest / 6)).nan_to_num(neginf=-127).clamp(-127, 126)
        candidates = [exponent, (exponent - 1).clamp(min=-127)]
        errors = [(groups - _nearest_e2m1(groups, e.exp2())[1]).square().sum(-1) for e in candidates]
        exponent = torch.where(errors[1] < errors[0], candidates[1], candidates[0])
        values = exponent.exp2()
        stored = (exponent + 127).to(torch.uint8)
        if not torch.isfinite(largest).all():
            raise ValueError("some numbers are infinite or not numbers")
    codes, _ = _nearest_e2m1(groups, values)
    return {**parts, "codes": pack(codes.flatten(-2), 4), "scales": stored}


def _nearest_e2m1(groups: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes whose numbers are nearest, and those numbers; ties go to the even code."""
    scaled = groups / torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    codes = torch.bucketize(scaled.abs(), _E2M1_STEPS, right=True).to(torch.uint8)
    codes |= (scaled < 0).to(torch.uint8) << 3
    return codes, _E2M1[codes.long()] * scales.unsqueeze(-1)


def _encode_blocks(x: torch.Tensor, format: Format) -> Parts:
    rows, width = x.shape[-2:]
    extra = (0, -width % format.group, 0, -rows % format.rows)
    padded = torch.nn.functional.pad(x, extra)
    blocks = padded.unflatten(-1, (-1, format.group)).unflatten(-3, (-1, format.rows))
    scales = blocks.abs().amax(dim=(-3, -1)) / 448
    divisor = torch.where(scales == 0, 1.0, scales).unsqueeze(-1).unsqueeze(-3)
    codes = (blocks / divisor).to(torch.float8_e4m3fn).flatten(-4, -3).flatten(-2)
    return {"codes": codes[..., :rows, :width].contiguous().view(torch.uint8), "scales": scales}
