"""Finds a model's repeated layers, and puts one op in the place of each.

A rehearsal runs the whole model on the meta device (shapes only) and records what every layer is called with and
which caches it updates. Layers of the same kind (see kinds.py) share one trace. In the trace of the whole program
every layer is a stub, a single op, so that it costs nothing to have 94 of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...errors import MoecError
from .cache import BATCH, NEW, PAST, SIZES, StateKey, cache_argument, cache_class, shared_class
from .model_errors import CODE_ERRORS, model_error
from .tracing import Tracing, current_trace


@dataclass(eq=False)
class LayerCall:
    """What the rehearsal saw of one call of a layer; some models run through a part of their layers several times."""

    index: int  # the layer's number in its list
    place: int  # which of the model's calls of layers it is
    module: Any
    leaves: list[Any] = field(default_factory=list)  # arguments, flattened; tensors and the cache as they came
    spec: Any = None
    result_spec: Any = None
    given: list[bool] = field(default_factory=list)  # which leaves of what it returns are not None
    results: list[Tensor] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)  # keys of the states that it hands on; they end the results
    earlier: list[int] = field(default_factory=list)  # which tensor arguments are present states of earlier layers
    states: dict[StateKey, Tensor] = field(default_factory=dict)  # the present states, as the rehearsal made them
    window: tuple[int, int] = (0, 0)  # sliding window and chunk of its attention; 0: none
    kind: int = -1

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor arguments in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


def find_layers(model: Any) -> tuple[str, Any]:
    """Return the name and the ModuleList of a model's decoder layers: the largest list of the config's length.

    Layers of an encoder, of images say, are none of them. Where a layer holds two attentions, num_hidden_layers counts those and num_layers the layers.
    """
    config = model.config.get_text_config(decoder=True)
    count = config.num_hidden_layers
    lengths = {count, getattr(config, "num_layers", count)}
    decoder = set(model.get_decoder().modules())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) in lengths and module in decoder
    ]
    if not lists:
        raise MoecError(f"{type(model).__name__} has no list of {count} layers (num_hidden_layers)")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def record_layer_calls(model: Any, layers: Any, tracing: Tracing) -> list[LayerCall]:
    """Run the model on shapes alone and return what each layer was called with, call by call."""
    seen: list[LayerCall] = []
    cache = cache_class()()

    def before(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            layer = LayerCall(index, len(seen), module)
            layer.leaves, layer.spec = pytree.tree_flatten((args, kwargs))
            windows = {tracing.windows[id(t)] for t in layer.tensors if id(t) in tracing.windows}
            if len(windows) > 1:
                raise MoecError(f"layer {layer.index} gets masks with different windows")
            if any(min(window) < 0 for window in windows):
                raise MoecError(
                    f"layer {layer.index} attends within a window of no tokens", todo="correct sliding_window"
                )
            kept = {id(t) for earlier in seen for t in earlier.states.values()}
            layer.earlier = [i for i, tensor in enumerate(layer.tensors) if id(tensor) in kept]
            tracing.window = layer.window = windows.pop() if windows else (0, 0)
            seen.append(layer)

        return hook

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer = seen[-1]
        if layer.module is not module:
            raise MoecError(f"{type(module).__name__} calls other layers of the model, which is not understood")
        leaves, layer.result_spec = pytree.tree_flatten(output)
        layer.given = [leaf is not None for leaf in leaves]
        leaves = [leaf for leaf in leaves if leaf is not None]
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise MoecError(f"{type(module).__name__} returns something that is no tensor")
        handed = dict(_shared_states(pytree.tree_unflatten(layer.leaves, layer.spec)) or {})
        given = _shared_states((args, kwargs)) or {}
        layer.shared = [key for key, value in given.items() if value is not handed.get(key)]
        layer.results = [*leaves, *shared_results(layer, given)]
        layer.states = dict(cache.present)
        cache.present.clear()
        _check_states(layer, seen[:-1])

    hooks = [h for i, module in enumerate(layers) for h in (
        module.register_forward_pre_hook(before(i), with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    )]  # fmt: skip
    try:
        with torch.no_grad():
            model(**example_inputs(), **cache_argument(model, cache), use_cache=True)
    except CODE_ERRORS as error:
        raise model_error(error, type(model).__name__, model.config, "cannot be imported") from error
    finally:
        for hook in hooks:
            hook.remove()
    lacking = set(range(len(layers))) - {s.index for s in seen}
    if lacking:
        raise MoecError(f"{type(model).__name__} does not call layer {min(lacking)}")
    return seen


def _check_states(layer: LayerCall, earlier: list[LayerCall]) -> None:
    """Refuse a layer that changes a state which another call in the same step has changed."""
    for number, label in layer.states:
        if any((number, label) in other.states for other in earlier):
            raise MoecError(
                f"layer {layer.index} updates the {label} state {number} of its cache, which an earlier call in the same "
                "step has updated: that is not understood"
            )


def _shared_states(arguments: Any) -> Any:
    """Return the dictionary by which layers hand on keys and values to later layers, None if there is none."""
    if (shared := shared_class()) is None:
        return None
    found = pytree.tree_leaves(arguments, is_leaf=lambda x: isinstance(x, shared))
    return next((x for x in found if isinstance(x, shared)), None)


def shared_results(layer: LayerCall, given: Any) -> list[Tensor]:
    """Return what a layer wrote into the dictionary that it was given, or into that of its arguments."""
    states = given if hasattr(given, "keys") else _shared_states(given)
    return [tensor for key in layer.shared for tensor in states[key]]


def example_inputs() -> dict[str, Tensor]:
    """Return the program's inputs on the meta device."""

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    return {
        "input_ids": ints(BATCH, NEW),
        "attention_mask": ints(BATCH, PAST + NEW),
        "position_ids": ints(BATCH, NEW),
    }


# --- stubs: a layer as one op in the trace of the whole program ---------------------------------------------------


@torch.library.custom_op("moec::layer", mutates_args=())
def layer_op(tensors: list[Tensor], place: int) -> list[Tensor]:
    """Stand for one call of a layer; results have the shapes that the rehearsal saw."""
    return _stub_results(tensors, place)


@layer_op.register_fake
def _(tensors, place):
    return _stub_results(tensors, place)


def _stub_results(tensors: list[Tensor], place: int) -> list[Tensor]:
    layer = current_trace().layers[place]
    sizes: dict[int, Any] = {}
    for tensor, seen in zip(tensors, layer.tensors, strict=True):
        for actual, number in zip(tensor.shape, seen.shape, strict=True):
            if number in SIZES:
                sizes.setdefault(number, actual)
    sizes[BATCH * NEW] = sizes.get(BATCH, 1) * sizes.get(NEW, 1)
    return [tensors[0].new_empty([sizes.get(n, n) for n in r.shape], dtype=r.dtype) for r in layer.results]


class Stub(torch.nn.Module):
    """Takes a layer's place in its list: no parameters, one op; other attributes are the layer's own."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not registered, so that the layer's parameters stay out of the trace

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Emit `moec::layer`."""
        layer = _next_call(self.__dict__["module"])
        leaves = pytree.tree_flatten((args, kwargs))[0]
        results = torch.ops.moec.layer([t for t in leaves if isinstance(t, Tensor)], layer.place)
        count = sum(layer.given)
        if layer.shared:
            states, each = _shared_states((args, kwargs)), (len(results) - count) // len(layer.shared)
            for i, key in enumerate(layer.shared):
                states[key] = tuple(results[count + i * each : count + (i + 1) * each])
        found = iter(results[:count])
        return pytree.tree_unflatten([next(found) if given else None for given in layer.given], layer.result_spec)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["module"], name)


def _next_call(module: Any) -> LayerCall:
    """Return what the rehearsal saw of the call of a layer that comes next in a pass of the model."""
    tracing = current_trace()
    found = tracing.layers[tracing.called] if tracing.called < len(tracing.layers) else None
    if found is None or found.module is not module:
        raise MoecError(f"the order in which the model calls its layers changes: {type(module).__name__} is not next")
    tracing.called += 1
    return found


@contextmanager
def stub_layers(layers: list[LayerCall], modules: Any) -> Iterator[None]:
    """Replace every layer of a ModuleList by its stub."""
    current_trace().layers = layers
    own = list(modules)
    try:
        for i, module in enumerate(own):
            modules[i] = Stub(module)
        yield
    finally:
        for i, module in enumerate(own):
            modules[i] = module
