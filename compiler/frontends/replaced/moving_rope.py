"""Rotary embeddings whose frequencies hang on how long the sequence is: rope types `dynamic` and `longrope`.

transformers computes them anew in Python where a longer sequence comes, and keeps them in the module. Here they are
computed from the positions in every step. Both say the same for a sequence that grows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DYNAMIC, LONG = "dynamic", "longrope"


def kind_of(module: Any, layer_type: str | None = None) -> str:
    """Return which of the rope types above a module has, for a type of layers where it has several; empty: none."""
    found = getattr(module, "rope_type", None)
    types = found.values() if isinstance(found, dict) and layer_type is None else [found]
    if isinstance(found, dict) and layer_type is not None:
        types = [found.get(layer_type)]
    return next((k for t in types for k in (DYNAMIC, LONG) if isinstance(t, str) and k in t), "")


def follows_length(function: Any) -> bool:
    """Return whether a forward pass goes through transformers' `dynamic_rope_update`."""
    while function is not None:
        if function.__code__.co_filename.endswith("modeling_rope_utils.py"):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def by_positions(forward: Any) -> Callable[..., Any]:
    """Wrap a forward pass: the one under `dynamic_rope_update`, with frequencies that come from the positions."""
    plain = inspect.unwrap(forward)

    def wrapped(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        more = {} if layer_type is None else {"layer_type": layer_type}
        kind = kind_of(self, layer_type)
        if not kind:
            return plain(self, x, position_ids, **more)
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        rope = self.config.rope_parameters if layer_type is None else self.config.rope_parameters[layer_type]
        own = self._buffers.pop(name)
        try:
            self.__dict__[name] = frequencies_at_length(self.config, rope, kind, own, position_ids)
            return plain(self, x, position_ids, **more)
        finally:
            self.__dict__.pop(name, None)
            self._buffers[name] = own

    return wrapped


def frequencies_at_length(config: Any, rope: Any, kind: str, own: Tensor, positions: Tensor) -> Tensor:
    """Return the frequencies for the longest of the positions, from those of a short sequence."""
    length = (positions.reshape(-1).amax(0) + 1).float()
    channels = own.shape[0]
    if kind == LONG:
        ratio = torch.tensor([s / n for s, n in zip(rope["short_factor"], rope["long_factor"], strict=True)])
        longer = (length > rope["original_max_position_embeddings"]).float()
        return own * (1.0 + longer * (ratio.to(own.device) - 1.0))
    factor, trained = float(rope["factor"]), config.max_position_embeddings
    stretch = factor / trained * length.clamp(min=trained) - (factor - 1.0)
    powers = torch.arange(channels, device=own.device).float() * (-1.0 / (channels - 1))
    return own * torch.exp(torch.log(stretch) * powers)
