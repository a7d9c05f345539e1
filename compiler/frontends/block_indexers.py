"""Indexers that choose blocks of tokens in place of tokens: MiniMax-M3.

transformers counts the blocks in Python, so that a trace would hold for one number of them. The forward passes below
say the same for any number, by `moec::blocks` and `moec::spread`. What they return is not indices but which slots each
query may read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .indexer import LOWEST


@torch.library.custom_op("moec::blocks", mutates_args=())
def blocks_op(x: Tensor, axis: int, size: int, fill: float) -> Tensor:
    """Stand for an axis of T as blocks: [.., ceil(T / size), size, ..]; the last block is filled up."""
    return x.new_empty(_blocks_shape(x, axis, size))


@blocks_op.register_fake
def _(x, axis, size, fill):
    return x.new_empty(_blocks_shape(x, axis, size))


def _blocks_shape(x: Tensor, axis: int, size: int) -> list[Any]:
    return [*x.shape[:axis], (x.shape[axis] + size - 1) // size, size, *x.shape[axis + 1 :]]


@torch.library.custom_op("moec::spread", mutates_args=())
def spread_op(x: Tensor, size: int, like: Tensor) -> Tensor:
    """Stand for values of blocks [.., N] given to each of their slots [.., T]; `like` [.., T] says how many there are."""
    return x.new_empty(*x.shape[:-1], like.shape[-1])


@spread_op.register_fake
def _(x, size, like):
    return x.new_empty(*x.shape[:-1], like.shape[-1])


def _among(chosen: Tensor, scores: Tensor) -> Tensor:
    """Return bool like scores [.., N]: which are among the numbers `chosen` [.., K] and can be chosen at all.

    Numbers of N and more are those that indexer.py adds so that there are always enough.
    """
    picked = torch.zeros(
        (*scores.shape[:-1], scores.shape[-1] + chosen.shape[-1]), dtype=torch.bool, device=scores.device
    )
    return picked.scatter(-1, chosen, True)[..., : scores.shape[-1]] & (scores > LOWEST)


# --- rows that begin with padding: blocks count from the first token behind it ---------------------------------------


def _first(slots: Tensor, position_ids: Tensor) -> Tensor:
    """Return i64[B, 1]: the slot of each row's token of position 0, from the position of its last token."""
    return slots[-1:] - position_ids[:, -1:]


def _from_first(x: Tensor, slots: Tensor, first: Tensor) -> Tensor:
    """Return x [B, T, D] with each row's first token in front, and its last one repeated at the end."""
    at = torch.minimum(first + slots, slots[-1:])
    return torch.gather(x, 1, at[:, :, None].expand(-1, -1, x.shape[2]))


def _to_slots(x: Tensor, slots: Tensor, first: Tensor) -> Tensor:
    """Return bool x [B, H, S, T], which counts from each row's first token, by slots; what the padding gets is no matter."""
    at = (slots - first).clamp(min=0)
    return torch.gather(x, 3, at[:, None, None, :].expand(-1, x.shape[1], x.shape[2], -1))


# --- the indexers --------------------------------------------------------------------------------------------------


def _minimax(
    self: Any, hidden_states: Tensor, position_embeddings: Any, past_key_values: Any, position_ids: Tensor
) -> Tensor:
    """MiniMax-M3: for each group of heads the blocks of the highest score, the query's own and those before it always.

    A block's score is that of its best key. Returns bool[B, H, S, T]. transformers counts blocks from slot 0, padding
    or not, and so chooses other tokens for a row with padding than for the row alone.
    """
    batch, new, _ = hidden_states.shape
    turn = sys.modules[type(self).__module__].apply_rotary_pos_emb
    q = self.q_norm(self.q_proj(hidden_states).view(batch, new, -1, self.head_dim)).transpose(1, 2)
    k = self.k_norm(self.k_proj(hidden_states).view(batch, new, 1, self.head_dim)).transpose(1, 2)
    cos, sin = position_embeddings
    q, k = turn(q, k, cos[..., : self.head_dim], sin[..., : self.head_dim])
    keys = past_key_values.update_indexer(k.squeeze(1), self.layer_idx)
    slots = torch.arange(keys.shape[1], device=keys.device)
    first = _first(slots, position_ids)
    keys = _from_first(keys, slots, first)
    scores = torch.matmul(q.float(), keys.float().transpose(-1, -2).unsqueeze(1))
    scores = scores.masked_fill(slots > position_ids[:, None, :, None], LOWEST)
    best = torch.ops.moec.blocks(scores, 3, self.block_size, LOWEST).amax(-1)
    if self.local_blocks:
        own = (position_ids.float() / self.block_size).floor().long()
        near = (own[..., None] - torch.arange(self.local_blocks, device=own.device)).clamp(min=0)
        best = best.scatter(-1, near.unsqueeze(1).expand(-1, self.num_heads, -1, -1), float("inf"))
    chosen = best.topk(self.topk_blocks, dim=-1).indices
    return _to_slots(torch.ops.moec.spread(_among(chosen, best), self.block_size, scores), slots, first)


METHODS: dict[str, Callable[..., Any]] = {"MiniMaxM3VLIndexer.forward": _minimax}
