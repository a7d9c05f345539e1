"""transformers' registration interfaces, used so that attention, experts and the cache enter a trace as single ops.

`moec::attention` and `moec::experts` have no kernel, only shapes: a traced model is never run. The mask interface
hands the padding mask on as it is (causality and windows are attributes of the attention op), and remembers which
window was asked for, since attention functions are told it only in some models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...errors import MoecError
from ..replaced.biased_attention import attend_unmasked, attend_with_bias
from ..replaced.expert_rows import expert_rows
from ..replaced.indexer import causal_mask, selected_slots
from .activations import activation_of
from .cache import SIZES, shared_class
from .tracing import _CURRENT, Tracing, current_trace

NAME = "moec"  # the name under which everything is registered with transformers


@contextmanager
def start_trace() -> Iterator[Tracing]:
    """Register with transformers and collect what one trace says."""
    register_interfaces()
    _CURRENT.append(Tracing())
    try:
        yield _CURRENT[-1]
    finally:
        _CURRENT.pop()


# --- the single ops --------------------------------------------------------------------------------------------


@torch.library.custom_op("moec::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
) -> Tensor:
    """Stand for `nn.attention`; shapes as there."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@attention_op.register_fake
def _(q, k, v, mask, sinks, scale, window, chunk, softcap):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("moec::cache_append", mutates_args=())
def cache_op(past: Tensor, new: Tensor) -> Tensor:
    """Stand for `nn.cache_append` along axis 2."""
    return torch.cat((past, new), dim=2)


@cache_op.register_fake
def _(past, new):
    return new.new_empty(*new.shape[:2], past.shape[2] + new.shape[2], *new.shape[3:])


@torch.library.custom_op("moec::experts", mutates_args=())
def experts_op(
    x: Tensor, ids: Tensor, gates: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
    act: str, transposed: bool,
) -> Tensor:  # fmt: skip
    """Stand for `moe.experts` with the activation of the text `act`; `transposed` weights are [E, in, out]."""
    return torch.empty_like(x)


@experts_op.register_fake
def _(x, ids, gates, up, down, up_bias, down_bias, act, transposed):
    return torch.empty_like(x)


# --- what transformers calls -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def register_interfaces() -> None:
    """Make the attention, mask and experts functions known to transformers, once."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if (shared := shared_class()) is not None:
        pytree.register_pytree_node(shared, _flatten_shared, _shared_of)
    AttentionInterface.register(NAME, _traced_attention)
    AttentionMaskInterface.register(NAME, _traced_mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _traced_experts)


def _shared_of(values: Any, keys: tuple[str, ...]) -> Any:
    return shared_class()(zip(keys, values, strict=True))


def _flatten_shared(states: Any) -> tuple[list[Any], tuple[str, ...]]:
    return list(states.values()), tuple(states)


_IGNORED_ATTENTION = {
    "dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_router_logits", "sliding_window",
    "cache_position", "position_embeddings", "return_dict", "output_hidden_states", "logits_to_keep",
}  # fmt: skip


def _traced_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    s_aux: Tensor | None = None, softcap: float | None = None, indices: Tensor | None = None,
    block_indices: Tensor | None = None, position_bias: Tensor | None = None, sinks: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    unknown = {k for k, v in kwargs.items() if v is not None} - _IGNORED_ATTENTION
    if unknown:
        raise MoecError(
            f"the attention of {type(module).__name__} is called with {', '.join(sorted(unknown))}, which is not understood"
        )
    if block_indices is not None and attention_mask is not None:  # of block_indexers.py: what each query may read
        attention_mask = block_indices & causal_mask(attention_mask, query.shape[2])
    elif indices is not None and attention_mask is not None:
        attention_mask = selected_slots(attention_mask, indices)
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        added = any(x is not None for x in (attention_mask, s_aux, softcap, position_bias, sinks))
        if added or not isinstance(key.shape[2], int) or key.shape[2] in SIZES:
            raise MoecError(f"{type(module).__name__} attends in both directions; only causal attention is understood")
        return attend_unmasked(query, key, value, scale), None  # to a fixed number of things, which are no tokens
    masks = _group_masks(module, attention_mask, key.shape[1])
    window, chunk = current_trace().window
    if position_bias is not None and attention_mask is not None and not chunk and not softcap:
        return attend_with_bias(
            query, key, value, causal_mask(attention_mask, query.shape[2], window), scale, position_bias, sinks
        ), None
    if position_bias is not None or sinks is not None:
        raise MoecError(f"{type(module).__name__} adds to its scores or sinks in a way that is not understood")
    if len(masks) == 1:
        shared, bound = masks[0], float(softcap or 0.0)
        return torch.ops.moec.attention(query, key, value, shared, s_aux, scale, window, chunk, bound), None
    parts = (x.chunk(len(masks), dim=1) for x in (query, key, value))  # heads that share a mask attend together
    offsets = [None] * len(masks) if s_aux is None else list(s_aux.chunk(len(masks)))
    found = [
        torch.ops.moec.attention(q, k, v, mask, sink, scale, window, chunk, float(softcap or 0.0))
        for q, k, v, mask, sink in zip(*parts, masks, offsets, strict=True)
    ]
    return torch.cat(found, dim=2), None


def _group_masks(module: Any, mask: Tensor | None, heads: int) -> list[Tensor | None]:
    """Return the mask of each group of heads: one for all of them, or those of bool[B, groups, S, T]."""
    if mask is None or mask.dim() == 2 or (mask.dim() == 3 and mask.dtype == torch.bool):
        return [mask]
    if mask.dim() != 4 or mask.dtype != torch.bool or heads % mask.shape[1]:
        raise MoecError(
            f"{type(module).__name__} builds its own attention mask; only [batch, slots] masks are understood"
        )
    return list(mask.unbind(1))


def _traced_mask(
    *args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    if attention_mask is None:
        return None
    if kwargs.get("use_vmap"):
        raise MoecError("the model adds a mask function of its own to the causal mask, which is not understood")
    if kwargs.get("allow_is_causal_skip") is False:  # an indexer needs to see which token reads which
        return causal_mask(attention_mask, kwargs["q_length"])
    mask = attention_mask.clone() if not torch.compiler.is_exporting() else attention_mask
    tracing_ = current_trace()
    # models whose layers attend to everything may be asked for the mask of a window of no tokens: see layers.py
    size = 0 if local_size is None else int(local_size) or -1
    tracing_.windows[id(mask)] = (0, size) if _is_chunked(kwargs.get("mask_function")) else (size, 0)
    tracing_.masks.append(mask)
    return mask


def _is_chunked(function: Any) -> bool:
    """Return whether a mask function is chunked attention's, which transformers makes of several in a closure."""
    cells = getattr(function, "__closure__", None) or ()
    parts = [p for cell in cells for p in (cell.cell_contents if isinstance(cell.cell_contents, tuple) else ())]
    return any("chunked" in getattr(p, "__qualname__", "") for p in parts)


def _traced_experts(module: Any, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    up = module.gate_up_proj if module.has_gate else module.up_proj
    prefix = "gate_up_proj" if module.has_gate else "up_proj"
    layout = "concat" if module.is_concatenated else "interleaved"
    act, norm = activation_of(module, module.has_gate, layout), getattr(module, "post_expert_norm", None)
    if act is None or norm is not None:
        if module.has_bias or module.is_transposed or not module.has_gate:
            what = "a norm behind each expert" if norm is not None else "an activation that moe.experts does not know"
            raise MoecError(f"{type(module).__name__} has {what}, which is understood of plain experts only")
        return expert_rows(x, ids, gates, up, module.down_proj, module._apply_gate, norm)
    up_bias = getattr(module, f"{prefix}_bias", None) if module.has_bias else None
    down_bias = module.down_proj_bias if module.has_bias else None
    weights = (up, module.down_proj, up_bias, down_bias)
    return torch.ops.moec.experts(x, ids, gates, *weights, str(act), module.is_transposed)
