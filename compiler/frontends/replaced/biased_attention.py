"""Attention as products and a softmax, where `nn.attention` has no place for it: with something added to its scores, or
to things that are no tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_with_bias(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, bias: Tensor, sinks: Tensor | None
) -> Tensor:
    """Attend with a bias [B, H, S, T] on the scores, and a sink [B, H, S, 1] of its own for each query.

    q is [B, H, S, D], k [B, G, T, D], v [B, G, T, E], visible bool[B, 1, S, T]; the result is [B, S, H, E].
    """
    groups = k.shape[1]
    apart = q.reshape(q.shape[0], groups, q.shape[1] // groups, *q.shape[2:])
    scores = torch.matmul(apart, k.unsqueeze(2).transpose(-1, -2)).reshape(bias.shape) * scale + bias
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)  # not -inf: padding reads nothing at all
    if sinks is not None:
        scores = torch.cat((scores, sinks), dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if sinks is not None:
        weights = weights[..., : k.shape[2]]
    y = torch.matmul(weights.reshape(*apart.shape[:4], k.shape[2]), v.unsqueeze(2))
    return y.reshape(*q.shape[:3], v.shape[3]).transpose(1, 2)


def attend_unmasked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend to all of a fixed number N of things, such as what earlier layers made of a token.

    q is [B, H, Q, D], k [B, G, N, D], v [B, G, N, E]; the result is [B, Q, H, E].
    """
    apart = q.reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], *q.shape[2:])
    weights = torch.softmax(torch.matmul(apart, k.unsqueeze(2).transpose(-1, -2)) * scale, dim=-1)
    y = torch.matmul(weights, v.unsqueeze(2))
    return y.reshape(*q.shape[:3], v.shape[3]).transpose(1, 2)
