"""`ort.*`: what ONNX Runtime has as one op; the folder `onnx` emits them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...compiler.ir.activation import Activation
from ...compiler.ir.deferred import torch
from ...compiler.ir.dims import Size, size
from ...compiler.ir.types import TensorType
from ...compiler.ops import OPS, op
from ...compiler.ops.attention import cached_attention, past_slots, rotate_heads, turn_and_append
from ...compiler.ops.core import axis_of, with_axis
from ...compiler.ops.define import Attributes, Domain, Types, inference_error
from ...compiler.ops.moe import experts
from ...compiler.ops.nn import attention


def _infer_split(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, axis, sizes = types[0], axis_of(attributes, len(types[0].shape)), attributes["sizes"]
    if x.shape[axis] != sum(sizes):
        raise inference_error(f"ort.split: {list(sizes)} are not the parts of axis {axis} of {x}")
    return tuple(with_axis(x, axis, n) for n in sizes)


@op("ort.split", "x: A[*X] -> parts: A[*Y]...", infer=_infer_split, flops=0)
def split(x, *, axis: int, sizes: tuple[int, ...]):
    """Cut an axis into parts of these sizes."""
    return x.split(list(sizes), dim=axis)


@op("ort.quick_gelu", "x: A[*X] -> y: A[*X]", flops=lambda o, r, a: 4 * r[0].elements)
def quick_gelu(x, *, alpha: float = 1.0):
    """Apply x sigmoid(alpha x); with alpha 1 it is silu."""
    return x * torch.sigmoid(alpha * x)


@op(
    "ort.rotary_embedding",
    "x: A[B, S, H, D], cos: A[C, S, R], sin: A[C, S, R] -> y: A[B, S, H, D]",
    flops=lambda o, r, a: 3 * r[0].elements,
)
def rotary_embedding(x, cos, sin):
    """Rotate the halves of the first R numbers of each head as nn.rope does, with the tokens before the heads."""
    return rotate_heads(x.transpose(1, 2), cos, sin).transpose(1, 2)


@op("ort.last_tokens", "x: A[B, S, D] -> y: A[B, S, D]", flops=0)
def last_tokens(x):
    """Return x; at run time only the last tokens where the runner asks for the logits of fewer (`logits_to_keep`)."""
    return x


def _infer_attention_bias(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    (mask,) = types
    return (TensorType.of("f32", mask.shape[0], 1, attributes["tokens"], mask.shape[1]),)


@op(
    "ort.attention_bias",
    "mask: M[B, T] -> bias: f32[B, 1, N, T]",
    infer=_infer_attention_bias,
    domains={"mask": lambda t, a: size(2)},
)
def attention_bias(mask, *, tokens: Size):
    """Make the scores' bias from a padding mask: 0 for real slots, -inf for padding, the same for every new token."""
    bias = torch.zeros(mask.shape).masked_fill(mask == 0, float("-inf"))
    return bias[:, None, None, :].expand(-1, 1, tokens, -1)


def _group_query(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    *given, bias, sinks = types
    y, key, value = OPS["nn.cached_attention"].infer([*given, None, None, None, sinks], attributes)
    if bias and (bias.shape[2] != y.shape[1] or bias.shape[3] != key.shape[2]):
        raise inference_error(
            f"ort.group_query_attention: the bias {bias} has not {y.shape[1]} new tokens and {key.shape[2]} slots"
        )
    return y, key, value


def _group_query_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    *given, _, sinks = operands
    return OPS["nn.cached_attention"].flops([*given, None, None, None, sinks], results, attributes)


@op(
    "ort.group_query_attention",
    "q: A[B, S, N], k: A[B, S, M]?, v: A[B, S, M]?, past_key: state A[B, G, P, D], past_value: state A[B, G, P, D],"
    " cos: A[C, S, R]?, sin: A[C, S, R]?, bias: A[B, 1, S, T]?, sinks: A[heads]?"
    " -> y: A[B, S, O], key: state A[B, G, T, D], value: state A[B, G, T, D]",
    infer=_group_query,
    flops=_group_query_flops,
    reads={"past_key": past_slots(3), "past_value": past_slots(4)},
    reach={"past_key": past_slots(3), "past_value": past_slots(4)},
    in_place=("past_key", "past_value"),
)
def group_query_attention(
    q, k, v, past_key, past_value, cos, sin, bias, sinks, *,
    heads: int, scale: float, window: int = 0, softcap: float = 0.0,
):  # fmt: skip
    """Turn heads, append to the cache and attend causally, as nn.cached_attention does.

    The bias is the padding mask: a slot with -inf is not read. Needs head sizes that are multiples of 8; with
    angles, multiples of 16, and angles for a multiple of 16 numbers.
    """
    mask = None if bias is None else (bias[:, 0, 0, :] == 0).long()
    settings = {"heads": heads, "scale": scale, "window": window, "softcap": softcap}
    return cached_attention(q, k, v, past_key, past_value, cos, sin, None, None, mask, sinks, **settings)


def _stored_attention(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    q, k, v, past_key, past_value, key_scale, value_scale, *rest = types
    stored = past_key.dtype
    if stored not in ("f16", "bf16", "i8") or (stored == "i8") != (key_scale is not None is not value_scale):
        raise inference_error(f"ort.stored_attention: a cache is f16 or bf16, or i8 with two scales, not {past_key}")
    as_numbers = [replace(past, dtype=q.dtype) for past in (past_key, past_value)]
    y, key, value = _group_query([q, k, v, *as_numbers, *rest], attributes)
    scales = [TensorType("f32", x.shape[:3], state=True) for x in (key, value) if key_scale]
    return (y, *(replace(x, dtype=stored) for x in (key, value)), *scales)


def _stored_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    q, k, v, past_key, past_value, _, _, *rest = operands
    y, key, value = (replace(x, dtype=q.dtype) for x in results[:3])
    given = [q, k, v, *(replace(past, dtype=q.dtype) for past in (past_key, past_value)), *rest]
    return _group_query_flops(given, (y, key, value), attributes)


def _past_scales(index: int) -> Domain:
    """Return how many scales of a cache are read: one for each of its rows that is."""
    slots = past_slots(index)
    return lambda types, attributes: slots(types, attributes) / types[index].shape[3]


_PAST = {
    "past_key": past_slots(3),
    "past_value": past_slots(4),
    "key_scale": _past_scales(3),
    "value_scale": _past_scales(4),
}


@op(
    "ort.stored_attention",
    "q: A[B, S, N], k: A[B, S, M]?, v: A[B, S, M]?, past_key: state C[B, G, P, D], past_value: state C[B, G, P, D],"
    " key_scale: state f32[B, G, P]?, value_scale: state f32[B, G, P]?,"
    " cos: A[C, S, R]?, sin: A[C, S, R]?, bias: A[B, 1, S, T]?, sinks: A[heads]?"
    " -> y: A[B, S, O], key: state C[B, G, T, D], value: state C[B, G, T, D], scales: state f32[B, G, T]...",
    infer=_stored_attention,
    flops=_stored_flops,
    domains={"past_key": lambda t, a: size(128), "past_value": lambda t, a: size(128)},
    reads=_PAST,
    reach=_PAST,
    in_place=("past_key", "past_value", "key_scale", "value_scale"),
)
def stored_attention(
    q, k, v, past_key, past_value, key_scale, value_scale, cos, sin, bias, sinks, *,
    heads: int, scale: float, window: int = 0, softcap: float = 0.0,
):  # fmt: skip
    """Do what ort.group_query_attention does with a cache of f16, bf16, or int8 with a scale for each head and token.

    New keys and values are rounded first, and then attended to as those of the past. The results have scales where the cache does.
    """
    mask = None if bias is None else (bias[:, 0, 0, :] == 0).long()
    before = past_key.shape[2]
    pasts = [(past_key, key_scale), (past_value, value_scale)]
    numbers = [stored_numbers(*past) for past in pasts]
    q, *present = turn_and_append(q, k, v, numbers[0], numbers[1], cos, sin, None, None, heads=heads, eps=0.0)
    new = [store_numbers(x[:, :, before:], past_key.dtype) for x in present]
    key, value = (torch.cat((x[:, :, :before], stored_numbers(*n)), dim=2) for x, n in zip(present, new, strict=True))
    y = attention(q, key, value, mask, sinks, scale=scale, window=window, softcap=softcap)
    codes, scales = (
        [torch.cat((past[i], n[i]), dim=2) for past, n in zip(pasts, new, strict=True) if n[i] is not None]
        for i in (0, 1)
    )
    return (y.flatten(2), *codes, *scales)


def stored_numbers(stored, scale):
    """Return the numbers that rows of a cache stand for."""
    return stored.float() if scale is None else stored.float() * scale[..., None]


def store_numbers(x, dtype):
    """Return rows as a cache stores them, and the scales of those in int8: the largest number is 127."""
    if dtype == torch.int8:
        scale = x.abs().amax(-1).clamp(min=1e-30) / 127
        return (x / scale[..., None]).round().to(dtype), scale
    return (x.clamp(-65504, 65504) if dtype == torch.float16 else x).to(dtype), None


INTERLEAVED = Activation(layout="interleaved")
UNGATED = ("silu", "relu", "identity", "gelu_tanh")


def _infer_moe(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    act = attributes["act"]
    if act.gated and (act.kind != "silu" or act.clamp_after or not act.interleaved):
        raise inference_error(f"ort.moe has only silu with a gate, rows interleaved and clamped before it, not {act}")
    if not act.gated and act.kind not in UNGATED:
        raise inference_error(f"ort.moe has {', '.join(UNGATED)} without a gate, not {act.kind}")
    return OPS["moe.experts"].infer(types, _as_experts(attributes))


def _as_experts(attributes: Attributes) -> dict[str, Any]:
    """Return the attributes of the moe.experts that an ort.moe replaces."""
    return {"act": attributes["act"]}


@op(
    "ort.moe",
    "x: A[T, D], ids: i64[T, K], gates: A[T, K], up: A[E, N, D], down: A[E, D, I],"
    " up_bias: A[E, N]?, down_bias: A[E, D]? -> y: A[T, D]",
    infer=_infer_moe,
    flops=lambda o, r, a: OPS["moe.experts"].flops(o, r, _as_experts(a)),
    domains={"ids": lambda types, attributes: types[3].shape[0]},
    rows=OPS["moe.experts"].rows,
    distinct=("ids",),
)
def moe(
    x, ids, gates, up, down, up_bias, down_bias, *,
    act: Activation = INTERLEAVED, gate_sum: float = 0.0,
):  # fmt: skip
    """Send each token through its chosen experts as moe.experts does, with gate and up rows interleaved; gates are >= 0.

    `gate_sum` says what the gates of every token add up to, where that is known; 0 where it is not.
    """
    return experts(x, ids, gates, up, down, up_bias, down_bias, act=act)
