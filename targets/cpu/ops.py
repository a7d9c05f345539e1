"""`ort.*`: what ONNX Runtime has as one op. The module's emitters stand in onnx_nn.py and onnx_moe.py."""

from __future__ import annotations

import torch

from ...compiler.dims import Size, size
from ...compiler.ir import TensorType
from ...compiler.ops import OPS, op
from ...compiler.ops.define import Attributes, Types, fail
from ...compiler.ops.moe import experts
from ...compiler.ops.nn import attention, rope


@op(
    "ort.rotary_embedding",
    "x: A[B, S, H, D], cos: A[C, S, D], sin: A[C, S, D] -> y: A[B, S, H, D]",
    flops=lambda o, r, a: 3 * r[0].elements,
)
def rotary_embedding(x, cos, sin):
    """Rotate the halves of each head as nn.rope does, with the tokens before the heads."""
    return rope(x.transpose(1, 2), cos, sin).transpose(1, 2)


def _bias(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    (mask,) = types
    assert mask
    return (TensorType.of("f32", mask.shape[0], 1, attributes["tokens"], mask.shape[1]),)


@op("ort.attention_bias", "mask: M[B, T] -> bias: f32[B, 1, N, T]", infer=_bias, domains={"mask": lambda t, a: size(2)})
def attention_bias(mask, *, tokens: Size):
    """Make the scores' bias from a padding mask: 0 for real slots, -inf for padding, the same for every new token."""
    bias = torch.zeros(mask.shape).masked_fill(mask == 0, float("-inf"))
    return bias[:, None, None, :].expand(-1, 1, tokens, -1)


def _group_query(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    q, k, v, past_key, past_value, bias, _ = types
    assert q and k and v and past_key and past_value
    total = size(past_key.shape[2] + k.shape[1])
    if bias and (bias.shape[2] != q.shape[1] or bias.shape[3] != total):
        raise fail(f"ort.group_query_attention: the bias {bias} has not the {q.shape[1]} new tokens and {total} slots")
    states = [TensorType(p.dtype, (*p.shape[:2], total, p.shape[3]), state=True) for p in (past_key, past_value)]
    return (q, *states)


def _group_query_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    _, key, value = results  # nn.attention's keys: past and new, with the heads before the slots
    return OPS["nn.attention"].flops([operands[0], key, value, None, None], results[:1], attributes)


@op(
    "ort.group_query_attention",
    "q: A[B, S, H, D], k: A[B, S, G, D], v: A[B, S, G, D], past_key: state A[B, G, P, D],"
    " past_value: state A[B, G, P, D], bias: A[B, 1, S, T]?, sinks: A[H]? -> y: A[B, S, H, D],"
    " key: state A[B, G, P + S, D], value: state A[B, G, P + S, D]",
    infer=_group_query,
    flops=_group_query_flops,
)
def group_query_attention(
    q, k, v, past_key, past_value, bias, sinks, *, scale: float, window: int = 0, softcap: float = 0.0
):
    """Append to the cache and attend causally, as nn.cache_append and nn.attention do, with the tokens before the heads.

    The bias stands for the padding mask: a slot with -inf is not read. Needs head sizes that are multiples of 8.
    """
    key, value = (torch.cat((past, new.transpose(1, 2)), dim=2) for past, new in ((past_key, k), (past_value, v)))
    mask = None if bias is None else (bias[:, 0, 0, :] == 0).long()
    y = attention(q.transpose(1, 2), key, value, mask, sinks, scale=scale, window=window, softcap=softcap)
    return y, key, value


UNGATED = ("silu", "relu", "identity", "gelu_tanh")


def _moe(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    if attributes["gated"] and attributes["act"] != "silu":
        raise fail(f"ort.moe has a gate only with act=silu, not {attributes['act']}")
    if not attributes["gated"] and attributes["act"] not in UNGATED:
        raise fail(f"ort.moe has {', '.join(UNGATED)} without a gate, not {attributes['act']}")
    return OPS["moe.experts"].infer(types, {**attributes, "layout": "interleaved"})


@op(
    "ort.moe",
    "x: A[T, D], ids: i64[T, K], gates: A[T, K], up: A[E, N, D], down: A[E, D, I],"
    " up_bias: A[E, N]?, down_bias: A[E, D]? -> y: A[T, D]",
    infer=_moe,
    flops=lambda o, r, a: OPS["moe.experts"].flops(o, r, {**a, "layout": "interleaved"}),
    domains={"ids": lambda types, attributes: types[3].shape[0]},
    rows=OPS["moe.experts"].rows,
    distinct=("ids",),
)
def moe(
    x, ids, gates, up, down, up_bias, down_bias, *,
    act: str = "silu", gated: bool = True, alpha: float = 1.0, beta: float = 0.0, limit: float = float("inf"),
):  # fmt: skip
    """Send each token through its chosen experts as moe.experts does, with gate and up rows in turn; gates are >= 0."""
    attributes = {"act": act, "gated": gated, "alpha": alpha, "beta": beta, "limit": limit}
    return experts(x, ids, gates, up, down, up_bias, down_bias, layout="interleaved", **attributes)
