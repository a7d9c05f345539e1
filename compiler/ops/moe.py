"""`moe.*`: routed experts."""

from __future__ import annotations

from collections.abc import Callable

from ..ir.deferred import torch
from ..ir.dims import Size
from ..ir.types import TensorType
from .define import Attributes, Types, fail, op

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: torch.nn.functional.silu(x),
    "gelu": lambda x: torch.nn.functional.gelu(x),
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": lambda x: torch.relu(x),
    "relu2": lambda x: torch.relu(x).square(),
    "identity": lambda x: x,
}


def _experts(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, up, down = types[0], types[3], types[4]
    if attributes["act"] not in ACTIVATIONS:
        raise fail(f"moe.experts does not know act={attributes['act']}; it knows {', '.join(ACTIVATIONS)}")
    if attributes["layout"] not in ("concat", "interleaved"):
        raise fail(f"moe.experts: layout={attributes['layout']} is neither concat nor interleaved")
    inner = down.shape[2] * (2 if attributes["gated"] else 1)
    if up.shape[1] != inner:
        raise fail(f"moe.experts: up is {up}, but down {down} wants {inner} rows an expert")
    return (x.plain,)


def _experts_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    ids, up, down = operands[1], operands[3], operands[4]
    rows = ids.elements
    return 2 * rows * (up.elements / up.shape[0] + down.elements / down.shape[0]) + 4 * rows * down.shape[2]


@op(
    "moe.experts",
    "x: A[T, D], ids: i64[T, K], gates: A[T, K], up: Q[E, N, D], down: Q[E, D, I],"
    " up_bias: A[E, N]?, down_bias: A[E, D]? -> y: A[T, D]",
    infer=_experts,
    flops=_experts_flops,
    domains={"ids": lambda types, attributes: types[3].shape[0]},
    distinct=("ids",),
    rows=dict.fromkeys(("up", "down", "up_bias", "down_bias"), lambda types, attributes: types[1].elements),
)
def experts(
    x, ids, gates, up, down, up_bias, down_bias, *,
    act: str = "silu", gated: bool = True, layout: str = "concat",
    alpha: float = 1.0, beta: float = 0.0, limit: float = float("inf"),
):  # fmt: skip
    """Send each token through its K chosen experts and add the results, weighted: y[t] = sum_k gates[t, k] f_ids[t, k](x[t]).

    An expert is down(h). Gated: h = act(g) (u + beta) with g, u the two halves of up(x), whose rows are
    concatenated (`concat`) or interleaved (`interleaved`); g is clamped above at `limit`, u on both sides. For act=silu,
    act(g) = g sigmoid(alpha g): alpha=1.702, beta=1, limit=7 is gpt-oss. Not gated: h = act(up(x)).
    """
    y = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, choice = torch.where(ids == expert)
        h = torch.nn.functional.linear(x[token], up[expert], None if up_bias is None else up_bias[expert])
        h = activate(h, act, gated, layout, alpha, beta, limit)
        h = torch.nn.functional.linear(h, down[expert], None if down_bias is None else down_bias[expert])
        y.index_add_(0, token, h * gates[token, choice, None])
    return y


def activate(h, act: str, gated: bool, layout: str, alpha: float, beta: float, limit: float) -> torch.Tensor:
    """Return the activation between an expert's two matrices; for the formula see `moe.experts`."""
    function = ACTIVATIONS[act]
    if not gated:
        return function(h)
    g, u = (h[..., 0::2], h[..., 1::2]) if layout == "interleaved" else h.chunk(2, dim=-1)
    g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    gate = g * torch.sigmoid(alpha * g) if act == "silu" else function(g)
    return gate * (u + beta)
