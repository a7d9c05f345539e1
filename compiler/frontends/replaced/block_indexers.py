"""Indexers that choose blocks of tokens in place of tokens: MiniMax-M3, GLM-5 Next.

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
from torch.nn import functional

from ..transformers.cache import takes_cache
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


def _mark_chosen(chosen: Tensor, scores: Tensor) -> Tensor:
    """Return bool like scores [.., N]: which are among the numbers `chosen` [.., K] and can be chosen at all.

    Numbers of N and more are those that indexer.py adds so that there are always enough.
    """
    picked = torch.zeros(
        (*scores.shape[:-1], scores.shape[-1] + chosen.shape[-1]), dtype=torch.bool, device=scores.device
    )
    return picked.scatter(-1, chosen, True)[..., : scores.shape[-1]] & (scores > LOWEST)


# --- rows that begin with padding: blocks count from the first token behind it ---------------------------------------


def _first_token_slot(slots: Tensor, position_ids: Tensor) -> Tensor:
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


def _round_down(counts: Tensor, size: int) -> Tensor:
    """Return the largest multiples of a size that are not above the counts."""
    return (counts.float() / size).floor().long() * size


@takes_cache
def _minimax(self: Any, hidden_states: Tensor, position_embeddings: Any, cache: Any, position_ids: Tensor) -> Tensor:
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
    keys = cache.update_indexer(k.squeeze(1), self.layer_idx)
    slots = torch.arange(keys.shape[1], device=keys.device)
    first = _first_token_slot(slots, position_ids)
    keys = _from_first(keys, slots, first)
    scores = torch.matmul(q.float(), keys.float().transpose(-1, -2).unsqueeze(1))
    scores = scores.masked_fill(slots > position_ids[:, None, :, None], LOWEST)
    best = torch.ops.moec.blocks(scores, 3, self.block_size, LOWEST).amax(-1)
    if self.local_blocks:
        own = (position_ids.float() / self.block_size).floor().long()
        near = (own[..., None] - torch.arange(self.local_blocks, device=own.device)).clamp(min=0)
        best = best.scatter(-1, near.unsqueeze(1).expand(-1, self.num_heads, -1, -1), float("inf"))
    chosen = best.topk(self.topk_blocks, dim=-1).indices
    return _to_slots(torch.ops.moec.spread(_mark_chosen(chosen, best), self.block_size, scores), slots, first)


@takes_cache
def _glm(self: Any, hidden_states: Tensor, q_resid: Tensor, attention_mask: Tensor, cache: Any) -> Tensor:
    """GLM-5 Next: pools of `index_kpool` tokens, each with a mean of its keys that the tokens weigh; the last tokens always.

    `attention_mask` is of the new tokens only, so that the cache keeps it beside the keys. Returns bool[B, S, T].
    """
    batch, new, _ = hidden_states.shape
    size, width = self.index_kpool, self.head_dim
    q = self.wq_b(q_resid).view(batch, new, -1, width)
    gates = functional.linear(hidden_states, self.index_kpool_compress_gate)
    k = torch.cat((self.k_norm(self.wk(hidden_states)), gates, attention_mask.to(gates.dtype)[..., None]), dim=-1)
    kept = cache.update_indexer(k, self.layer_idx)
    real = kept[..., -1] > 0
    slots = torch.arange(kept.shape[1], device=kept.device)
    first = (real.long().cumsum(-1) == 0).long().sum(-1, keepdim=True)
    pools = torch.ops.moec.blocks(_from_first(kept, slots, first), 1, size, 0.0)
    keys, gates = pools[..., :width], pools[..., width : 2 * width] + self.index_kpool_compress_ape
    keys = (gates.softmax(dim=2) * keys).sum(2)
    each = functional.relu(torch.matmul(q, keys.transpose(-1, -2).unsqueeze(1)) * self.softmax_scale)
    weights = self.weights_proj(hidden_states) * self.n_heads**-0.5
    scores = torch.matmul(weights.unsqueeze(-2), each).squeeze(-2)
    seen = slots[kept.shape[1] - new :] - first + 1  # how many tokens each query may read
    ends = (torch.arange(keys.shape[1], device=keys.device) + 1) * size
    scores = scores.masked_fill(ends > seen[..., None], LOWEST)
    chosen = scores.topk(self.index_topk // size, dim=-1).indices
    read = torch.ops.moec.spread(_mark_chosen(chosen, scores), size, real)
    if self.index_kpool_always_select_tail:
        read = read | (slots >= _round_down(seen, size)[..., None])
    return _to_slots(read.unsqueeze(1), slots, first)[:, 0] & real[:, None, :]


def _glm_mask(self: Any, topk_indices: Tensor, query_states: Tensor, kv_length: Any) -> Tensor:
    return topk_indices.unsqueeze(1)


METHODS: dict[str, Callable[..., Any]] = {
    "MiniMaxM3VLIndexer.forward": _minimax,
    "Glm5NextTextIndexer.forward": _glm,
    "Glm5NextTextAttention.build_attention_mask_from_topk": _glm_mask,
}
