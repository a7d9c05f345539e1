"""`moe.*`: routed experts."""

from __future__ import annotations

from ..ir.activation import SILU, Activation
from ..ir.deferred import torch
from ..ir.dims import Size
from ..ir.types import TensorType
from .activation import apply_activation, inner_size
from .define import Attributes, Types, inference_error, op


def _infer_experts(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, up, down = types[0], types[3], types[4]
    if inner_size("moe.experts", up.shape[1], attributes["act"]) != down.shape[2]:
        raise inference_error(f"moe.experts: {attributes['act']} of up {up} does not fit down {down}")
    return (x.plain,)


def _experts_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    ids, up, down = operands[1], operands[3], operands[4]
    rows = ids.elements
    return 2 * rows * (up.elements / up.shape[0] + down.elements / down.shape[0]) + 4 * rows * down.shape[2]


@op(
    "moe.experts",
    "x: A[T, D], ids: i64[T, K], gates: A[T, K], up: Q[E, N, D], down: Q[E, D, I],"
    " up_bias: A[E, N]?, down_bias: A[E, D]? -> y: A[T, D]",
    infer=_infer_experts,
    flops=_experts_flops,
    domains={"ids": lambda types, attributes: types[3].shape[0]},
    distinct=("ids",),
    rows=dict.fromkeys(("up", "down", "up_bias", "down_bias"), lambda types, attributes: types[1].elements),
)
def experts(x, ids, gates, up, down, up_bias, down_bias, *, act: Activation = SILU):
    """Send each token through its K chosen experts and add the results, weighted: y[t] = sum_k gates[t, k] f_ids[t, k](x[t]).

    An expert is down(act(up(x))). Gated activations are of the two halves of up(x), whose rows are concatenated or
    interleaved: act=gated(silu, layout=interleaved, alpha=1.702, beta=1.0, limit=7.0) is gpt-oss.
    """
    y = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, choice = torch.where(ids == expert)
        h = torch.nn.functional.linear(x[token], up[expert], None if up_bias is None else up_bias[expert])
        h = apply_activation(h, act)
        h = torch.nn.functional.linear(h, down[expert], None if down_bias is None else down_bias[expert])
        y.index_add_(0, token, h * gates[token, choice, None])
    return y
