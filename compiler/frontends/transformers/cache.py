"""What stands in for transformers' Cache while a model is traced: every state of a layer, by one op each.

Keys and values grow by `moec::cache_append`. The states of convolutions and of linear attention keep their size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ...errors import MoecError

# Sizes of the rehearsal: primes that no model has as a size, so that a dim of a result says where it comes from.
BATCH, NEW, PAST = 1009, 1013, 1019
SIZES = {BATCH: "B", NEW: "S", PAST: "P", PAST + NEW: "P + S"}

StateKey = tuple[int, str]  # the number that the layer gives, and which of its states: key, value, conv, recurrent, ...
GROWING = ("key", "value", "index_key")  # these grow along axis 2


def past_like(label: str, present: Tensor) -> Tensor:
    """Return a past for a state as it was after a step of the rehearsal."""
    shape = list(present.shape)
    if label.partition("_")[0] in ("key", "value") or label in GROWING:
        shape[2] = PAST
    return present.new_empty(shape)


class _NoLayers(tuple[()]):
    """The layers of a cache that has none of its own."""

    def __getitem__(self, number: Any) -> Any:
        raise MoecError("the model uses the layers of its cache one by one, which is not understood")


class TraceCache:
    """Hands out past states and keeps the present ones. Without `past` it is the rehearsal's, and pasts are made up."""

    is_compileable = False
    is_initialized = True
    layers = _NoLayers()

    def __init__(self, past: dict[StateKey, Tensor] | None = None, length: Any = PAST) -> None:
        self.past = past
        self.present: dict[StateKey, Tensor] = {}
        self.length = length

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values; values of width 0 (MLA without rotated keys) are no state."""
        keys = self._append((layer_idx, "key"), key)
        if value.shape[-1] == 0:
            return keys, value.new_zeros(*value.shape[:2], keys.shape[2], 0)
        return keys, self._append((layer_idx, "value"), value)

    def update_indexer(self, key: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Append the keys [B, S, D] that an indexer scores tokens by; they are kept as one head's."""
        return self._append((layer_idx, "index_key"), key.unsqueeze(1)).squeeze(1)

    def _append(self, name: StateKey, new: Tensor) -> Tensor:
        past = self.past[name] if self.past is not None else past_like(name[1], new)
        self.length = past.shape[2]
        return self._keep(name, torch.ops.moec.cache_append(past, new))

    def _keep(self, name: StateKey, present: Tensor) -> Tensor:
        if name in self.present:
            raise MoecError(f"layer {name[0]} updates its {name[1]} state twice in one step, which is not understood")
        self.present[name] = present
        return present

    # --- states that keep their size ---------------------------------------------------------------------------

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the last tokens that a convolution saw."""
        return self._past_of((layer_idx, _numbered_label("conv", state_idx)))

    def update_conv_state(
        self, new: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the convolution's past tokens and the new ones, and keep the last `conv_kernel_size` of them."""
        name = (layer_idx, _numbered_label("conv", state_idx))
        if conv_kernel_size is None:  # the layer has put past and new tokens together itself
            return self._keep(name, torch.ops.moec.new_state(new))
        past = self._past_of(name)
        if past is None:
            past = new.new_empty(*new.shape[:2], conv_kernel_size)
        whole, present = torch.ops.moec.conv_window(past, new)
        self._keep(name, present)
        return whole

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the state of a linear attention."""
        from .tracing import current_trace

        past = self._past_of((layer_idx, _numbered_label("recurrent", state_idx)))
        current_trace().recurrent = past
        return past

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keep the state of a linear attention."""
        return self._keep((layer_idx, _numbered_label("recurrent", state_idx)), torch.ops.moec.new_state(state))

    def _past_of(self, name: StateKey) -> Tensor | None:
        return self.past.get(name) if self.past is not None else None

    def is_recording_past(self, *args: Any, **kwargs: Any) -> bool:
        """Return False: nothing is rolled back."""
        return False

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        """Return whether there is a past: in the rehearsal there is none."""
        return self.past is not None

    # --- sizes ---------------------------------------------------------------------------------------------------

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """Return the number of past tokens."""
        if self.length is None:
            raise MoecError("a layer without keys and values asks for the number of past tokens")
        return self.length

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: Any, *args: Any, **kwargs: Any) -> tuple[Any, int]:
        """Return (slots, offset of the first slot)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, *args: Any, **kwargs: Any) -> int:
        """Return -1: there is no bound."""
        return -1

    get_max_cache_shape = get_max_length

    def __len__(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("past", "present"):
            raise AttributeError(name)
        raise MoecError(f"the model uses its cache's {name!r}, which is not understood")


def _numbered_label(label: str, index: int) -> str:
    return f"{label}_{index}" if index else label


# --- what transformers calls a cache ------------------------------------------------------------------------------

NAME = "cache"  # since transformers 5.24; before it was one of the others
OLD_NAMES = ("past_key_values", "cache_params")


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword argument by which a model is given its cache."""
    known = signature(model.forward).parameters
    return {next((name for name in (NAME, *OLD_NAMES) if name in known), _usual_name()): cache}


@lru_cache(maxsize=1)
def _usual_name() -> str:
    """Return the name in the installed transformers, for a model whose forward passes its keywords on."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return NAME if NAME in {field.name for field in fields(CausalLMOutputWithPast)} else OLD_NAMES[0]


def returned_cache(output: Any) -> Any:
    """Return the cache that a model's output holds."""
    # transformers warns where an old name is asked for beside the new one
    return getattr(output, next(name for name in (NAME, *OLD_NAMES) if hasattr(output, name)))


def takes_cache(function: Callable[..., Any]) -> Callable[..., Any]:
    """Accept the older names of the parameter `cache` of a function."""

    @wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{NAME if key in OLD_NAMES else key: value for key, value in kwargs.items()})

    return renamed


@lru_cache(maxsize=1)
def cache_class() -> type:
    """Return TraceCache as a subclass of transformers' Cache, which some models ask for."""
    from transformers import Cache

    return type("TraceCache", (TraceCache, Cache), {"__init__": TraceCache.__init__, "is_sliding": []})


def shared_class() -> Any:
    """Return the class in which layers hand keys and values on to others; None for a transformers that has none yet."""
    from transformers import cache_utils

    return getattr(cache_utils, "KVSharingDict", None)
