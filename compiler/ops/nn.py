"""`nn.*`: the layers that every transformer has: embedding, norms, rotary embedding, cache, attention."""

from __future__ import annotations

import sympy

from ..formats.table import find_format
from ..ir.deferred import torch
from ..ir.dims import Size, size
from ..ir.types import TensorType
from .core import axis_of, with_axis
from .define import Attributes, Domain, Types, inference_error, op


def _infer_embedding(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    ids, table = types
    dtype = "f32" if find_format(table.dtype) else table.dtype
    return (TensorType(dtype, (*ids.shape, table.shape[1])),)


@op(
    "nn.embedding",
    "ids: i64[*X], table: T[V, D] -> y: A[*X, D]",
    infer=_infer_embedding,
    flops=0,
    domains={"ids": lambda types, attributes: types[1].shape[0]},
    rows={"table": lambda types, attributes: types[0].elements},
)
def embedding(ids, table):
    """Look up rows of a table; those of a quantized one are f32."""
    return torch.nn.functional.embedding(ids, table)


@op("nn.rms_norm", "x: A[*X, D], w: A[D] -> y: A[*X, D]", flops=lambda o, r, a: 4 * r[0].elements)
def rms_norm(x, w, *, eps: float):
    """Divide by the root mean square of the last axis and scale (Zhang and Sennrich 2019): x / sqrt(mean(x²) + eps) w."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


@op(
    "nn.add_rms_norm",
    "x: A[*X, D], residual: A[*X, D], w: A[D] -> y: A[*X, D], sum: A[*X, D]",
    flops=lambda o, r, a: 5 * r[0].elements,
)
def add_rms_norm(x, residual, w, *, eps: float):
    """Add, and norm the sum as nn.rms_norm does; both are results."""
    total = x + residual
    return rms_norm(total, w, eps=eps), total


@op("nn.layer_norm", "x: A[*X, D], w: A[D]?, b: A[D]? -> y: A[*X, D]", flops=lambda o, r, a: 7 * r[0].elements)
def layer_norm(x, w, b, *, eps: float):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift (Ba et al. 2016)."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], w, b, eps)


@op(
    "nn.rope",
    "x: A[B, H, S, D], cos: A[C, S, D], sin: A[C, S, D] -> y: A[B, H, S, D]",
    flops=lambda o, r, a: 3 * r[0].elements,
)
def rope(x, cos, sin):
    """Rotate the halves of each head by the position's angles (Su et al. 2021): x cos + [-x2, x1] sin.

    `cos` and `sin` hold every angle twice, once for each half; their first axis is the batch or 1.
    """
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)


def _infer_cache_append(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    past, new = types
    axis = axis_of(attributes, len(past.shape))
    if with_axis(past, axis, 0).shape != with_axis(new, axis, 0).shape:
        raise inference_error(f"{new} does not fit after the state {past} along axis {axis}")
    grown = with_axis(past, axis, sympy.expand(past.shape[axis] + new.shape[axis]))
    return (TensorType(grown.dtype, grown.shape, state=True),)


@op(
    "nn.cache_append", "past: state A[*X], new: A[*Y] -> present: state A[*Z]", infer=_infer_cache_append, flops=0,
    reads={"past": lambda types, attributes: size(0)}, reach={"past": lambda types, attributes: size(0)},
    appends=("past",),
)  # fmt: skip
def cache_append(past, new, *, axis: int):
    """Append the new tokens to the state, after the past ones."""
    return torch.cat((past, new), dim=axis)


def attention_mask(mask, new: int, total: int, window: int, chunk: int = 0) -> torch.Tensor:
    """Return bool[B or 1, 1, S, T]: which of T slots each of the S newest tokens may read.

    Slot j is visible to the token in slot i when j <= i, i - j < window (0: no window) and mask[b, j] is not 0. With
    a chunk c only slots of the token's own chunk are, c of them counted from the first slot that is not masked.
    A mask [b, i, j] tells it for each new token.
    """
    query = torch.arange(total - new, total)[:, None]
    key = torch.arange(total)[None, :]
    visible = key <= query
    if window:
        visible = visible & (query - key < window)
    visible = visible[None, None]
    if chunk:
        start = torch.zeros(1, 1) if mask is None else (mask.bool().cumsum(-1) == 0).sum(-1, keepdim=True)
        number = torch.div(torch.arange(total) - start, chunk, rounding_mode="floor")[:, None, :]
        visible = visible & (number[..., total - new :, None] == number[..., None, :])
    if mask is None:
        return visible
    return visible & (mask.bool()[:, None] if mask.dim() == 3 else mask.bool()[:, None, None, :])


def _read_slots(index: int) -> Domain:
    """Return how many numbers of k or v are read: those of the slots that the new tokens may see."""

    def read(types: Types, attributes: Attributes) -> Size:
        batch, groups, slots, width = types[index].shape
        for bound in (attributes["window"], attributes["chunk"]):
            slots = sympy.Min(slots, size(bound) + types[0].shape[2] - 1) if bound else slots
        return batch * groups * slots * width

    return read


def _attention_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    q, k, v = operands[:3]
    heads = q.elements / q.shape[-1]
    slots = k.shape[2]
    for bound in (attributes["window"], attributes["chunk"]):
        slots = sympy.Min(slots, size(bound)) if bound else slots
    return 2 * heads * slots * (q.shape[-1] + v.shape[-1]) + 5 * heads * slots


@op(
    "nn.attention",
    "q: A[B, H, S, D], k: A[B, G, T, D], v: A[B, G, T, E], mask: M[B, *N, T]?, sinks: A[H]? -> y: A[B, S, H, E]",
    flops=_attention_flops,
    reads={"k": _read_slots(1), "v": _read_slots(2)},
    reach={"k": _read_slots(1), "v": _read_slots(2)},
)
def attention(q, k, v, mask, sinks, *, scale: float, window: int = 0, chunk: int = 0, softcap: float = 0.0):
    """Attend causally: softmax(scale q kᵀ) v over the slots that `attention_mask` leaves visible.

    Head h reads key head h // (H / G). `softcap` c bounds the scores to c tanh(score / c). A sink adds
    exp(sink) to the softmax's denominator only. A token that sees no slot at all gets zeros.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    visible = attention_mask(mask, q.shape[2], k.shape[2], window, chunk)
    scores = scores.masked_fill(~visible, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks[None, :, None, None])
    top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[None, :, None, None] - top)
    weights = weights / torch.where(total == 0, torch.ones_like(total), total)
    return torch.matmul(weights, v).transpose(1, 2)
