"""GPTQ (Frantar et al. 2022): codes that are chosen column by column, each rounding error made up for by the columns after it.

For a row w and inputs X the error is (w - q) H (w - q)ᵀ with H = XᵀX. With U the upper Cholesky factor of the inverse
of H, rounding column j with the error e = (w_j - q_j) / U_jj is made up for best by w_k -= e U_jk for all k > j.
Rows do not depend on each other, so that a tile of rows gives what the whole weight gives, up to rounding of f32: the
parts of a weight that belong together come from one call.
"""

from __future__ import annotations

import torch

from .format import Format, GroupCodec, Parts

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
    """Return the parts (see format.py) of rows f32[N, K] in a format of groups; `factor` is that of their inputs.

    A group's scale and zero point come from the usual search, on the numbers as they are when its first column is due;
    the error e of a column counts as e^2 / U_jj^2, which is what it adds to the error of the outputs.
    """
    rows, width = w.shape
    codec = format.codec()
    if not isinstance(codec, GroupCodec):
        raise ValueError(f"gptq does not choose codes of {format.name}")
    importance = factor.diagonal().reciprocal().square_()
    importance /= importance.mean()
    # columns as rows: each is read and written as a whole; a copy even of a single row, which may be the source's own
    left = w.T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(width, rows, dtype=torch.uint8)
    settings: list[tuple[torch.Tensor, ...]] = []
    block = max(BLOCK, format.group)
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = torch.empty(stop - start, rows)
        for j in range(start, stop):
            if j % format.group == 0:
                columns = slice(j, j + format.group)
                settings.append(codec.search_group(left[columns].T.contiguous(), format, importance[columns]))
            code, numbers = codec.round_column(left[j], settings[-1], format)
            codes[j] = code.to(torch.uint8)
            error = torch.div(left[j] - numbers, factor[j, j], out=errors[j - start])
            left[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    found = tuple(torch.stack(of_groups, -1) for of_groups in zip(*settings, strict=True))
    return codec.stored_parts(codes.T.contiguous(), found, format)
