"""Routed experts spelled out: tokens copied and ordered by expert, a linear for each expert's rows, a weighted sum."""

from __future__ import annotations

from itertools import pairwise

from ..ir.deferred import torch
from ..ir.dims import Size
from ..ir.types import TensorType
from .define import Attributes, Types, inference_error, op


@op(
    "moe.dispatch",
    "x: A[T, D], ids: i64[T, K] -> rows: A[K*T, D], offsets: i64[experts + 1], perm: i64[K*T]",
    flops=0,
    domains={"ids": lambda types, attributes: attributes["experts"]},
)
def dispatch(x, ids, *, experts: int):
    """Copy each token once for every chosen expert, ordered by expert.

    `offsets[e]:offsets[e + 1]` are the rows of expert e; `perm[r]` is token * K + choice of row r.
    """
    flat = ids.flatten()
    perm = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)
    return x[perm // ids.shape[1]], torch.cat((counts.new_zeros(1), counts.cumsum(0))), perm


def _grouped_flops(operands: Types, results: tuple, attributes: Attributes) -> Size:
    return 2 * results[0].elements * operands[0].shape[1]


@op(
    "moe.grouped_linear",
    "rows: A[R, D], w: Q[E, N, D], offsets: i64[E + 1], bias: A[E, N]? -> y: A[R, N]",
    flops=_grouped_flops,
    domains={"offsets": lambda types, attributes: types[0].shape[0]},
    rows=dict.fromkeys(("w", "bias"), lambda types, attributes: types[0].shape[0]),
)
def grouped_linear(rows, w, offsets, bias):
    """Multiply the rows of each expert, `offsets[e]:offsets[e + 1]`, by its weight [out, in], and add its bias."""
    bounds = offsets.tolist()
    parts = [
        torch.nn.functional.linear(rows[start:stop], w[e], None if bias is None else bias[e])
        for e, (start, stop) in enumerate(pairwise(bounds))
    ]
    return torch.cat(parts)


def _infer_combine(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    rows, gates, _ = types
    if rows.shape[0] != gates.elements:
        raise inference_error(f"moe.combine: {rows} has not one row for each of the {gates.elements} gates")
    return (TensorType(rows.dtype, (gates.shape[0], rows.shape[1])),)


@op(
    "moe.combine",
    "rows: A[R, D], gates: A[T, K], perm: i64[R] -> y: A[T, D]",
    infer=_infer_combine,
    flops=lambda o, r, a: 2 * o[0].elements,
    domains={"perm": lambda types, attributes: types[0].shape[0]},
    distinct=("perm",),
)
def combine(rows, gates, perm):
    """Add up the rows of each token, weighted: y[t] = sum_k gates[t, k] row(t, k); `perm` is moe.dispatch's."""
    tokens, chosen = gates.shape
    ordered = torch.empty_like(rows)
    ordered[perm] = rows
    return (ordered.reshape(tokens, chosen, -1) * gates[:, :, None]).sum(1)
