"""A layer of a model as a function of tensors: what is traced of it, and what its arguments are called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .cache import TraceCache, cache_class, past_like
from .layers import LayerCall, shared_results


class LayerProgram(torch.nn.Module):
    """A layer as a function of its tensor arguments and its past states, in one list."""

    def __init__(self, layer: LayerCall) -> None:
        super().__init__()
        self.layer = layer.module
        self.__dict__["seen"] = layer

    def forward(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the layer's results and its present states."""
        seen: LayerCall = self.__dict__["seen"]
        count = len(seen.tensors)
        pasts = tensors[count:]
        named = dict(zip(seen.states, pasts, strict=True))
        cache = cache_class()(named, next((p.shape[2] for (_, label), p in named.items() if label == "key"), None))
        given = iter(tensors[:count])
        leaves = [
            next(given) if isinstance(leaf, Tensor) else cache if isinstance(leaf, TraceCache) else leaf
            for leaf in seen.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, seen.spec)
        output = [leaf for leaf in pytree.tree_leaves(self.layer(*args, **kwargs)) if leaf is not None]
        output += shared_results(seen, (args, kwargs)) if seen.shared else []
        return output, [cache.present[key] for key in seen.states]


def layer_inputs(layer: LayerCall) -> list[Tensor]:
    """Return what the program of a layer is called with: its tensor arguments, then its past states."""
    return [*layer.tensors, *(past_like(label, state) for (_, label), state in layer.states.items())]


def argument_names(kind: LayerCall) -> list[str]:
    """Name a layer's tensor arguments after the keywords that they are passed by."""
    args, kwargs = pytree.tree_unflatten(list(range(len(kind.leaves))), kind.spec)
    labels: dict[int, str] = {}
    for i, tree in enumerate(args):
        for leaf in pytree.tree_leaves(tree):
            labels[leaf] = "hidden" if i == 0 else f"arg_{i}"
    for key, tree in kwargs.items():
        leaves = pytree.tree_leaves(tree)
        named = ("cos", "sin") if key == "position_embeddings" and len(leaves) == 2 else None
        for i, leaf in enumerate(leaves):
            labels[leaf] = (
                named[i] if named else "hidden" if key == "hidden_states" else key if len(leaves) == 1 else f"{key}_{i}"
            )
    return [labels[i] for i, leaf in enumerate(kind.leaves) if isinstance(leaf, Tensor)]


def state_names(kind: LayerCall) -> list[str]:
    """Name a layer's states; a layer that holds two attentions has two of a name."""
    labels = [label for _, label in kind.states]
    counts = [labels[:i].count(label) for i, label in enumerate(labels)]
    return [f"past_{label}.{n}" if n else f"past_{label}" for label, n in zip(labels, counts, strict=True)]
