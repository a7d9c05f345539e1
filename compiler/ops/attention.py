"""`nn.cached_attention`: everything between the linear of q, k and v and the output's linear, as one op."""

from __future__ import annotations

import sympy

from ..ir.deferred import torch
from ..ir.dims import Size, size
from ..ir.types import TensorType
from .define import OPS, Attributes, Domain, Types, inference_error, op
from .nn import attention, rms_norm, rope


def _infer_cached_attention(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    q, k, v, past_key, past_value, cos, sin, *_, mask, _ = types
    batch, groups, past, width = past_key.shape
    new, heads = q.shape[1], size(attributes["heads"])
    if (k is None) != (v is None):
        raise inference_error("nn.cached_attention takes q, k and v, or q alone that holds all three")
    wanted = (heads + 2 * groups if k is None else heads) * width
    if q.shape[2] != wanted or (k is not None and k.shape[2] != groups * width):
        raise inference_error(
            f"nn.cached_attention: q is {q}, but {heads} heads of the cache {past_key} want {wanted} numbers"
        )
    if heads % groups:
        raise inference_error(f"nn.cached_attention: {heads} heads do not divide into {groups} groups")
    if (cos is None) != (sin is None):
        raise inference_error("nn.cached_attention takes cos and sin, or neither")
    if cos is not None and (cos.shape[0] not in (1, batch) or not cos.shape[2] <= width):
        raise inference_error(f"nn.cached_attention: the angles {cos} do not fit {batch} rows and heads of {width}")
    total = size(past + new)
    if mask is not None and mask.shape != (batch, total):
        raise inference_error(f"nn.cached_attention: the mask {mask} is not [{batch}, {total}]")
    states = [TensorType(p.dtype, (batch, groups, total, width), state=True) for p in (past_key, past_value)]
    return (TensorType(q.dtype, (batch, new, heads * width)), *states)


def _cached_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    _, key, value = results
    q = TensorType(key.dtype, (key.shape[0], size(attributes["heads"]), operands[0].shape[1], key.shape[3]))
    kept = {**{name: attributes[name] for name in ("scale", "window", "softcap")}, "chunk": 0}
    flops = OPS["nn.attention"].flops([q, key, value, None, None], results[:1], kept)
    new = (q.elements, size(key.shape[0] * key.shape[1] * operands[0].shape[1] * key.shape[3]))
    for norm, elements in zip(operands[7:9], new, strict=True):
        flops += 4 * elements if norm else 0
    return flops + (3 * sum(new) * operands[5].shape[2] / key.shape[3] if operands[5] else 0)


def past_slots(index: int) -> Domain:
    """Return how many numbers of a cache, an operand, the new tokens and those after them may see."""

    def read(types: Types, attributes: Attributes) -> Size:
        batch, groups, past, width = types[index].shape
        window = size(attributes["window"])
        return batch * groups * (sympy.Min(past, window - 1) if window else past) * width

    return read


@op(
    "nn.cached_attention",
    "q: A[B, S, N], k: A[B, S, M]?, v: A[B, S, M]?, past_key: state A[B, G, P, D], past_value: state A[B, G, P, D],"
    " cos: A[C, S, R]?, sin: A[C, S, R]?, q_norm: A[D]?, k_norm: A[D]?, mask: I[B, T]?, sinks: A[heads]?"
    " -> y: A[B, S, O], key: state A[B, G, T, D], value: state A[B, G, T, D]",
    infer=_infer_cached_attention,
    flops=_cached_flops,
    reads={"past_key": past_slots(3), "past_value": past_slots(4)},
    reach={"past_key": past_slots(3), "past_value": past_slots(4)},
    appends=("past_key", "past_value"),
)
def cached_attention(
    q, k, v, past_key, past_value, cos, sin, q_norm, k_norm, mask, sinks, *,
    heads: int, scale: float, window: int = 0, softcap: float = 0.0, eps: float = 0.0,
):  # fmt: skip
    """Norm and rotate the heads of q and k, append k and v to the cache, attend causally as nn.attention does.

    The heads are concatenated in the last axis; q alone holds those of q, k and v in this order. `q_norm` and
    `k_norm` are weights of an nn.rms_norm over each head with `eps`; then nn.rope turns the first R numbers of a head.
    """
    q, key, value = turn_and_append(q, k, v, past_key, past_value, cos, sin, q_norm, k_norm, heads=heads, eps=eps)
    y = attention(q, key, value, mask, sinks, scale=scale, window=window, softcap=softcap)
    return y.flatten(2), key, value


def turn_and_append(q, k, v, past_key, past_value, cos, sin, q_norm, k_norm, *, heads: int, eps: float):
    """Return the heads of q, and the cache with those of k and v behind: what nn.cached_attention does first."""
    groups, width = past_key.shape[1], past_key.shape[3]
    if k is None:
        q, k, v = q.split([heads * width, groups * width, groups * width], dim=-1)
    q, k, v = (x.reshape(*x.shape[:2], -1, width).transpose(1, 2) for x in (q, k, v))
    q = rotate_heads(q if q_norm is None else rms_norm(q, q_norm, eps=eps), cos, sin)
    k = rotate_heads(k if k_norm is None else rms_norm(k, k_norm, eps=eps), cos, sin)
    return q, torch.cat((past_key, k), dim=2), torch.cat((past_value, v), dim=2)


def rotate_heads(x, cos, sin):
    """Return heads [B, H, S, D] with their first R numbers turned by nn.rope; angles [C, S, R], or None."""
    if cos is None:
        return x
    width = cos.shape[-1]
    return torch.cat((rope(x[..., :width], cos, sin), x[..., width:]), dim=-1)
