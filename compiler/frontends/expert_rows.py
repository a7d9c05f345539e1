"""Experts with more between or behind their matrices than an activation: each token's choices as rows, matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.library.custom_op("moec::expert_linear", mutates_args=())
def expert_linear_op(rows: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Stand for a linear layer whose weight each row [R, D] chooses by its id [R] from w [E, N, D]."""
    return rows.new_empty(rows.shape[0], w.shape[1])


@expert_linear_op.register_fake
def _(rows, ids, w):
    return rows.new_empty(rows.shape[0], w.shape[1])


def expert_rows(
    x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, down: Tensor, between: Callable[[Tensor], Tensor],
    behind: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return the weighted sum [T, D] of what the experts of up [E, N, D] and down [E, D, I] make of x [T, D].

    `between` takes rows [T K, N] to [T K, I], `behind` changes what an expert gives before the sum.
    """
    count = ids.shape[1]
    rows, flat = x[:, None, :].expand(-1, count, -1).reshape(-1, x.shape[1]), ids.reshape(-1)
    h = between(torch.ops.moec.expert_linear(rows, flat, up))
    y = torch.ops.moec.expert_linear(h, flat, down)
    y = y if behind is None else behind(y)
    return (y.reshape(-1, count, y.shape[1]) * gates[:, :, None]).sum(1)
