"""`nn.gated_mlp`: a dense feed-forward layer with a gate, as shared experts and dense layers have it."""

from __future__ import annotations

from ..ir.deferred import torch
from ..ir.dims import Size
from ..ir.types import TensorType
from .define import Attributes, Types, fail, op
from .moe import ACTIVATIONS, activate


def _gated(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, up, down = types[:3]
    if attributes["act"] not in ACTIVATIONS:
        raise fail(f"nn.gated_mlp does not know act={attributes['act']}; it knows {', '.join(ACTIVATIONS)}")
    if attributes["layout"] not in ("concat", "interleaved"):
        raise fail(f"nn.gated_mlp: layout={attributes['layout']} is neither concat nor interleaved")
    if up.shape[0] != 2 * down.shape[1]:
        raise fail(f"nn.gated_mlp: up is {up}, but down {down} wants {2 * down.shape[1]} rows")
    return (TensorType(x.dtype, (*x.shape[:-1], down.shape[0])),)


def _gated_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    x, up, down = operands[:3]
    rows = x.elements / x.shape[-1]
    return rows * (2 * up.elements + 2 * down.elements + 4 * down.shape[1])


@op(
    "nn.gated_mlp",
    "x: A[*X, D], up: Q[N, D], down: Q[E, I], up_bias: A[N]?, down_bias: A[E]?, gate: A[1, D]? -> y: A[*X, E]",
    infer=_gated,
    flops=_gated_flops,
)
def gated_mlp(
    x, up, down, up_bias, down_bias, gate, *, act: str = "silu", layout: str = "concat",
    alpha: float = 1.0, beta: float = 0.0, limit: float = float("inf"),
):  # fmt: skip
    """Compute down(act(g) (u + beta)) with g, u the two halves of up(x), as an expert of moe.experts does.

    With a `gate` the result is multiplied by sigmoid(x gateᵀ), one number a token (Qwen2-MoE's shared expert).
    """
    h = torch.nn.functional.linear(x, up, up_bias)
    y = torch.nn.functional.linear(activate(h, act, True, layout, alpha, beta, limit), down, down_bias)
    return y if gate is None else y * torch.sigmoid(torch.nn.functional.linear(x, gate))
