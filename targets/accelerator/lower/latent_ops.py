"""The ops that latent attention (MLA) is lowered to: what is done with new tokens and appended, and the attention.

Weights are typed as they are stored, as in targets/accelerator/ops.py.
"""

from __future__ import annotations

from functools import partial

import sympy

from ....compiler.ir.deferred import torch
from ....compiler.ir.dims import Size, size
from ....compiler.ir.types import TensorType
from ....compiler.ops import OPS, op
from ....compiler.ops.compressed import block_linear as plain_block_linear
from ....compiler.ops.define import Attributes, Types, inference_error
from ....compiler.ops.nn import attention, rms_norm
from ....compiler.ops.nn import rope as plain_rope
from ..ops import check_weight
from .attention_ops import round_rows


def _latent_append(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    q, kv, _, past_latent, past_rope, cos, _ = types
    heads, (batch, _, past, width), turned = size(attributes["heads"]), past_latent.shape, past_rope.shape[3]
    if kv.shape[2] != width + turned or q.shape[2] % heads or q.shape[2] < heads * turned:
        raise inference_error(f"acc.latent_append: {q} and {kv} do not fit {past_latent} and {past_rope}")
    if cos.shape[0] not in (1, batch) or turned % 2:
        raise inference_error(f"acc.latent_append: the angles {cos} do not fit {batch} rows")
    total = size(past + q.shape[1])
    states = [TensorType(p.dtype, (batch, 1, total, p.shape[3]), state=True) for p in (past_latent, past_rope)]
    return (TensorType(q.dtype, (batch, heads, q.shape[1], turned)), *states)


def _append_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    turned, kv = results[0], operands[1]
    each = kv.shape[0] * kv.shape[1]
    return 3 * (turned.elements + each * turned.shape[3]) + 4 * each * results[1].shape[3]


@op(
    "acc.latent_append",
    "q: A[B, S, N], kv: A[B, S, M], norm: A[R], past_latent: state A[B, 1, P, R], past_rope: state A[B, 1, P, D],"
    " cos: A[C, S, D], sin: A[C, S, D]"
    " -> q_rope: A[B, heads, S, D], latent: state A[B, 1, T, R], rope: state A[B, 1, T, D]",
    infer=_latent_append,
    flops=_append_flops,
    in_place=("past_latent", "past_rope"),
    reads=dict.fromkeys(("past_latent", "past_rope"), lambda types, attributes: size(0)),
    stored=("past_latent", "latent"),
)
def latent_append(
    q, kv, norm, past_latent, past_rope, cos, sin, *, heads: int, eps: float, pairs: bool = False, cache: str = ""
):  # fmt: skip
    """Rotate the last D numbers of each head of q, and append to both caches: kv's first R numbers normed, the others rotated.

    With `pairs` the numbers that are rotated together are neighbours, which come apart into two halves. Latents are
    rounded as `cache` says (acc.rope_append), the part with positions is not.
    """
    turned = past_rope.shape[3]
    latent = round_rows(rms_norm(kv[..., : norm.shape[0]], norm, eps=eps)[:, None], cache)

    def rotated(x):
        x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1) if pairs else x
        return plain_rope(x, cos, sin)

    q_rope = rotated(q.unflatten(2, (heads, -1))[..., -turned:].transpose(1, 2))
    key = rotated(kv[..., norm.shape[0] :][:, None])
    return q_rope, torch.cat((past_latent, latent), dim=2), torch.cat((past_rope, key), dim=2)


def _latent_attention(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    q, q_rope, latent, rope, w_uk, w_uv, mask, _, selected = types
    heads, (batch, _, slots, width) = size(attributes["heads"]), latent.shape
    for weight in (w_uk, w_uv):
        check_weight("acc.latent_attention", weight)
    if w_uk.shape[0] != heads * width or w_uv.shape[0] % heads:
        raise inference_error(
            f"acc.latent_attention: {w_uk} and {w_uv} are not those of {heads} heads on a latent of {width}"
        )
    if q.shape[2] % heads or q.shape[2] < heads * w_uk.shape[1]:
        raise inference_error(
            f"acc.latent_attention: q is {q}, {heads} heads of {w_uk} want {w_uk.shape[1]} numbers each"
        )
    if (q_rope is None) != (rope is None):
        raise inference_error("acc.latent_attention takes q_rope and rope, or neither")
    if mask is not None and mask.shape not in ((batch, slots), (batch, q.shape[1], slots)):
        raise inference_error(
            f"acc.latent_attention: the mask {mask} is not [{batch}, {slots}], nor one for each token"
        )
    if selected is not None and attributes["chunk"]:
        raise inference_error("acc.latent_attention takes no chosen slots with chunks")
    return (TensorType(q.dtype, (*q.shape[:2], w_uv.shape[0])),)


def _read_of_state(types: Types, attributes: Attributes, operand: int) -> Size:
    """Return how many numbers of a cache a step reads: chosen slots, or those of OPS["nn.attention"]."""
    q, state, selected = types[0], types[operand], types[8]
    if selected is None:
        return OPS["nn.attention"].reads["k"]((q, state), attributes)
    return state.shape[0] * state.shape[3] * sympy.Min(state.shape[2], q.shape[1] * selected.shape[2])


def _read_of_mask(types: Types, attributes: Attributes) -> Size:
    """Return how many numbers of the mask a step reads: those of chosen slots, or all."""
    mask, selected = types[6], types[8]
    return mask.elements if selected is None else sympy.Min(mask.elements, selected.elements)


def _latent_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    """Return those of the form that has fewer: up-projections of the new tokens, or of all that are attended to."""
    q, _, latent, rope, w_uk, w_uv, *_, selected = operands
    heads, (batch, _, slots, width) = size(attributes["heads"]), latent.shape
    nope, value, apart = w_uk.shape[1], w_uv.shape[0] / heads, rope.shape[3] if rope else size(0)
    scored = {name: attributes[name] for name in ("scale", "window", "chunk", "softcap")}

    def attended(key: Size, of_value: Size, seen: Size = slots) -> Size:
        types = [
            TensorType(q.dtype, (batch, heads, n, w)) for n, w in ((q.shape[1], key), (seen, key), (seen, of_value))
        ]
        return OPS["nn.attention"].flops([*types, None, None], results, scored)

    each = 2 * batch * heads * width * (nope + value)
    absorbed = each * q.shape[1] + attended(
        width + apart, width, sympy.Min(slots, selected.shape[2]) if selected else slots
    )
    if selected and not attributes["best_first"]:
        return absorbed
    return sympy.Min(absorbed, each * slots + attended(nope + apart, value))


@op(
    "acc.latent_attention",
    "q: A[B, S, N], q_rope: A[B, heads, S, D]?, latent: state A[B, 1, T, R], rope: state A[B, 1, T, D]?,"
    " w_uk: W[U, E], w_uv: Z[M, R], mask: I[B, *X]?, sinks: A[heads]?, selected: C[B, S, J]? -> y: A[B, S, M]",
    infer=_latent_attention,
    flops=_latent_flops,
    domains={"selected": lambda types, attributes: types[2].shape[2] + types[8].shape[2]},
    distinct=("selected",),
    stored=("latent",),
    reads={
        "latent": partial(_read_of_state, operand=2),
        "rope": partial(_read_of_state, operand=3),
        "mask": _read_of_mask,
    },
)
def latent_attention(
    q, q_rope, latent, rope, w_uk, w_uv, mask, sinks, selected, *,
    heads: int, scale: float, window: int = 0, chunk: int = 0, softcap: float = 0.0, best_first: bool = False, cache: str = "",
):  # fmt: skip
    """Attend to cached latents as nn.attention does, with keys and values that are made of them (MLA, arXiv 2405.04434).

    The first E numbers of a head of q meet keys w_uk[h]ᵀ latent, with w_uk[h] the head's [R, E]; `q_rope` meets `rope`,
    the part of the keys with positions, which all heads share. Values are w_uv[h] latent. With `selected` a token reads
    of its slots those with these numbers only (DeepSeek-V3.2); `best_first`: they are in front of what it may not read.
    """
    if selected is not None:
        chosen = torch.zeros(*q.shape[:2], latent.shape[2] + selected.shape[2], dtype=torch.bool, device=q.device)
        seen = chosen.scatter(-1, selected.long(), True)[..., : latent.shape[2]]
        mask = seen if mask is None else seen & (mask if mask.dim() == 3 else mask[:, None])
    nope = q.unflatten(2, (heads, -1))[..., : w_uk.shape[1]]
    absorbed = plain_block_linear(nope, w_uk.float()).unflatten(2, (heads, -1)).transpose(1, 2)
    queries = absorbed if q_rope is None else torch.cat((absorbed, q_rope), dim=3)
    keys = latent if rope is None else torch.cat((latent, rope), dim=3)
    y = attention(queries, keys, latent, mask, sinks, scale=scale, window=window, chunk=chunk, softcap=softcap)
    return plain_block_linear(y, w_uv.float())
