"""Encode numbers as the codes of a format, and decode them: rounding to nearest, with a search for the scale.

For each group the range of the codes is tried at a few widths; for each width the scale is the one of least squares
for its codes, and the width with the smallest error is kept. Everything works on rows: `[..., K]`, groups along K.

What comes out are the parts that a target stores: `codes` u8[..., K bits / 8], packed along K, the first code in the
lowest bits, integers with half of their range added (so that 0 is stored as 8 for 4 bits); `scales` f32[..., K / G]
(or u8 of E8M0, or E4M3 for nvfp4); `zeros` u8[..., ceil(K / G bits / 8)], packed as the codes; `tensor_scale` f32[...], one for each matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from ..ir.code_steps import ELEMENTS
from ..ir.storage import Format

Parts = Mapping[str, torch.Tensor]

# widths of the codes' range that are tried, as shares of the range of the numbers; fewer levels gain from clipping more
WIDTHS = {2: (1.0, 0.85, 0.7, 0.55), 4: (1.0, 0.9), 8: (1.0,)}
CHUNK = 1 << 18  # elements that are worked on at once: measured; fewer cost more calls, more leave the caches
_TINY = 1e-30
# f32 of this size are integers: adding it rounds, half ways to the even one, and leaves the integer in the lowest bits
_ROUND = 1.5 * 2**23

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
    shape, bits = x.shape, format.bits
    flat = x.reshape(-1, format.group)
    factor, scale, zero = search(flat, format)
    codes = torch.empty(len(flat), format.group * bits // 8, dtype=torch.uint8)
    for part, room in _chunks(flat):
        rounded = _rounded(flat[part], factor[part], zero[part], format, room)
        lowest = rounded.numpy().view(np.int32).astype(np.uint8)  # the bits of a code, see _ROUND
        codes[part] = pack(torch.from_numpy(lowest), bits)
    parts = {
        "codes": codes.reshape(*shape[:-1], shape[-1] * bits // 8),
        "scales": scale.reshape(*shape[:-1], shape[-1] // format.group),
    }
    if format.zeros:
        parts["zeros"] = pack(zero.to(torch.uint8).reshape(*shape[:-1], shape[-1] // format.group), bits)
    return parts


def search(x: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return for groups f32[N, G] the factor, scale and zero point f32[N] with which they are rounded best.

    The codes are round(x factor + zero) in 0 .. 2^bits - 1, and stand for (codes - zero) scale. For given codes c
    around the zero point the scale of least squares is s = (x c) / (c c), and the error is x x - (x c)^2 / (c c): the
    width with the largest (x c)^2 / (c c) is the best one.
    """
    top, count = float((1 << format.bits) - 1), len(x)
    low, high = torch.empty(2, count)
    for part, _ in _chunks(x):
        torch.amin(x[part], 1, out=low[part])  # twice as fast as aminmax
        torch.amax(x[part], 1, out=high[part])
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
    product, square = torch.empty(2, *scale.shape)
    for part, room in _chunks(x):
        for i in range(len(widths)):
            centred = _rounded(x[part], factor[i, part], zero[i, part], format, room)
            centred -= (zero[i, part] + _ROUND).unsqueeze(1)
            _dot(x[part], centred, product[i, part])
            torch.linalg.vector_norm(centred, dim=1, out=square[i, part])
    square.square_().clamp_(min=_TINY)
    candidates = torch.stack((product * product / square, factor, product / square, zero), 1)
    best = candidates[0]
    for found in candidates[1:]:
        best = torch.where(found[0] > best[0], found, best)
    _, factor, scale, zero = best
    return factor, scale, zero


def _chunks(x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield slices of groups [N, G] that are worked on at once, each with a tensor of its size to work in.

    They share that memory: fresh memory costs more than the arithmetic, for the system clears its pages.
    """
    step = max(1, CHUNK // x.shape[1])
    room = torch.empty(min(step, len(x)), x.shape[1])
    for start in range(0, len(x), step):
        stop = min(start + step, len(x))
        yield slice(start, stop), room[: stop - start]


def _rounded(
    x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor, format: Format, room: torch.Tensor
) -> torch.Tensor:
    """Return _ROUND plus the codes of groups f32[N, G], made in `room`, for factors and zero points f32[N]."""
    torch.mul(x, factor.unsqueeze(1), out=room)
    return room.add_((zero + _ROUND).unsqueeze(1)).clamp_(_ROUND, _ROUND + (1 << format.bits) - 1)


def _dot(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Put the inner products of the rows of [N, G] in `out`; in torch a product and a sum pass over memory thrice."""
    np.einsum("ng,ng->n", a.numpy(), b.numpy(), out=out.numpy())


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
