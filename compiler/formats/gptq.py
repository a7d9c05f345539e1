"""GPTQ (Frantar et al. 2022): codes that are chosen column by column, each rounding error made up for by the columns after it.

For a row w and inputs X the error is (w - q) H (w - q)ᵀ with H = XᵀX. With U the upper Cholesky factor of the inverse
of H, rounding column j with the error e = (w_j - q_j) / U_jj is made up for best by w_k -= e U_jk for all k > j.
Rows do not depend on each other, so that a tile of rows gives what the whole weight gives, up to rounding of f32: the
parts of a weight that belong together come from one call.
"""

from __future__ import annotations

import torch

from .format import Format, Parts
from .integers import search_scales
from .packing import pack_bits

DAMPING = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 128  # columns after which the rest of the row is brought up to date


def factor_of(h: torch.Tensor) -> torch.Tensor | None:
    """Return U f32[K, K], upper, with UᵀU the inverse of XᵀX (damped), for H = XᵀX of inputs X, which is changed; None if it is 0.

    A column that is always 0 gets the damping alone: its weights are rounded to nearest.
    """
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    if not 0 < mean < float("inf"):
        return None
    damping = DAMPING * mean
    diagonal.add_(damping)
    while True:
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper
        damping *= 10  # inputs so dependent that f32 does not see H as positive
        diagonal.add_(damping)


def gptq_encode(w: torch.Tensor, factor: torch.Tensor, format: Format) -> Parts:
    """Return the parts (see format.py) of rows f32[N, K] in an integer format; `factor` is that of their inputs.

    A group's scale and zero point come from the usual search, on the numbers as they are when its first column is due.
    """
    rows, width = w.shape
    top = float((1 << format.bits) - 1)
    # columns as rows: each is read and written as a whole; a copy even of a single row, which may be the source's own
    left = w.T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(width, rows, dtype=torch.uint8)
    scales = torch.empty(width // format.group, rows)
    zeros = torch.empty_like(scales)
    block = max(BLOCK, format.group)
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.empty(stop - start, rows)
        for j in range(start, stop):
            group, first = divmod(j, format.group)
            if not first:
                _, scale, zero = search_scales(left[j : j + format.group].T.contiguous(), format)
                scales[group], zeros[group] = scale, zero
                divisor = torch.where(scale == 0, 1.0, scale)
            code = (left[j] / divisor).add_(zero).round_().clamp_(0, top)
            codes[j] = code.to(torch.uint8)
            error = torch.div(left[j] - (code - zero) * scale, factor[j, j], out=errors[j - start])
            left[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    # not contiguous(): to torch one column counts as contiguous with any stride
    whole = torch.contiguous_format
    parts = {"codes": pack_bits(codes.T.contiguous(), format.bits), "scales": scales.T.clone(memory_format=whole)}
    if format.zeros:
        parts["zeros"] = pack_bits(zeros.T.to(torch.uint8, memory_format=whole, copy=True), format.bits)
    return parts
