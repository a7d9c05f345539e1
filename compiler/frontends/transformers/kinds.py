"""Sorts a model's layers into kinds, each of which is traced once.

Every call of a layer is run on shapes alone and each of its operations is recorded. Calls that do the same are one kind,
whatever tells them apart (a list of layer numbers in the config, an attribute that nothing reads, the place of their
states in the cache); layers that are made of the same modules and do something else (a scale that hangs on the layer's
number) are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import MoecError
from .layer_program import LayerProgram, argument_names, layer_inputs, state_names
from .layers import LayerCall
from .model_errors import CODE_ERRORS
from .tracing import current_trace

MAX_COMPARED = 65536  # elements of a tensor, made outside the layer, whose values are part of the record


def group_kinds(
    prefix: str,
    layers: list[LayerCall],
    buffers: Mapping[str, Tensor],
    stored_as: Callable[[int], Hashable] | None = None,
) -> list[LayerCall]:
    """Number the kinds of calls of layers in order of appearance; return the first call of each kind.

    `buffers` are the values that layers compute for themselves, by full name; `prefix` is the name of the list;
    `stored_as` says how the weights of a layer are stored.
    """
    first: dict[Hashable, LayerCall] = {}
    for layer in layers:
        stored = stored_as(layer.index) if stored_as else None
        does = _record_operations(layer, _computed_buffers(f"{prefix}.{layer.index}.", buffers))
        representative = first.setdefault((_layer_interface(layer), does, stored), layer)
        layer.kind = len(first) - 1 if representative is layer else representative.kind
    return list(first.values())


def _layer_interface(layer: LayerCall) -> Hashable:
    """Return what a call of a layer has to fit: names, types and states of its arguments and results."""
    given = tuple((tuple(t.shape), str(t.dtype)) for t in layer.tensors)
    states = tuple((label, tuple(s.shape)) for (_, label), s in layer.states.items())
    results = tuple((tuple(r.shape), str(r.dtype)) for r in layer.results)
    names = (*argument_names(layer), *state_names(layer))
    handed = (tuple(layer.earlier), tuple(layer.shared), tuple(layer.given))
    return (names, given, states, results, layer.window, handed)


def _computed_buffers(place: str, buffers: Mapping[str, Tensor]) -> dict[str, Hashable]:
    """Return the values that the layer at a place computed for itself, by their names in the layer."""
    return {name.removeprefix(place): _exact_values(b) for name, b in buffers.items() if name.startswith(place)}


def _exact_values(tensor: Tensor) -> Hashable:
    """Return a tensor as something whose equality is that of every bit."""
    values = id(tensor) if tensor.is_meta else repr(tensor.flatten().tolist())
    return (str(tensor.dtype), tuple(tensor.shape), values)


def _record_operations(layer: LayerCall, computed: Mapping[str, Hashable]) -> Hashable:
    """Return every operation of a layer in order, the tensors by where they come from."""
    program, inputs = LayerProgram(layer), layer_inputs(layer)
    current_trace().window = layer.window
    try:
        with _Recorder(program, inputs, computed) as recorder, torch.no_grad():
            results, states = program(inputs)
    except (*CODE_ERRORS, MoecError):
        return layer.place  # it stays a kind of its own, and tracing it says what is wrong
    return (tuple(recorder.lines), recorder.name(results), recorder.name(states))


class _Recorder(TorchDispatchMode):
    """Writes down operations: their arguments, and for each tensor the parameter, input or operation it comes from."""

    def __init__(self, program: LayerProgram, inputs: list[Tensor], computed: Mapping[str, Hashable]) -> None:
        super().__init__()
        self.lines: list[Hashable] = []
        self.kept: list[Tensor] = []  # an id says nothing once its tensor is gone
        self.names: dict[int, Hashable] = {}
        for name, tensor in [*program.layer.named_parameters(), *program.layer.named_buffers()]:
            self.add(tensor, (name, tuple(tensor.shape), str(tensor.dtype), computed.get(name)))
        for i, tensor in enumerate(inputs):
            self.add(tensor, i)

    def add(self, tensor: Tensor, name: Hashable) -> None:
        """Record the name of a tensor."""
        self.kept.append(tensor)
        self.names[id(tensor)] = name

    def name(self, value: Any) -> Hashable:
        """Return what an argument is, comparable between layers."""
        match value:
            case Tensor():
                if id(value) not in self.names:  # neither of the layer nor made by an operation
                    self.add(value, ("at", id(value)) if value.numel() > MAX_COMPARED else _exact_values(value))
                return self.names[id(value)]
            case list() | tuple():
                return tuple(self.name(v) for v in value)
            case dict():
                return tuple((key, self.name(v)) for key, v in sorted(value.items()))
            case float():
                return (math.copysign(1.0, value), repr(value))
        return repr(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = (func, self.name(args), self.name(kwargs or {}))
        results = func(*args, **(kwargs or {}))
        number = len(self.lines)
        made = [r for r in (results if isinstance(results, (list, tuple)) else (results,)) if isinstance(r, Tensor)]
        for i, result in enumerate(made):
            self.add(result, (number, i))
        self.lines.append((read, tuple((tuple(r.shape), str(r.dtype)) for r in made)))
        return results
