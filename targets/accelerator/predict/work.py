"""What each op of a program moves and computes, as formulas in B, S and P: the amounts of a roofline.

All of it follows from how an op is declared (OpDef: flops, rows, reads, appends, view) and from its types; nothing here
knows an op by name. Weights count as stored: in the format that they are typed in, else as the checkpoint has them.
Activations and states count in bf16 where the program types f32, which is what kernels hand to each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import sympy

from ....compiler.cost.count import op_flops, tensors_with_shares
from ....compiler.formats.table import find_format
from ....compiler.ir.dims import Size, dim, evaluate, size
from ....compiler.ir.module import Const, Function, Module, Op, Value
from ....compiler.ir.types import TensorType, expand_range
from ....compiler.ops import OPS, OpDef
from ....compiler.ops.stored_states import rounded_values, stored_states
from .experts_touched import distinct_experts

MATRIX = "bf16"  # what the matrix unit multiplies: kernels widen weights of fewer bits to it
VECTOR = "f32"
KINDS = ("weights", "activations", "states")  # what bytes are
BETWEEN = {"f32": 16, "f64": 16}  # bits of a number between kernels where those are not the program's
LONG = 4096  # new tokens of a step at which an op shows what it is
PRODUCT = 12  # FLOPs for each number moved, at that length, from which the matrix unit computes an op


@dataclass(frozen=True)
class Work:
    """The amounts that one call of an op moves and computes. Bytes are from or to device memory, formulas in B, S and P."""

    function: str
    place: str  # its function and first result, as kernels.json names it
    op: str
    calls: int  # how often the program runs it in a step
    weights: Size
    activations: Size
    states: Size
    flops: Size
    unit: str  # MATRIX or VECTOR: what computes it

    @property
    def bytes(self) -> Size:
        """All bytes."""
        return self.weights + self.activations + self.states


@dataclass(frozen=True)
class Amounts:
    """The numbers of a Work at a step."""

    weights: float
    activations: float
    states: float
    flops: float


@dataclass(frozen=True)
class WorkTable:
    """The works of ops of a module, to be put in numbers for a step."""

    module: Module
    works: tuple[Work, ...]

    @property
    def bytes(self) -> dict[str, Size]:
        """The bytes of a step as formulas in B, S and P, by what they are: weights, activations, states."""
        return {name: sympy.Add(*(getattr(w, name) * w.calls for w in self.works)) for name in KINDS}

    @property
    def flops(self) -> dict[str, Size]:
        """The FLOPs of a step as formulas, by what computes them."""
        return {u: sympy.Add(*(w.flops * w.calls for w in self.works if w.unit == u)) for u in (MATRIX, VECTOR)}

    @cached_property
    def _numbers(self) -> Callable[..., list[float]]:
        """All formulas as one function of the dims; equal ones are computed once."""
        symbols = [dim(d.name) for d in self.module.dims]
        formulas = [getattr(w, name) for w in self.works for name in (*KINDS, "flops")]
        different = list(dict.fromkeys(formulas))
        place = {formula: i for i, formula in enumerate(different)}
        compute = sympy.lambdify(symbols, different, modules=["math"])
        order = [place[formula] for formula in formulas]

        def numbers(*values: int) -> list[float]:
            found = compute(*values)
            return [float(found[i]) for i in order]

        return numbers

    def at(self, batch: int, new: int, past: int) -> list[Amounts]:
        """Return each work in numbers at a step; dims other than B, S and P are at their least."""
        values = {d.name: max(1, d.low) for d in self.module.dims} | {"B": batch, "S": new, "P": past}
        numbers = self._numbers(*(values[d.name] for d in self.module.dims))
        each = len(KINDS) + 1
        return [Amounts(*numbers[i * each : (i + 1) * each]) for i in range(len(self.works))]


def module_work(module: Module, devices: int = 1) -> list[Work]:
    """Return the work of every op that moves or computes anything, functions in order, each op once.

    Of the experts each of `devices` devices holds a part, which sees the tokens of all; of the rest each has everything and
    its own sequences. MoecError for an op that is not declared.
    """
    calls = call_counts(module)
    lowest = {d.name: max(1, d.low) for d in module.dims} | {"B": 1, "S": 1, "P": 0}
    found = []
    for function in module.functions:
        reader = _Reader(function, lowest, devices)
        found += [work for op in function.ops if (work := reader.work(op, calls[function.name]))]
    return [work for work in found if work.calls]


def place_of(function: Function, op: Op) -> str:
    """Return the name of an op in a module: its function and first result."""
    return f"@{function.name}/%{op.results[0].name}"


def call_counts(module: Module) -> Counter[str]:
    """Return how often a step runs each function."""
    counts = Counter({module.main.name: 1})
    for function in reversed(module.functions):  # a callee is before its callers
        for op in function.ops:
            if op.callee:
                counts[op.callee] += counts[function.name]
    return counts


def weight_bytes(module: Module, devices: int = 1) -> int:
    """Return the bytes of all weights that one device holds."""
    calls, total = call_counts(module), sympy.S.Zero
    for function in module.functions:
        roots = _roots_of_views(function)
        parted = {roots.get(v.name, v).name for op in function.ops for v in op.inputs if _is_parted(op, v)}
        for const in function.consts:
            each = stored_bits(const) * const.value.type.elements / 8
            total += each * calls[function.name] / (devices if const.value.name in parted else 1)
    return int(sympy.ceiling(total))


def state_bytes(module: Module) -> Size:
    """Return the bytes of the states that a step starts from, a formula."""
    kept = stored_states(module)
    return sympy.Add(
        *(
            p.type.elements * row_bits(p.type) / 8
            if (module.main.name, p.name) in kept
            else _bytes_of(p.type, p.type.elements)
            for p in module.main.params
            if p.type.state
        )
    )


def row_bits(type: TensorType) -> Size:
    """Return the bits of a number of a cache in 8 bits, with the scale of its row."""
    return 8 + size(32) / type.shape[-1]


@lru_cache(maxsize=4096)
def stored_bits(const: Const) -> sympy.Rational:
    """Return the bits of one number of a weight as it is stored, scales included."""
    type = const.value.type
    typed = sympy.Rational(type.bits)
    if find_format(type.dtype):
        return typed
    held = sum(
        (len(expand_range(t.name)) * t.type.bytes * 8 for t, _ in tensors_with_shares(const.recipe)), sympy.S.Zero
    )
    return min(typed, held / type.elements) if held else typed


def _is_parted(op: Op, value: Value) -> bool:
    """Return whether devices hold parts of a weight: an op computes with chosen slices of it (routed experts)."""
    definition = OPS.get(op.name)
    if definition is None or definition.custom_flops == 0:
        return False
    return any(operand == value and name in definition.rows for name, operand in op.named)


def _roots_of_views(function: Function) -> dict[str, Value]:
    """Return for each view by its name what it shows, which is no view."""
    roots: dict[str, Value] = {}
    for op in function.ops:
        if op.name in OPS and OPS[op.name].view:
            (source,), (result,) = op.inputs, op.results
            roots[result.name] = roots.get(source.name, source)
    return roots


class _Reader:
    """Reads the work of one function's ops."""

    def __init__(self, function: Function, lowest: Mapping[str, int], devices: int) -> None:
        self.function, self.lowest, self.devices = function, lowest, devices
        self.weights = {c.value.name: stored_bits(c) for c in function.consts}  # name -> bits of one number
        self.roots = _roots_of_views(function)

    def work(self, op: Op, calls: int) -> Work | None:
        """Return what an op moves and computes; None for a call, and for what takes no kernel in a step."""
        if op.callee:
            return None
        flops = op_flops(op)  # of an op that is not declared it raises
        definition = OPS[op.name]
        if definition.view:
            return None
        if not op.inputs and not any(v.type.elements.free_symbols for v in op.results):
            return None  # the same in every step: made once
        weights, activations, states = self._operands(op, definition)
        appended = [v.type for name, v in op.named if v.type.state and name in definition.appends]
        rounded = rounded_values(op)
        for result in op.results:
            if result.type.state:
                written = _written_elements(result.type, appended)
                states += written * row_bits(result.type) / 8 if result in rounded else _bytes_of(result.type, written)
            else:
                activations += _bytes_of(result.type, result.type.elements)
        unit = self._unit(op, flops)
        place = place_of(self.function, op)
        return Work(self.function.name, place, op.name, calls, weights, activations, states, flops, unit)

    def _operands(self, op: Op, definition: OpDef) -> tuple[Size, Size, Size]:
        """Return the bytes of weights, activations and states that an op reads."""
        read: dict[Value, list[Size]] = {}
        for name, value in op.named:
            root = self.roots.get(value.name, value)
            read.setdefault(root, []).append(self._read(op, definition, name, value, root))
        weights = activations = states = sympy.S.Zero
        for root, amounts in read.items():
            moved = sympy.Add(*amounts)
            if len(amounts) > 1 or root not in op.inputs:  # parts of one tensor, or one that is read again and again
                moved = sympy.Min(moved, self._sized(root, root, root.type.elements))
            if root.name in self.weights:
                weights += moved
            elif root.type.state:
                states += moved
            else:
                activations += moved
        return weights, activations, states

    def _read(self, op: Op, definition: OpDef, name: str, value: Value, root: Value) -> Size:
        """Return the bytes of an operand that one run reads."""
        types, attributes = list(op.operand_types), op.settings
        elements = value.type.elements
        if name in definition.reads:
            elements = size(definition.reads[name](types, attributes))
        elif name in definition.rows:
            rows = size(definition.rows[name](types, attributes))
            parted = root.name in self.weights and _is_parted(op, value)
            elements = elements / value.type.shape[0] * self._touched(rows, value.type.shape[0], parted)
        if value in rounded_values(op):
            return elements * row_bits(value.type) / 8
        return self._sized(value, root, elements)

    def _sized(self, value: Value, root: Value, elements: Size) -> Size:
        """Return the bytes of numbers of a value, which are those of its root: of a weight as stored."""
        bits = self.weights.get(root.name)
        return _bytes_of(value.type, elements) if bits is None else elements * bits / 8

    def _touched(self, rows: Size, slices: Size, parted: bool) -> Size:
        """Return the expected number of slices that a step reads on one device, of `rows` choices among `slices`."""
        if slices.free_symbols:
            return sympy.Min(rows, slices)
        all_slices, chosen = int(slices), evaluate(rows, self.lowest)
        devices = self.devices if parted else 1
        if chosen >= all_slices:
            return slices / devices
        return distinct_experts(all_slices, chosen, rows / chosen * devices) / devices

    def _unit(self, op: Op, flops: Size) -> str:
        """Return what computes an op: a product of matrices has many FLOPs for each number, when there are many."""
        values = dict.fromkeys((*op.inputs, *op.results))
        at = {**self.lowest, "S": LONG}
        moved = sum(evaluate(v.type.elements, at) for v in values)
        return MATRIX if evaluate(flops, at) >= PRODUCT * moved else VECTOR


def _bytes_of(type: TensorType, elements: Size) -> Size:
    bits = BETWEEN.get(type.dtype) or type.bits
    return elements * sympy.Rational(bits, 8)


def _written_elements(type: TensorType, appended: list[TensorType]) -> Size:
    """Return how many numbers of a state are written: what is new, of one that grew where it lies."""
    for before in appended:
        same = [a == b for a, b in zip(before.shape, type.shape, strict=False)]
        if len(before.shape) == len(type.shape) and sum(same) >= len(same) - 1:
            appended.remove(before)
            return sympy.expand(type.elements - before.elements)
    return type.elements
