"""Experts with more between or behind their matrices than an activation: sorted rows, matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.library.custom_op("moec::dispatch", mutates_args=())
def dispatch_op(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stand for `moe.dispatch`."""
    return _dispatched_shapes(x, ids, experts)


@dispatch_op.register_fake
def _(x, ids, experts):
    return _dispatched_shapes(x, ids, experts)


def _dispatched_shapes(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = ids.shape[0] * ids.shape[1]
    return x.new_empty(rows, x.shape[1]), ids.new_empty(experts + 1), ids.new_empty(rows)


@torch.library.custom_op("moec::grouped_linear", mutates_args=())
def grouped_linear_op(rows: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Stand for `moe.grouped_linear`."""
    return rows.new_empty(rows.shape[0], w.shape[1])


@grouped_linear_op.register_fake
def _(rows, w, offsets):
    return rows.new_empty(rows.shape[0], w.shape[1])


@torch.library.custom_op("moec::combine", mutates_args=())
def combine_op(rows: Tensor, gates: Tensor, perm: Tensor) -> Tensor:
    """Stand for `moe.combine`."""
    return rows.new_empty(gates.shape[0], rows.shape[1])


@combine_op.register_fake
def _(rows, gates, perm):
    return rows.new_empty(gates.shape[0], rows.shape[1])


def expert_rows(
    x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, down: Tensor, between: Callable[[Tensor], Tensor],
    behind: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return the weighted sum [T, D] of what the experts of up [E, N, D] and down [E, D, I] make of x [T, D].

    `between` takes rows [T K, N] to [T K, I], `behind` changes what an expert gives before the sum.
    """
    rows, offsets, perm = torch.ops.moec.dispatch(x, ids, up.shape[0])
    h = between(torch.ops.moec.grouped_linear(rows, up, offsets))
    y = torch.ops.moec.grouped_linear(h, down, offsets)
    return torch.ops.moec.combine(y if behind is None else behind(y), gates, perm)
