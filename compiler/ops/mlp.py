"""`nn.gated_mlp`: a dense feed-forward layer with a gate, as shared experts and dense layers have it."""

from __future__ import annotations

from ..ir.activation import SILU, Activation
from ..ir.deferred import torch
from ..ir.dims import Size
from ..ir.types import TensorType
from .activation import apply_activation, inner_size
from .define import Attributes, Types, inference_error, op


def _infer_gated_mlp(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, up, down = types[:3]
    if inner_size("nn.gated_mlp", up.shape[0], attributes["act"], gated=True) != down.shape[1]:
        raise inference_error(f"nn.gated_mlp: up is {up}, but down {down} wants {2 * down.shape[1]} rows")
    return (TensorType(x.dtype, (*x.shape[:-1], down.shape[0])),)


def _gated_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    x, up, down = operands[:3]
    rows = x.elements / x.shape[-1]
    return rows * (2 * up.elements + 2 * down.elements + 4 * down.shape[1])


@op(
    "nn.gated_mlp",
    "x: A[*X, D], up: Q[N, D], down: Q[E, I], up_bias: A[N]?, down_bias: A[E]?, gate: A[1, D]? -> y: A[*X, E]",
    infer=_infer_gated_mlp,
    flops=_gated_flops,
)
def gated_mlp(x, up, down, up_bias, down_bias, gate, *, act: Activation = SILU):
    """Compute down(act(up(x))) with a gated activation, as an expert of moe.experts does.

    With a `gate` the result is multiplied by sigmoid(x gateᵀ), one number a token (Qwen2-MoE's shared expert).
    """
    h = torch.nn.functional.linear(x, up, up_bias)
    y = torch.nn.functional.linear(apply_activation(h, act), down, down_bias)
    return y if gate is None else y * torch.sigmoid(torch.nn.functional.linear(x, gate))
