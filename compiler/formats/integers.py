"""Integers in groups: rounding to nearest, with a search for the scale.

For each group the range of the codes is tried at a few widths; for each width the scale is the one of least squares
for its codes, and the width with the smallest error is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from .format import Cells, Format, Parts
from .packing import pack_bits, unpack_bits

# widths of the codes' range that are tried, as shares of the range of the numbers; fewer levels gain from clipping more
WIDTHS = {2: (1.0, 0.85, 0.7, 0.55), 4: (1.05, 1.0, 0.95, 0.9, 0.85), 8: (1.0,)}
CHUNK = 1 << 18  # elements that are worked on at once: measured; fewer cost more calls, more leave the caches
_TINY = 1e-30
# f32 of this size are integers: adding it rounds, half ways to the even one, and leaves the integer in the lowest bits
_ROUND = 1.5 * 2**23


def encode(x: torch.Tensor, format: Format, tensor_scale: float | None) -> Parts:
    """Return the parts of f32[..., K]."""
    shape, bits = x.shape, format.bits
    flat = x.reshape(-1, format.group)
    factor, scale, zero = search_scales(flat, format)
    codes = torch.empty(len(flat), format.group * bits // 8, dtype=torch.uint8)
    for part, room in _group_chunks(flat):
        rounded = _round_groups(flat[part], factor[part], zero[part], format, room)
        lowest = rounded.numpy().view(np.int32).astype(np.uint8)  # the bits of a code, see _ROUND
        codes[part] = pack_bits(torch.from_numpy(lowest), bits)
    parts = {
        "codes": codes.reshape(*shape[:-1], shape[-1] * bits // 8),
        "scales": scale.reshape(*shape[:-1], shape[-1] // format.group),
    }
    if format.zeros:
        parts["zeros"] = pack_bits(zero.to(torch.uint8).reshape(*shape[:-1], shape[-1] // format.group), bits)
    return parts


def decode(parts: Parts, format: Format, width: int) -> torch.Tensor:
    """Return the numbers f32[..., K] that parts stand for."""
    numbers = unpack_bits(parts["codes"], format.bits, width).float().unflatten(-1, (-1, format.group))
    half, groups = float(1 << (format.bits - 1)), width // format.group
    zeros = unpack_bits(parts["zeros"], format.bits, groups).float() if format.zeros else torch.tensor(half)
    return ((numbers - zeros.unsqueeze(-1)) * parts["scales"].unsqueeze(-1)).flatten(-2)


def cells(x: torch.Tensor, format: Format) -> Cells:
    """Yield the cells of numbers f64[..., G] in groups, and how far they lie beyond the last code."""
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


def search_scales(
    x: torch.Tensor, format: Format, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return for groups f32[N, G] the factor, scale and zero point f32[N] with which they are rounded best.

    With `importance` f32[G] the square of the error of each column counts that much.

    The codes are round(x factor + zero) in 0 .. 2^bits - 1, and stand for (codes - zero) scale. For given codes c
    around the zero point the scale of least squares is s = (x c) / (c c), and the error is x x - (x c)^2 / (c c): the
    width with the largest (x c)^2 / (c c) is the best one.
    """
    top, count = float((1 << format.bits) - 1), len(x)
    low, high = torch.empty(2, count)
    for part, _ in _group_chunks(x):
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
    for part, room in _group_chunks(x):
        for i in range(len(widths)):
            centred = _round_groups(x[part], factor[i, part], zero[i, part], format, room)
            centred -= (zero[i, part] + _ROUND).unsqueeze(1)
            if importance is None:
                _row_dot_products(x[part], centred, product[i, part])
                torch.linalg.vector_norm(centred, dim=1, out=square[i, part])
                square[i, part].square_()
            else:
                torch.mv(x[part] * centred, importance, out=product[i, part])
                torch.mv(centred.square_(), importance, out=square[i, part])
    square.clamp_(min=_TINY)
    candidates = torch.stack((product * product / square, factor, product / square, zero), 1)
    best = candidates[0]
    for found in candidates[1:]:
        best = torch.where(found[0] > best[0], found, best)
    _, factor, scale, zero = best
    return factor, scale, zero


def search_group(x: torch.Tensor, format: Format, importance: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what a group f32[N, G] is rounded with: scale and zero point."""
    return search_scales(x, format, importance)[1:]


def round_column(
    column: torch.Tensor, settings: tuple[torch.Tensor, ...], format: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of f32[N] with what `search_group` found, and the numbers that they stand for."""
    scale, zero = settings
    codes = (column / torch.where(scale == 0, 1.0, scale)).add_(zero).round_().clamp_(0, (1 << format.bits) - 1)
    return codes, (codes - zero) * scale


def stored_parts(codes: torch.Tensor, settings: tuple[torch.Tensor, ...], format: Format) -> Parts:
    """Return the parts of codes u8[..., K] and what their groups were rounded with, [..., K / group]."""
    scales, zeros = settings
    parts = {"codes": pack_bits(codes, format.bits), "scales": scales}
    return {**parts, "zeros": pack_bits(zeros.to(torch.uint8), format.bits)} if format.zeros else parts


def _group_chunks(x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield slices of groups [N, G] that are worked on at once, each with a tensor of its size to work in.

    They share that memory: fresh memory costs more than the arithmetic, for the system clears its pages.
    """
    step = max(1, CHUNK // x.shape[1])
    room = torch.empty(min(step, len(x)), x.shape[1])
    for start in range(0, len(x), step):
        stop = min(start + step, len(x))
        yield slice(start, stop), room[: stop - start]


def _round_groups(
    x: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor, format: Format, room: torch.Tensor
) -> torch.Tensor:
    """Return _ROUND plus the codes of groups f32[N, G], made in `room`, for factors and zero points f32[N]."""
    torch.mul(x, factor.unsqueeze(1), out=room)
    return room.add_((zero + _ROUND).unsqueeze(1)).clamp_(_ROUND, _ROUND + (1 << format.bits) - 1)


def _row_dot_products(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Write the dot products of the rows of two [N, G] to `out`; in torch, a product and a sum pass over memory thrice."""
    np.einsum("ng,ng->n", a.numpy(), b.numpy(), out=out.numpy())


def _one_sided(low: torch.Tensor, high: torch.Tensor, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a range whose lowest code is the number farthest from 0, which may make the scale negative.

    Signed codes reach one step farther below than above: -8 .. 7.
    """
    far = torch.where(-low > high, low, high)
    return far, far * -((top - 1) / (top + 1))
