"""Runs the ops of a program in their order: kernels as their bindings say, other ops by their references in torch.

Numbers between kernels have the dtype of the kernel that made them. A reference is given the dtypes that the program
types; what it gives stays so until a kernel takes it in its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch

from ....compiler.check.interpret import run_op
from ....compiler.errors import MoecError
from ....compiler.ir.dims import evaluate as evaluate_size
from ....compiler.ir.dtypes import DTYPES
from ....compiler.ir.module import Function, Module, Op
from ....compiler.ir.types import TensorType
from ....compiler.ops import OPS
from ..artifact.bindings import DIMS, Bound
from ..tile.expr import Name, evaluate_expr
from ..tile.parse import parse_size
from ..tile.tiles import Argument
from .artifact import Launch, StoredKernels, Weights
from .launchers import Launcher, NotCaptured
from .slots import Held, Slots, tensor_of, with_room

Parts = Mapping[str, torch.Tensor]  # of a packed weight; "" is the whole of a plain one


@dataclass(frozen=True, eq=False)
class Executor:
    """What it takes to run a program: the module, its kernels and weights, and what launches them."""

    module: Module
    kernels: StoredKernels
    weights: Weights
    launcher: Launcher

    def run(self, inputs: Sequence[Held], dims: Mapping[str, int]) -> list[Held]:
        """Run @main on its parameters in their order and return its results; states with room keep it."""
        with torch.no_grad(), torch.device(self.launcher.device):
            return self.after(self.before(frozenset(), inputs, dims), dims)

    def before(self, names: frozenset[str], inputs: Sequence[Held], dims: Mapping[str, int]) -> dict[str, Held]:
        """Return the parameters of @main by name, and the results `names` of ops that have no kernel."""
        main = self.module.main
        values: dict[str, Held] = {p.name: v for p, v in zip(main.params, inputs, strict=True)}
        for op in main.ops:
            if names and op.results[0].name in names:
                values |= self._reference(op, {**self._plain, **values}, dims)
        return values

    @cached_property
    def _plain(self) -> dict[str, Held]:
        """The weights of @main that lie as plain values."""
        weights = self.weights.by_label[self.weights.labels[0]]
        return {name: parts[""] for name, parts in weights.items() if "" in parts}

    def after(self, values: Mapping[str, Held], dims: Mapping[str, int]) -> list[Held]:
        """Run @main from what `before` returned and return its results."""
        return self._function(self.module.main, iter(self.weights.labels), values, dims)

    def _function(
        self, function: Function, labels: Iterator[str], given: Mapping[str, Held], dims: Mapping[str, int]
    ) -> list[Held]:
        weights = self.weights.by_label[next(labels)]
        values = {**given, **{name: parts[""] for name, parts in weights.items() if "" in parts}}
        last_use = {v.name: i for i, op in enumerate(function.ops) for v in op.inputs}
        keep = {v.name for v in function.results}
        steps = self.kernels.steps[function.name]
        for i, (op, step) in enumerate(zip(function.ops, steps, strict=True)):
            if op.callee:
                callee = self.module.by_name[op.callee]
                arguments = {p.name: values[v.name] for p, v in zip(callee.params, op.inputs, strict=True)}
                found: Sequence[Held] = self._function(callee, labels, arguments, dims)
                values |= {v.name: held for v, held in zip(op.results, found, strict=True)}
            elif all(v.name in given for v in op.results):
                pass  # it ran before
            elif "kernels" in step:
                values |= self._kernels(op, step["kernels"], values, weights, dims)
            else:
                values |= self._reference(op, values, dims)
            for value in op.inputs:
                if last_use[value.name] == i and value.name not in keep:
                    values.pop(value.name, None)
        return [values[v.name] for v in function.results]

    def _reference(self, op: Op, values: Mapping[str, Held], dims: Mapping[str, int]) -> dict[str, Held]:
        """Run an op that has no kernel; a view of a value in a format is its codes and scales, whose rows lie alike."""
        if op.name == "core.reshape" and isinstance(coded := values.get(op["x"].name), Mapping):
            return {op.results[0].name: coded}
        operands: list[torch.Tensor | None] = []
        for value in op.operands:
            if value is None:
                operands.append(None)
                continue
            if value.name not in values:
                raise MoecError(f"{op.name} reads {value}, which lies packed for kernels", exit_code=1)
            tensor = tensor_of(values[value.name])
            wanted = DTYPES.get(value.type.dtype)
            operands.append(tensor.to(wanted.torch) if wanted else tensor)
        found = run_op(op, operands, dims)
        return {v.name: tensor for v, tensor in zip(op.results, found, strict=True)}

    def _kernels(
        self, op: Op, group: str, values: Mapping[str, Held], weights: Mapping[str, Parts], dims: Mapping[str, int]
    ) -> dict[str, Held]:
        """Run the kernels of an op. None may be needed for a step of so many tokens: then nothing reads its results."""
        call = _Call(op, values, weights, dims, self.launcher.device)
        for launch in self.kernels.of(group, dims["B"], dims["S"], dims["P"]):
            call.launch(launch, self.launcher)
        return call.made


class _Call:
    """One op as kernels: its operands, and the results and scratch buffers made so far."""

    def __init__(
        self, op: Op, values: Mapping[str, Held], weights: Mapping[str, Parts], dims: Mapping[str, int],
        device: torch.device,
    ) -> None:  # fmt: skip
        signature = OPS[op.name].signature
        self._operands = dict(op.named)
        self._results = {d.name: v for d, v in zip(signature.results, op.results, strict=True)}
        self._op, self._values, self._weights, self._dims, self._device = op, values, weights, dims, device
        self._scratch: dict[str, torch.Tensor] = {}
        self.made: dict[str, Held] = {}

    def launch(self, launch: Launch, launcher: Launcher) -> None:
        """Bind the arguments of a kernel and launch it."""
        arguments = launch.program.arguments
        bound = launch.binding.arguments
        given = {a.name: self._given(a, bound[a.name]) for a in arguments}
        scalars = self._scalars(launch, given)
        shapes = {a.name: [int(evaluate_expr(n, scalars)) for n in a.shape] for a in arguments}
        if any(t is not None and t.numel() != prod(shapes[name]) for name, t in given.items()):
            # caches with room for different numbers of tokens: one scalar cannot say how many there are
            if launcher.captures:
                raise NotCaptured(
                    f"{launch.name} takes caches without their room, which grow with the tokens that are past"
                )
            given |= {a.name: self._given(a, bound[a.name], whole=False) for a in arguments if not bound[a.name].past}
            scalars = self._scalars(launch, given)
            shapes = {a.name: [int(evaluate_expr(n, scalars)) for n in a.shape] for a in arguments}
        tensors: dict[str, torch.Tensor] = {}
        for a in arguments:
            shape = shapes[a.name]
            tensor = given[a.name]
            if tensor is None:
                tensor = torch.empty(shape, dtype=DTYPES[a.dtype].torch, device=self._device)
            tensors[a.name] = tensor.to(DTYPES[a.dtype].torch).contiguous().reshape(shape)
        launcher(launch, tensors, scalars)
        for a in arguments:
            self._keep(bound[a.name], tensors[a.name], a)

    def _given(self, a: Argument, bound: Bound, whole: bool = True) -> torch.Tensor | None:
        """Return the tensor of an argument that is there before the kernel runs; None for one that it makes."""
        if bound.past:
            return self._appended(a, bound).part(bound.part, DTYPES[a.dtype].torch)
        if bound.scratch:
            return self._scratch.get(bound.scratch)
        if bound.result:
            found = self.made.get(self._results[bound.result].name)
            return None if found is None or isinstance(found, Mapping) else tensor_of(found)
        value = self._operands[bound.operand]
        if isinstance(parts := self._values.get(value.name), Mapping):
            return parts[bound.part]
        if value.name not in self._values:
            return self._weights[value.name][bound.part]
        held = self._values[value.name]
        if bound.part and isinstance(held, Slots):
            stored = held.part(bound.part, DTYPES[a.dtype].torch)
            return stored if whole else stored.narrow(held.axis, 0, held.length)
        # a kernel that is told how many slots there are reads the buffer as it lies
        return held.buffer if whole and isinstance(held, Slots) and _has_slots(a, held) else tensor_of(held)

    def _appended(self, a: Argument, bound: Bound) -> Slots:
        """Return the buffer of a state with room for this step, and keep it as the result."""
        past, result = self._operands[bound.past], self._results[bound.result]
        if bound.part and isinstance(made := self.made.get(result.name), Slots):
            return made
        axis = next(i for i, (n, m) in enumerate(zip(past.type.shape, result.type.shape, strict=True)) if n != m)
        length = _sizes_of_type(result.type, tuple(sorted(self._dims.items())))[axis]
        slots = with_room(self._values[past.name], axis, length, DTYPES[a.dtype].torch)
        self.made[result.name] = slots
        return slots

    def _scalars(self, launch: Launch, given: Mapping[str, torch.Tensor | None]) -> dict[str, int]:
        found = {name: self._dims[name] for name in launch.program.scalars if name in DIMS}
        for name, (argument, over) in launch.binding.scalars.items():
            tensor = given[argument]
            count = tensor.numel() if tensor is not None else self._elements(launch.binding.arguments[argument])
            found[name] = count // int(evaluate_expr(parse_size(over, tuple(found)), found))
        return found

    def _elements(self, bound: Bound) -> int:
        sizes = _sizes_of_type(self._results[bound.result].type, tuple(sorted(self._dims.items())))
        return int(torch.Size(sizes).numel())

    def _keep(self, bound: Bound, tensor: torch.Tensor, a: Argument) -> None:
        if bound.scratch:
            self._scratch[bound.scratch] = tensor
        elif bound.result and bound.part and not bound.past:
            value = self._results[bound.result]
            before = self.made.get(value.name)
            self.made[value.name] = {**(before if isinstance(before, Mapping) else {}), bound.part: tensor}
        elif bound.result and not bound.past and a.role == "output":
            value = self._results[bound.result]
            self.made[value.name] = tensor.reshape(_sizes_of_type(value.type, tuple(sorted(self._dims.items()))))


def _has_slots(a: Argument, held: Slots) -> bool:
    """Return whether an argument's axis for the slots is a scalar, which says how many there are in the buffer."""
    size = a.shape[held.axis] if len(a.shape) == held.buffer.dim() else 0
    return isinstance(size, Name) and size.name not in DIMS


@lru_cache(maxsize=4096)
def _sizes_of_type(type: TensorType, dims: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    """Return the sizes of a type with the dims of a step."""
    return tuple(evaluate_size(n, dict(dims)) for n in type.shape)
