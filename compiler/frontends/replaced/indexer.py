"""Sparse attention's indexers (DeepSeek-V3.2): each query reads the `index_topk` past tokens of the highest scores.

transformers takes at most as many as there are tokens, a number that a trace would hold fast. Here the scores are
followed by `index_topk` that nobody would choose, so that there are always enough of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..transformers.cache import SIZES

NAME = "Indexer"  # how the names of these modules end
LOWEST = float("-inf")


class _Topk(TorchFunctionMode):
    """Lets top-k of scores [..., T] choose among T + k, those at the end being lower than all others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.topk, Tensor.topk):
            scores, k = args[0], args[1] if len(args) > 1 else (kwargs or {})["k"]
            filled = torch.cat((scores, scores.new_full((*scores.shape[:-1], int(k)), LOWEST)), dim=-1)
            return func(filled, int(k), dim=-1)
        return func(*args, **(kwargs or {}))


def min_of_sizes(*numbers: Any) -> Any:
    """Return the number among sizes: what `min(index_topk, tokens)` is when there are enough of them.

    The rehearsal's sizes are numbers too, and a large `index_topk` is above them.
    """
    fixed = [n for n in numbers if type(n) is int and n not in SIZES]
    return min(fixed) if len(numbers) == 2 and fixed else min(*numbers)


def under_topk(forward: Any) -> Any:
    """Wrap an indexer's forward pass."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Topk():
            return forward(self, *args, **kwargs)

    return wrapped


def selected_slots(visible: Tensor, indices: Tensor) -> Tensor:
    """Return bool[B, S, T]: the slots of `visible` [B, 1, S, T] whose numbers are among `indices` [B, S, K]."""
    batch, _, new, total = visible.shape
    chosen = torch.zeros(batch, new, total + indices.shape[-1], dtype=torch.bool, device=visible.device)
    return visible[:, 0] & chosen.scatter(-1, indices.long(), True)[..., :total]


def causal_mask(mask: Tensor, new: Any, window: int = 0) -> Tensor:
    """Return bool[B, 1, S, T]: which slots each new token may read, from a padding mask [B, T]; 0 is no window."""
    total = mask.shape[1]
    slots = torch.arange(total, device=mask.device)
    queries = slots[total - new :]
    visible = slots[None, :] <= queries[:, None]
    if window:
        visible = visible & (queries[:, None] - slots[None, :] < window)
    return visible[None, None] & mask.bool()[:, None, None, :]
