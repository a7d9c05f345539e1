"""Rotary embeddings that cannot be traced as transformers writes them: complex numbers, and angles that look at data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import MoecError

MOVING = ("dynamic", "longrope")  # these choose their frequencies by the positions that they are given


def _frequencies(self: Any, positions: Tensor) -> Tensor:
    """Return each position's angles twice, once for each half of a head: [B, S, R]."""
    if self.rope_type in MOVING:
        raise MoecError(f"rope_type {self.rope_type!r} is not understood in {type(self).__name__}")
    freqs = positions[..., None].float() * self.inv_freq.float()
    return torch.cat((freqs, freqs), dim=-1)


# --- complex numbers -----------------------------------------------------------------------------------------------


def _complex_angles(self: Any, x: Tensor, position_ids: Tensor) -> Tensor:
    """Return cosines and sines as one tensor [2, B, S, R] in place of complex numbers [B, S, R / 2]."""
    freqs = _frequencies(self, position_ids)
    return torch.stack((freqs.cos(), freqs.sin())) * self.attention_scaling


def _turn_pairs(q: Tensor, k: Tensor, angles: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Rotate neighbouring numbers as pairs; `heads` is the axis of the heads.

    The result has the first numbers of all pairs before the second ones. Only products of q and k are taken, which do
    not depend on the order.
    """
    cos, sin = angles[0].unsqueeze(heads), angles[1].unsqueeze(heads)

    def rotate(x: Tensor) -> Tensor:
        halves = x.reshape(*x.shape[:-1], -1, 2).transpose(-1, -2).reshape(x.shape)
        first, second = halves.chunk(2, dim=-1)
        return halves * cos + torch.cat((-second, first), dim=-1) * sin

    return rotate(q), rotate(k)


def _turn_before_tokens(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    return _turn_pairs(xq, xk, freqs_cis, 1)


def _turn_behind_tokens(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    return _turn_pairs(xq, xk, freqs_cis, 2)


# --- positions in three axes, and positions that are looked at -----------------------------------------------------


def _text_angles(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Multi-axis angles of text: all axes hold the same position, so that it does not matter which a channel takes."""
    freqs = _frequencies(self, position_ids[0] if position_ids.dim() == 3 else position_ids)
    return freqs.cos() * self.attention_scaling, freqs.sin() * self.attention_scaling


def _phimoe_angles(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Phi-MoE's LongRoPE: frequencies as the config gives them; a scale for sequences beyond the original length."""
    rope = self.config.rope_parameters
    freqs = position_ids[..., None].float() * self.inv_freq.float()
    freqs = torch.cat((freqs, freqs), dim=-1)
    if rope["rope_type"] == "default":
        return freqs.cos() * self.attention_scaling, freqs.sin() * self.attention_scaling
    longer = (position_ids.amax() >= rope["original_max_position_embeddings"]).float()
    scale = rope["short_mscale"] + longer * (rope["long_mscale"] - rope["short_mscale"])
    return freqs.cos() * scale, freqs.sin() * scale


LOCAL_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "modeling_deepseek_v2.apply_rotary_emb": _turn_before_tokens,
    "modeling_llama4.apply_rotary_emb": _turn_behind_tokens,
}
METHODS: dict[str, Callable[..., Any]] = {
    "DeepseekV2RotaryEmbedding.forward": _complex_angles,
    "Llama4TextRotaryEmbedding.forward": _complex_angles,
    "PhimoeRotaryEmbedding.forward": _phimoe_angles,
    **{
        f"{name}TextRotaryEmbedding.forward": _text_angles
        for name in ("Qwen3_5Moe", "Qwen3VLMoe", "Qwen3OmniMoeThinker", "Glm4vMoe", "Qwen4Exp")
    },
}
