"""What an activation computes in torch, and how many numbers it leaves."""

from __future__ import annotations

from collections.abc import Callable

from ..ir.activation import Activation
from ..ir.deferred import torch
from ..ir.dims import Size
from .define import inference_error

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: torch.nn.functional.silu(x),
    "gelu": lambda x: torch.nn.functional.gelu(x),
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": lambda x: torch.relu(x),
    "relu2": lambda x: torch.relu(x).square(),
    "identity": lambda x: x,
}


def apply_activation(h: torch.Tensor, act: Activation) -> torch.Tensor:
    """Return the activation of the first matrix's result; the formula is at `Activation`."""
    function = FUNCTIONS[act.kind]
    if not act.gated:
        return function(h)
    g, u = (h[..., 0::2], h[..., 1::2]) if act.interleaved else h.chunk(2, dim=-1)
    g, u = g if act.clamp_after else g.clamp(max=act.limit), u.clamp(-act.limit, act.limit)
    gate = g * torch.sigmoid(act.alpha * g) if act.kind == "silu" else function(g)
    return (gate.clamp(max=act.limit) if act.clamp_after else gate) * (u + act.beta)


def inner_size(name: str, rows: Size, act: Activation, gated: bool = False) -> Size:
    """Return how many numbers the activation of an op leaves of `rows`.

    MoecError for what is no activation, for one without a gate where the op needs it (`gated`), and for an odd number.
    """
    if not isinstance(act, Activation):
        raise inference_error(f"{name}: act={act} is no activation; write it as in act=gated(silu) or act=plain(relu)")
    if not act.gated and gated:
        raise inference_error(f"{name} has a gate, {act} is without one")
    if act.gated and rows % 2 != 0:
        raise inference_error(f"{name}: {rows} rows are no halves for gate and up")
    return rows / 2 if act.gated else rows
