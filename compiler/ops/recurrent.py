"""`nn.*` ops of recurrent layers: short convolutions and linear attention, whose states keep their size."""

from __future__ import annotations

from ..ir.deferred import torch
from ..ir.dims import Size
from ..ir.types import TensorType
from .define import Attributes, Types, inference_error, op


def _infer_conv_window(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    past, new = types
    if past.shape[:2] != new.shape[:2]:
        raise inference_error(f"nn.conv_window: {new} does not fit after the state {past}")
    whole = TensorType(new.dtype, (*new.shape[:2], past.shape[2] + new.shape[2]))
    return whole, TensorType(past.dtype, past.shape, state=True)


@op(
    "nn.conv_window",
    "past: state A[B, C, K], new: A[B, C, S] -> whole: A[B, C, T], present: state A[B, C, K]",
    infer=_infer_conv_window,
    flops=0,
)
def conv_window(past, new):
    """Return what a convolution sees: the last K tokens of the past, then the new ones; its last K are the new state."""
    whole = torch.cat((past, new), dim=2)
    return whole, whole[:, :, new.shape[2] :]


@op("nn.new_state", "x: A[*X] -> present: state A[*X]", flops=0)
def new_state(x):
    """Return x as what a state is from now on."""
    return x


def _conv_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    return 2 * results[0].elements * operands[1].shape[1]


@op("nn.causal_conv", "x: A[B, C, T], w: A[C, K], b: A[C]? -> y: A[B, C, T]", flops=_conv_flops)
def causal_conv(x, w, b):
    """Convolve each channel over time, zeros standing before the first token: y_t = sum_j w_j x_(t - K + 1 + j) + b."""
    padded = torch.nn.functional.pad(x, (w.shape[1] - 1, 0))
    return torch.nn.functional.conv1d(padded, w[:, None], b, groups=w.shape[0])


def _infer_linear_attention(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    q, k, v, decay, _, past = types
    batch, new, heads, width = k.shape
    if past.shape != (batch, heads, width, v.shape[3]):
        raise inference_error(f"nn.linear_attention: the state {past} does not fit the keys {k} and the values {v}")
    if decay is not None and decay.shape[3] not in (1, width):
        raise inference_error(
            f"nn.linear_attention: the decay {decay} is neither one number a head nor one a channel of {k}"
        )
    return TensorType(q.dtype, (batch, new, heads, v.shape[3])), TensorType(past.dtype, past.shape, state=True)


def _linear_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    # decay 1, outer product 2, reading 2; the delta rule reads once more with the key, 2, and adds, 1
    return (8 if operands[4] else 5) * operands[1].elements * operands[2].shape[3]


@op(
    "nn.linear_attention",
    "q: A[B, S, H, K], k: A[B, S, H, K], v: A[B, S, H, V], decay: A[B, S, H, G]?, beta: A[B, S, H]?,"
    " past: state A[B, H, K, V] -> y: A[B, S, H, V], present: state A[B, H, K, V]",
    infer=_infer_linear_attention,
    flops=_linear_flops,
)
def linear_attention(q, k, v, decay, beta, past, *, scale: float = 1.0):
    """Update a state with each token and read it: M = exp(decay) M + k uᵀ, then y = scale Mᵀ q.

    u is v, or with `beta` it is beta (v - Mᵀ k), the delta rule on the decayed state (Yang et al. 2024, Gated Delta
    Networks). `decay` is the logarithm of a factor, one a head or one a channel of the keys. Mamba, lightning
    attention and KDA are this with their own decays.
    """
    state, results = past, []
    for t in range(q.shape[1]):
        if decay is not None:
            state = state * torch.exp(decay[:, t])[..., None]
        u = v[:, t]
        if beta is not None:
            u = (u - (k[:, t, :, :, None] * state).sum(2)) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * u[:, :, None, :]
        results.append((q[:, t, :, :, None] * state).sum(2) * scale)
    y = torch.stack(results, dim=1) if results else v.new_zeros(v.shape)
    return y, state
