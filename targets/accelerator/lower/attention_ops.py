"""The ops that attention to keys and values is lowered to: what is done with new tokens and appended, and the attention.

Where caches are stored in fewer bits the attribute `cache` says how; what is appended is rounded then.
"""

from __future__ import annotations

from functools import partial

from ....compiler.ir.deferred import torch
from ....compiler.ir.dims import Size, size
from ....compiler.ir.types import TensorType
from ....compiler.ops import OPS, op
from ....compiler.ops.attention import turn_and_append
from ....compiler.ops.define import Attributes, Types
from ....compiler.ops.nn import attention as plain_attention


def _rope_append(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    q, *_ = types
    own = {name: attributes[name] for name in ("heads", "eps")}
    y, key, value = OPS["nn.cached_attention"].infer([*types, None, None], {**own, "scale": 1.0})
    width = key.shape[3]
    return TensorType(q.dtype, (y.shape[0], size(attributes["heads"]), y.shape[1], width)), key, value


def _rope_append_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    q, key, _ = results
    new = (q.elements, size(q.shape[0] * key.shape[1] * q.shape[2] * q.shape[3]))
    cos, q_norm, k_norm = operands[5], operands[7], operands[8]
    norms = sum((4 * n for norm, n in zip((q_norm, k_norm), new, strict=True) if norm), size(0))
    return norms + (3 * sum(new) * cos.shape[2] / q.shape[3] if cos else 0)


def _scored(attributes: Attributes) -> Attributes:
    """Return the attributes of acc.attention as nn.attention has them."""
    return {"chunk": 0, **{name: value for name, value in attributes.items() if name != "cache"}}


def _attended(types: Types, attributes: Attributes, name: str) -> Size:
    """Return how many numbers of a cache nn.attention reads."""
    return size(OPS["nn.attention"].reads[name](types, _scored(attributes)))


@op(
    "acc.rope_append",
    "q: A[B, S, N], k: A[B, S, M]?, v: A[B, S, M]?, past_key: state A[B, G, P, D], past_value: state A[B, G, P, D],"
    " cos: A[C, S, R]?, sin: A[C, S, R]?, q_norm: A[D]?, k_norm: A[D]?"
    " -> q: A[B, heads, S, D], key: state A[B, G, T, D], value: state A[B, G, T, D]",
    infer=_rope_append,
    flops=_rope_append_flops,
    in_place=("past_key", "past_value"),
    reads=dict.fromkeys(("past_key", "past_value"), lambda types, attributes: size(0)),
    stored=("past_key", "past_value", "key", "value"),
)
def rope_append(
    q, k, v, past_key, past_value, cos, sin, q_norm, k_norm, *, heads: int, eps: float = 0.0, cache: str = ""
):  # fmt: skip
    """Norm and rotate the heads of q and k and append k and v to the cache: what nn.cached_attention does first.

    The operands are those of nn.cached_attention; q alone may hold the heads of q, k and v in this order. What is
    appended is rounded as `cache` says (round_rows).
    """
    q, *found = turn_and_append(q, k, v, past_key, past_value, cos, sin, q_norm, k_norm, heads=heads, eps=eps)
    return q, *(append_rounded(past, state, cache) for past, state in zip((past_key, past_value), found, strict=True))


def append_rounded(past, state, cache: str):
    """Return a cache whose new tokens are rounded; those of `past` were when they were appended."""
    return torch.cat((past, round_rows(state[:, :, past.shape[2] :], cache)), dim=2) if cache else state


def round_rows(x, cache: str):
    """Round to how a cache is stored: "fp8", E4M3 under one scale for each row; "" rounds nothing."""
    if not cache:
        return x
    scale = x.abs().amax(-1, keepdim=True) / 448
    codes = (x / torch.where(scale == 0, torch.ones_like(scale), scale)).to(torch.float8_e4m3fn)
    return codes.to(x.dtype) * scale


@op(
    "acc.attention",
    "q: A[B, H, S, D], k: A[B, G, T, D], v: A[B, G, T, E], mask: M[B, *N, T]?, sinks: A[H]? -> y: A[B, S, H, E]",
    flops=lambda operands, results, attributes: OPS["nn.attention"].flops(operands, results, _scored(attributes)),
    reads={name: partial(_attended, name=name) for name in "kv"},
    stored=("k", "v"),
)
def attention(q, k, v, mask, sinks, *, scale: float, window: int = 0, softcap: float = 0.0, cache: str = ""):
    """Attend as nn.attention does to a cache that is stored as `cache` says, see acc.rope_append."""
    return plain_attention(q, k, v, mask, sinks, scale=scale, window=window, softcap=softcap)
