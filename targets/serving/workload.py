"""What a model asks of a system for a token, read off its program once: weights by role, experts, attention, states.

Everything that depends on the past tokens P is a `Curve`, a function of P for one sequence and one new token, so that
thousands of plans can be made of one program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import sympy

from ...compiler.cost.count import op_flops, tensors_with_shares
from ...compiler.cost.states import States, passed_on
from ...compiler.errors import MoecError
from ...compiler.ir.dims import Size, evaluate
from ...compiler.ir.module import Const, Function, Module, Op, walk_calls
from ...compiler.ir.types import expand_range
from ...compiler.rewrite.roles import weight_operands, weight_roles

ONE = {"B": 1, "S": 1}
POINTS = (np.arange(16) + 0.5) / 16  # where a sum over the tokens of a prompt looks


@dataclass(frozen=True, eq=False)
class Curve:
    """A number that depends on the past tokens."""

    at: Callable[[Any], Any]

    def __call__(self, past: float) -> float:
        """Return the value behind `past` tokens."""
        return float(self.at(past))

    def mean(self, first: float, last: float) -> float:
        """Return the mean over the tokens from `first` to `last`."""
        return float(np.mean(self.at(first + (last - first) * POINTS) + np.zeros(len(POINTS))))


@dataclass(frozen=True)
class Weights:
    """The weights of a layer that have one role: numbers, bytes as the checkpoint stores them, FLOPs of one token."""

    role: str  # attention, shared, dense, router, head, embedding
    elements: int
    stored: int
    flops: int


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer: `count` of `elements` numbers each, of which a token takes `chosen`; `width` numbers go in."""

    count: int
    chosen: int
    elements: int
    inner: int
    width: int
    stored: int  # bytes of all of them in the checkpoint
    flops: int  # of one token


@dataclass(frozen=True, eq=False)
class State:
    """What one layer keeps of a sequence, in numbers; `heads` is into how many parts tensor parallelism can divide it."""

    heads: int
    kept: Curve
    read: Curve
    grows: bool


@dataclass(frozen=True, eq=False)
class Layer:
    """A function of the program with the number of its calls; what follows is of one call.

    `kernels` are the ops that read a weight or a state: about what an engine launches once it has fused the rest.
    """

    name: str
    calls: int
    kernels: int
    weights: tuple[Weights, ...]
    experts: tuple[Experts, ...]
    states: tuple[State, ...]
    attention: Curve  # FLOPs of one token that depend on the past ones


@dataclass(frozen=True, eq=False)
class Workload:
    """What a model asks; `heads` are those of its attention, `hidden` the width between layers."""

    name: str
    layers: tuple[Layer, ...]
    hidden: int
    heads: int
    context: int
    expert_layers: tuple[int, ...] = ()  # the numbers of the layers with routed experts, among those that attend

    @cached_property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return sum(n.calls * (sum(w.elements for w in n.weights) + sum(e.count * e.elements for e in n.experts))
                   for n in self.layers)  # fmt: skip

    @cached_property
    def active(self) -> int:
        """Numbers of all weights that one token is multiplied with."""
        return sum(n.calls * (sum(w.elements for w in n.weights if w.flops) + sum(e.chosen * e.elements for e in n.experts))
                   for n in self.layers)  # fmt: skip

    @cached_property
    def blocks(self) -> int:
        """Layers that attend or keep a state."""
        return sum(layer.calls for layer in self.layers if layer.states)

    @cached_property
    def expert_blocks(self) -> int:
        """Layers with routed experts."""
        return sum(layer.calls for layer in self.layers if layer.experts)


def read_workload(module: Module) -> Workload:
    """Return the workload of a program of stage moe; MoecError for another one."""
    if module.stage != "moe":
        raise MoecError(f"a plan reads a program of stage moe, not {module.stage}")
    calls = Counter(function.name for function, _ in walk_calls(module))
    roles = weight_roles(module)
    kept, read = States(module, "reach"), States(module, "reads")
    past = next((d for d in module.dims if d.name == "P"), None)
    layers = tuple(
        _read_layer(function, calls[function.name], roles[function.name], kept, read)
        for function in module.functions if calls[function.name]
    )  # fmt: skip
    heads = [_attention_heads(op) for f in module.functions if calls[f.name] for op in f.ops]
    embedding = next((op for f in module.functions for op in f.ops if op.name == "nn.embedding"), None)
    if embedding is None:
        raise MoecError("the program has no embedding", todo="plan a language model")
    hidden = int(embedding.results[0].type.shape[-1])
    return Workload(
        module.source, layers, hidden, max(heads, default=0), past.high if past else 0, _layers_with_experts(module)
    )


def _layers_with_experts(module: Module) -> tuple[int, ...]:
    """Return the numbers of the layers whose experts a token chooses from; a layer is a call with a cache or state."""
    number, found = -1, []
    for function, _ in walk_calls(module):
        if any(p.type.state and not passed_on(function, p) for p in function.params):
            number += 1
        found += [max(number, 0) for op in function.ops if op.name == "moe.experts"]
    return tuple(found)


def _read_layer(function: Function, calls: int, roles: Any, kept: States, read: States) -> Layer:
    consts = {c.value.name: c for c in function.consts}
    weights: list[Weights] = []
    experts: list[Experts] = []
    moving = sympy.S.Zero
    readers = Counter(v.name for op in function.ops for v in op.inputs if v.name in consts)
    for i, op in enumerate(function.ops):
        flops = op_flops(op)
        held = [consts[v.name] for k in weight_operands(op) if (v := op.operands[k]) is not None and v.name in consts]
        if op.name == "moe.experts":
            experts.append(_read_experts(op, held, _value(flops)))
        elif held and op.name == "nn.embedding" and any(readers[c.value.name] > 1 for c in held):
            continue  # a tied table is stored once, and counts as the head
        elif held:
            role = next(roles.get((i, k), "dense") for k in weight_operands(op) if op.operands[k] is not None)
            elements = sum(int(c.value.type.elements) for c in held)
            weights.append(Weights(role, elements, sum(map(_stored_bytes, held)), _value(flops)))
        elif any(s.name == "P" for s in flops.free_symbols):
            moving += flops
    states = [p for p in function.params if p.type.state and not passed_on(function, p)]
    memory = {*consts, *(p.name for p in states)}
    kernels = sum(any(v.name in memory for v in op.inputs) and not op.callee for op in function.ops)
    return Layer(
        function.name, calls, kernels, tuple(weights), tuple(experts),
        tuple(
            State(
                int(p.type.shape[1]) if len(p.type.shape) == 4 and p.type.shape[1].is_Integer else 1,
                _curve(kept.needed_elements(function, p)), _curve(read.needed_elements(function, p)),
                any(s.name == "P" for s in p.type.elements.free_symbols),
            )
            for p in states
        ),
        _curve(moving),
    )  # fmt: skip


def _read_experts(op: Op, held: list[Const], flops: int) -> Experts:
    up, down, ids = op["up"], op["down"], op["ids"]
    if up is None or down is None or ids is None:
        raise MoecError("moe.experts lacks an operand", model=", ".join(op.loc))
    count, width, inner = (int(n) for n in down.type.shape)
    each = int(up.type.elements + down.type.elements) // count
    return Experts(count, int(ids.type.shape[1]), each, inner, width, sum(map(_stored_bytes, held)), flops)


def _stored_bytes(const: Const) -> int:
    """Return the bytes that a weight has in the checkpoint; of a part of a tensor, its part of the tensor's."""
    tensors = [(t.type, share, len(expand_range(t.name))) for t, share in tensors_with_shares(const.recipe)]
    stored = sum(type.bytes * count for type, _, count in tensors)
    numbers = sum(type.elements * share * count for type, share, count in tensors)
    return int(sympy.ceiling(const.value.type.elements * stored / numbers)) if numbers else 0


def _attention_heads(op: Op) -> int:
    match op.name:
        case "nn.cached_attention":
            return int(str(op.attributes["heads"]))
        case "nn.attention":
            return int(op.operands[0].type.shape[1]) if op.operands[0] else 0
        case "nn.compressed_attention":
            return int(op.operands[0].type.shape[2]) if op.operands[0] else 0
    return 0


def _value(formula: Size) -> int:
    return evaluate(formula, {**ONE, "P": 0})


def _curve(formula: Size) -> Curve:
    """Return a formula as a function of P, for one sequence and one new token."""
    alone = formula.subs({s: ONE[s.name] for s in formula.free_symbols if s.name in ONE})
    others = [s for s in alone.free_symbols if s.name != "P"]
    if others:
        alone = alone.subs(dict.fromkeys(others, 1))
    symbol = next(iter(alone.free_symbols), sympy.Symbol("P"))
    return Curve(sympy.lambdify([symbol], alone, "numpy"))


def read_roles(workload: Workload) -> Iterator[tuple[str, int, int]]:
    """Yield (role, numbers, bytes in the checkpoint) of every kind of layer, all its calls together."""
    for layer in workload.layers:
        for weights in layer.weights:
            yield weights.role, layer.calls * weights.elements, layer.calls * weights.stored
        for experts in layer.experts:
            yield "experts", layer.calls * experts.count * experts.elements, layer.calls * experts.stored
