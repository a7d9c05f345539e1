"""Recurrent layers as single ops: short convolutions, gated delta rules, Mamba, lightning attention.

transformers computes them in chunks, or token by token in Python loops, and neither can be traced for every length.
While a model is imported, the functions of its modelling code that do so are replaced by those below (see replace.py),
which say the same in `moec::causal_conv` and `moec::linear_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import MoecError
from ..transformers.cache import takes_cache
from ..transformers.tracing import current_trace

# --- the single ops --------------------------------------------------------------------------------------------


@torch.library.custom_op("moec::conv_window", mutates_args=())
def conv_window_op(past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Stand for `nn.conv_window`."""
    whole = torch.cat((past, new), dim=2)
    return whole, whole[:, :, new.shape[2] :].clone()


@conv_window_op.register_fake
def _(past, new):
    return new.new_empty(*new.shape[:2], past.shape[2] + new.shape[2]), torch.empty_like(past)


@torch.library.custom_op("moec::new_state", mutates_args=())
def new_state_op(x: Tensor) -> Tensor:
    """Stand for `nn.new_state`."""
    return x.clone()


@new_state_op.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("moec::causal_conv", mutates_args=())
def causal_conv_op(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Stand for `nn.causal_conv`."""
    return torch.empty_like(x)


@causal_conv_op.register_fake
def _(x, w, b):
    return torch.empty_like(x)


@torch.library.custom_op("moec::linear_attention", mutates_args=())
def linear_attention_op(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, past: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Stand for `nn.linear_attention`."""
    return torch.empty_like(v), past.clone()


@linear_attention_op.register_fake
def _(q, k, v, decay, beta, past, scale):
    return torch.empty_like(v), torch.empty_like(past)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, past: Tensor | None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Emit the op; without a past (in the rehearsal) its shape follows from keys [B, S, H, K] and values [B, S, H, V]."""
    if past is None:
        past = k.new_empty(k.shape[0], *k.shape[2:], v.shape[3])
    return torch.ops.moec.linear_attention(q, k, v, decay, beta, past, scale)


# --- what the functions of the modelling code become -------------------------------------------------------------


def _causal_conv1d(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
) -> Tensor:
    from transformers.activations import ACT2FN

    y = torch.ops.moec.causal_conv(hidden_states, weight, bias)
    return y if activation is None else ACT2FN[activation](y)


def _delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if key.shape[2] != value.shape[2]:
        query, key = (x.repeat_interleave(value.shape[2] // key.shape[2], dim=2) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    decay = g[..., None] if g.dim() == 3 else g
    return linear_attention(query, key, value, decay, beta, initial_state, key.shape[-1] ** -0.5)


def _mamba(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """Mamba (Gu and Dao 2023): every channel is a head with one value and a decay for each number of its state."""
    x, dt = hidden_states.transpose(1, 2), dt.transpose(1, 2)  # [B, S, D]
    dt = dt if delta_bias is None else dt + delta_bias
    dt = functional.softplus(dt) if delta_softplus else dt
    keys, queries = (t.transpose(1, 2)[:, :, None, :].expand(-1, -1, A.shape[0], -1) for t in (B, C))
    # transformers starts from nothing here, also where more tokens follow a past; the state is what decoding needs
    y, state = linear_attention(queries, keys, (dt * x)[..., None], dt[..., None] * A, None, current_trace().recurrent)
    y = y[..., 0]
    y = y if D is None else y + D * x
    y = y.transpose(1, 2)
    y = y if z is None else y * functional.silu(z)
    return (y, state) if return_last_state else y


def _mamba2(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """Mamba 2 (Dao and Gu 2024): one decay a head; queries are C, keys B, values dt x."""
    if z is not None:
        raise MoecError("mamba2_chunk_scan with a gate of its own is not understood")
    heads = hidden_states.shape[2]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = functional.softplus(dt) if dt_softplus else dt
    if tuple(dt_limit) != (0.0, float("inf")):
        dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    keys, queries = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    values = hidden_states * dt[..., None]
    y, state = linear_attention(queries, keys, values, (A * dt)[..., None], None, initial_states)
    y = y if D is None else y + D[..., None] * hidden_states
    return (y, state) if return_final_states else y


def _padding_mask(config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """Return the padding mask of the new tokens. transformers leaves it out where it sees that nothing is padded."""
    return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]


@takes_cache
def _lightning(
    self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor | None,
    cache: Any = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Lightning attention (Qin et al. 2024): linear attention with a fixed decay for each head."""
    batch, new, _ = hidden_states.shape
    qkv = self.act_fn(self.qkv_proj(hidden_states))
    qkv = qkv if attention_mask is None else qkv * attention_mask[:, :, None].to(qkv.dtype)
    qkv = qkv.reshape(batch, new, self.num_attention_heads, 3 * self.head_dim)
    q, k, v = torch.split(qkv, self.head_dim, dim=3)
    decay = (-self.slope_rate.reshape(1, 1, -1, 1)).expand(batch, new, -1, -1)
    past = cache.get_recurrent_state(self.layer_idx)
    y, state = linear_attention(q, k, v, decay, None, past)
    cache.update_recurrent_state(state, self.layer_idx)
    y = self.norm(y.reshape(batch, new, self.num_attention_heads * self.head_dim))
    return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * y), None


@takes_cache
def _dynamic_convolution(
    self: Any, hidden_states: Tensor, dynamic_input: Tensor, cache: Any = None,
    conv_mask: Tensor | None = None, cache_offset: int = 0, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Inkling 2's short convolution, whose taps are a sum of weights and of what each token says, tap by tap."""
    batch, new, width = hidden_states.shape
    taps = self.conv_kernel_size
    by_token = self.weight_proj(dynamic_input).view(batch, new, self.num_heads, 1, taps)
    weights = self.static_weight.T.view(self.num_heads, -1, taps) + by_token
    seen = hidden_states if conv_mask is None else hidden_states * conv_mask[:, :, None].to(hidden_states.dtype)
    whole = cache.update_conv_state(
        seen.transpose(1, 2), self.layer_idx + cache_offset, state_idx=self.conv_idx, conv_kernel_size=taps
    )
    total = hidden_states.view(batch, new, self.num_heads, -1)
    for lag in range(taps):
        piece = whole[:, :, taps - lag : whole.shape[2] - lag].transpose(1, 2)
        total = total + piece.reshape(batch, new, self.num_heads, -1) * weights[..., lag]
    return total.reshape(batch, new, width) / math.sqrt(2 * taps + 1)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _causal_conv1d,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba_selective_scan": _mamba,
    "mamba2_chunk_scan": _mamba2,
    "create_recurrent_attention_mask": _padding_mask,
}
METHODS: dict[str, Callable[..., Any]] = {
    "MiniMaxLightningAttention.forward": _lightning,
    "Inkling2DynamicShortConvolution.forward": _dynamic_convolution,
    "Inkling2LoopDynamicShortConvolution.forward": _dynamic_convolution,
}
