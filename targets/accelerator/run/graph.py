"""Captures a step of one token as a CUDA graph, so that the host launches one thing a step and not hundreds.

A captured kernel keeps its arguments. Caches lie where they are and have room, so that from one step to the next only the
dim P changes: before a graph is replayed, P is set in each launch that is told it. Ops of @main that make what grows with P
out of the inputs (a mask) run before the graph, into buffers with room. A program in which something else grows with P is
not captured, and said not to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ....compiler.ir.dims import dim, evaluate
from ....compiler.ir.module import Function, Module, Op
from ....compiler.ir.types import TensorType
from ..tile.expr import Expr
from ..tile.tiles import Argument
from .artifact import Launch, StoredKernels
from .driver import driver_of_torch
from .executor import Executor
from .launchers import CapturedLaunch, Compiled, NotCaptured, Tensors
from .slots import Held, Slots, tensor_of, with_room

PAST, NEW = dim("P"), dim("S")


# --- what is captured ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)
def grows_with_past(type: TensorType) -> bool:
    """Return whether a tensor has more elements the more tokens are past."""
    return PAST in type.elements.free_symbols


def results_before(module: Module, kernels: StoredKernels) -> frozenset[str]:
    """Return the results of the ops of @main that run before a captured step; NotCaptured where that does not suffice."""
    found: set[str] = set()
    for function in module.functions:
        for op, step in zip(function.ops, kernels.steps[function.name], strict=True):
            growing = [
                v
                for v in op.results
                if grows_with_past(v.type) and not (v.type.state and (op.callee or "kernels" in step))
            ]
            if growing and (function is not module.main or op.callee or "kernels" in step):
                raise NotCaptured(
                    f"{op.name or op.callee} makes {growing[0]}, which grows with the tokens that are past"
                )
            if growing:
                found |= _with_operands(op, function, kernels, found)
    if not any(grows_with_past(value.type) for value in module.main.results[1:]):
        raise NotCaptured("no state of the program is a cache with room")
    for value in module.main.results[1:]:
        axes = [n for n in value.type.shape if PAST in n.free_symbols]
        if any(n != PAST + NEW for n in axes):
            raise NotCaptured(f"{value} does not grow by one with each token")
    return frozenset(found)


def _with_operands(op: Op, main: Function, kernels: StoredKernels, found: set[str]) -> set[str]:
    """Return the results of an op of @main and of those that it needs, all of which run without a kernel and a state."""
    makers = {v.name: (i, other) for i, other in enumerate(main.ops) for v in other.results}
    names: set[str] = set()
    todo = [op]
    while todo:
        one = todo.pop()
        names |= {v.name for v in one.results}
        for value in one.inputs:
            number, maker = makers.get(value.name, (0, None))
            if value.type.state or (maker and (maker.callee or "kernels" in kernels.steps[main.name][number])):
                raise NotCaptured(f"{op.name} makes {op.results[0]}, which grows, from what kernels make")
            if maker and value.name not in found | names:
                todo.append(maker)
    return names


# --- one graph -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Capturing:
    """A launcher that captures; `growing` are the addresses of buffers that have room for what grows with P."""

    compiled: Compiled
    growing: frozenset[int]
    calls: list[CapturedLaunch]
    device: torch.device
    runs: str = ""
    slow: bool = False
    captures: bool = True

    def __call__(self, launch: Launch, tensors: Tensors, scalars: Mapping[str, int]) -> None:
        for a in launch.program.arguments:
            if _asks_past(a) and tensors[a.name].data_ptr() not in self.growing:
                raise NotCaptured(f"{launch.name} has a copy of {a.name}, which grows with the tokens that are past")
        for name, (argument, _) in launch.binding.scalars.items():
            if tensors[argument].data_ptr() in self.growing:
                raise NotCaptured(f"{launch.name} has {name}, which grows with the tokens that are past")
        call = self.compiled.capture(launch, tensors, scalars)
        if call and "P" in scalars:
            self.calls.append(call)


def _asks_past(a: Argument) -> bool:
    return any(isinstance(n, Expr) and "P" in n.names for n in a.shape)


class Graph:
    """A captured step: of so many rows, on the buffers of `inputs`."""

    def __init__(
        self, executor: Executor, before: frozenset[str], inputs: Sequence[Held], dims: Mapping[str, int]
    ) -> None:
        """Capture a step; it has run when `replay` was called. NotCaptured or RuntimeError where that cannot be."""
        self._executor, self._before = executor, before
        main = executor.module.main
        room = {**dims, "P": min(held.buffer.shape[held.axis] for held in inputs if isinstance(held, Slots))}
        self._buffers: dict[str, torch.Tensor] = {}
        values = executor.before(before, inputs, dims)
        for value in (*main.params, *(v for op in main.ops for v in op.results if v.name in before)):
            held = values[value.name]
            if not isinstance(held, Slots):
                tensor = tensor_of(held)
                most = int(evaluate(value.type.elements, room)) if grows_with_past(value.type) else tensor.numel()
                self._buffers[value.name] = torch.empty(most, dtype=tensor.dtype, device=tensor.device)
        given = self._filled(values)
        growing = {
            self._buffers[n].data_ptr() for n, held in values.items() if n in self._buffers and self._is_growing(n)
        }
        self._calls: list[CapturedLaunch] = []
        compiled = executor.launcher
        assert isinstance(compiled, Compiled)
        capturing = _Capturing(compiled, frozenset(growing), self._calls, compiled.device)
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self._graph):
            self._results = replace(executor, launcher=capturing).after(given, dims)
        self._graph.instantiate()
        places = {
            held.buffer.data_ptr(): p.name
            for p, held in zip(main.params, inputs, strict=True)
            if isinstance(held, Slots)
        }
        self._appended = {i: places[r.buffer.data_ptr()] for i, r in enumerate(self._results) if isinstance(r, Slots)}
        self._captured_at = dims["P"]

    def _is_growing(self, name: str) -> bool:
        main = self._executor.module.main
        values = (*main.params, *(v for op in main.ops for v in op.results))
        return any(v.name == name and grows_with_past(v.type) for v in values)

    def _filled(self, values: Mapping[str, Held]) -> dict[str, Held]:
        """Return the values of a step, those that are not in caches copied to where the graph reads them."""
        found: dict[str, Held] = {}
        for name, held in values.items():
            buffer = self._buffers.get(name)
            if buffer is None:
                found[name] = held
                continue
            tensor = tensor_of(held)
            place = buffer[: tensor.numel()].view(tensor.shape)
            found[name] = place.copy_(tensor)
        return found

    def replay(self, inputs: Sequence[Held], dims: Mapping[str, int]) -> list[Held]:
        """Run the step on other tokens, after other ones, in the same caches."""
        values = self._executor.before(self._before, inputs, dims)
        self._filled(values)
        if dims["P"] != self._captured_at:
            for call in self._calls:
                call.update(self._graph.raw_cuda_graph_exec(), dims)
        self._graph.replay()
        main = self._executor.module.main
        found: list[Held] = []
        for i, (result, value) in enumerate(zip(self._results, main.results, strict=True)):
            if isinstance(result, Slots):
                past = values[self._appended[i]]
                length = int(evaluate(value.type.shape[result.axis], dims))
                fresh = dims["P"] == self._captured_at
                found.append(result if fresh else with_room(past, result.axis, length, result.buffer.dtype))
            else:  # the next step writes here again
                found.append(tensor_of(result).clone() if value.type.state else result)
        self._captured_at = -1
        return found


@dataclass(eq=False)
class Graphs:
    """Runs steps, those of one token as a graph where the program and the GPU allow it.

    The first step on new caches loads the kernels, the second one is captured, later ones are replayed.
    """

    executor: Executor
    why_not: str = ""

    def __post_init__(self) -> None:
        self._seen: tuple[int, ...] | None = None
        self._made: tuple[tuple[int, ...], Graph] | None = None
        try:
            if not driver_of_torch().update:
                raise NotCaptured(f"{driver_of_torch().name} is not asked to change what a graph runs with")
            self._before = results_before(self.executor.module, self.executor.kernels)
        except NotCaptured as error:
            self.why_not = str(error)

    @property
    def runs(self) -> str:
        """What runs, in words."""
        how = f"launch by launch, since {self.why_not}" if self.why_not else "as a CUDA graph"
        return f"{self.executor.launcher.runs}; steps of one token {how}"

    def run(self, inputs: Sequence[Held], dims: Mapping[str, int]) -> list[Held]:
        """Run a step, as `Executor.run` does."""
        key = None if self.why_not or dims["S"] != 1 or not dims["P"] else self._key(inputs, dims)
        if key is None:
            return self.executor.run(inputs, dims)
        if self._made and self._made[0] == key:
            return self._replay(inputs, dims)
        if self._seen != key:
            self._seen, self._made = key, None
            return self.executor.run(inputs, dims)
        try:
            with torch.no_grad(), torch.device(self.executor.launcher.device):
                self._made = (key, Graph(self.executor, self._before, inputs, dims))
        except (NotCaptured, RuntimeError) as error:
            self.why_not, self._made = str(error).splitlines()[0], None
            return self.executor.run(inputs, dims)
        return self._replay(inputs, dims)

    def _key(self, inputs: Sequence[Held], dims: Mapping[str, int]) -> tuple[int, ...] | None:
        """Return which buffers a step appends to, and which kernels it takes; None for a step that is not captured."""
        buffers = _buffers_key(inputs, dims)
        passed = sum(dims["P"] + dims["S"] >= least for least in self.executor.kernels.slots_at)
        return None if buffers is None else (passed, *buffers)

    def _replay(self, inputs: Sequence[Held], dims: Mapping[str, int]) -> list[Held]:
        assert self._made is not None
        with torch.no_grad(), torch.device(self.executor.launcher.device):
            return self._made[1].replay(inputs, dims)


def _buffers_key(inputs: Sequence[Held], dims: Mapping[str, int]) -> tuple[int, ...] | None:
    """Return which buffers a step appends to; None where one has no room or holds newer tokens."""
    caches = [held for held in inputs if isinstance(held, Slots)]
    if not caches or not all(held.has_room(1) for held in caches):
        return None
    return (dims["B"], *(held.buffer.data_ptr() for held in caches))
