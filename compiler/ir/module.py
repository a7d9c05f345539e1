"""The IR: immutable, typed, straight-line SSA.

A `Module` holds dims and functions; the last function is `@main`. A `Function` holds the weights it reads
(`Const`, each with a recipe) and its ops in order. A layer that repeats is one function with one call a layer;
each call binds the attributes (usually `layer`) that stand in braces in the function's weight names.
Nothing here is ever changed in place: a pass returns a new module, and "unchanged" means the same object.
"""

from __future__ import annotations

import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy

from .dims import Size, size, size_text
from .storage import find_format

if TYPE_CHECKING:
    from .recipes import Recipe

STAGES = ("graph", "moe", "kernel")

# bits of one element; quantized storage is a dtype too, see formats
DTYPE_BITS = {
    "bool": 8, "u8": 8, "i8": 8, "i16": 16, "i32": 32, "i64": 64,
    "f8e4m3": 8, "f8e5m2": 8, "f8e8m0": 8, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
}  # fmt: skip


def is_dtype(name: str) -> bool:
    """Return whether a name is that of a dtype, plain or quantized."""
    return name in DTYPE_BITS or find_format(name) is not None


Attr: TypeAlias = int | float | bool | str | Size | tuple["Attr", ...]


def attr_key(value: Attr) -> Any:
    """Return what tells attributes apart in a program: 0.0 and -0.0, 1 and 1.0 and true, and NaNs bit by bit.

    Python has the first three equal in pairs, and a NaN equal to nothing.
    """
    match value:
        case bool() | float():  # as bytes, which no attribute is
            return struct.pack("?" if isinstance(value, bool) else ">d", value)
        case tuple():
            return tuple(map(attr_key, value))
    return value


class Keyed(ABC):
    """Something whose equality and hash are those of its key."""

    @property
    @abstractmethod
    def key(self) -> Any:
        """What it is equal by; best a cached property."""

    def __eq__(self, other: object) -> bool:
        """Return whether the other one is of the same class and has the same key."""
        return self is other or (type(self) is type(other) and self.key == other.key)

    def __hash__(self) -> int:
        """Return the hash of the key."""
        return hash(self.key)


@dataclass(frozen=True)
class TensorType:
    """`dtype[sizes]`; `state` marks a KV cache or another tensor that lives from one step to the next."""

    dtype: str
    shape: tuple[Size, ...]
    state: bool = False

    @staticmethod
    def of(dtype: str, *shape: int | Size, state: bool = False) -> TensorType:
        """Return a type from ints and expressions."""
        return TensorType(dtype, tuple(size(s) for s in shape), state)

    def __str__(self) -> str:
        prefix = "state " if self.state else ""
        return f"{prefix}{self.dtype}[{', '.join(size_text(s) for s in self.shape)}]"

    @cached_property
    def elements(self) -> Size:
        """The number of elements."""
        return sympy.Mul(*self.shape)

    @property
    def bits(self) -> int | Fraction:
        """Bits of one element as stored; of a quantized one with its share of scales and zero points."""
        found = find_format(self.dtype)
        return found.bits_per_weight if found else DTYPE_BITS[self.dtype]

    @property
    def bytes(self) -> Size:
        """Bytes of the whole tensor as stored."""
        return self.elements * self.bits / 8

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape as ints; only for types without dims (weights)."""
        return tuple(int(s) for s in self.shape)

    @property
    def plain(self) -> TensorType:
        """The same type without the state mark."""
        return replace(self, state=False) if self.state else self


@dataclass(frozen=True)
class Value:
    """A name (without the %) and its type. Names are unique within a function."""

    name: str
    type: TensorType

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Const:
    """A weight that a function reads: its value and how it is made."""

    value: Value
    recipe: Recipe


@dataclass(frozen=True, eq=False)
class Op(Keyed):
    """One statement. An absent optional operand is None. A call has the name `call` and a callee."""

    name: str
    operands: tuple[Value | None, ...]
    results: tuple[Value, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()  # sorted by name
    callee: str = ""
    loc: tuple[str, ...] = ()

    @cached_property
    def key(self) -> Any:
        """All but where it comes from."""
        return self.name, self.operands, self.results, attr_key(self.attrs), self.callee

    @cached_property
    def attributes(self) -> dict[str, Attr]:
        """The attributes by name."""
        return dict(self.attrs)

    @property
    def operand_types(self) -> tuple[TensorType | None, ...]:
        """The types of the operands, None for an absent one."""
        return tuple(None if v is None else v.type for v in self.operands)

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The operands that are there."""
        return tuple(v for v in self.operands if v is not None)


@dataclass(frozen=True)
class Function:
    """Parameters, weights, ops and results. `weights` is the prefix of every relative weight name."""

    name: str
    params: tuple[Value, ...]
    consts: tuple[Const, ...]
    ops: tuple[Op, ...]
    results: tuple[Value, ...]
    weights: str = ""

    @cached_property
    def types(self) -> tuple[TensorType, ...]:
        """The types of the results."""
        return tuple(v.type for v in self.results)

    @cached_property
    def uses(self) -> dict[str, list[Op | None]]:
        """For each value name the ops that read it; None stands for the function's return."""
        found: dict[str, list[Op | None]] = {}
        for op in self.ops:
            for value in op.inputs:
                found.setdefault(value.name, []).append(op)
        for value in self.results:
            found.setdefault(value.name, []).append(None)
        return found

    @cached_property
    def producers(self) -> dict[str, Op]:
        """For each value name the op that makes it (parameters and weights have none)."""
        return {value.name: op for op in self.ops for value in op.results}

    @cached_property
    def names(self) -> frozenset[str]:
        """Every value name that is taken in this function."""
        return frozenset([v.name for v in self.params] + [c.value.name for c in self.consts] + list(self.producers))


@dataclass(frozen=True)
class Dim:
    """A named size and its inclusive range."""

    name: str
    low: int
    high: int


@dataclass(frozen=True)
class Module:
    """A program at a stage. `source` names the checkpoint folder that the weights come from, as the user gave it."""

    stage: str
    dims: tuple[Dim, ...]
    functions: tuple[Function, ...]
    source: str = ""

    @cached_property
    def by_name(self) -> dict[str, Function]:
        """The functions by name."""
        return {f.name: f for f in self.functions}

    @property
    def main(self) -> Function:
        """The program's entry."""
        return self.by_name["main"]

    def with_functions(self, changed: Mapping[str, Function]) -> Module:
        """Return the module with some functions replaced; the module itself if none differs."""
        functions = tuple(changed.get(f.name, f) for f in self.functions)
        if all(a is b for a, b in zip(functions, self.functions, strict=True)):
            return self
        return replace(self, functions=functions)

    def calls(self, function: str) -> list[tuple[Function, Op]]:
        """Return every call of a function, with its caller, in order."""
        return [(f, op) for f in self.functions for op in f.ops if op.callee == function]


def make_attrs(attributes: Mapping[str, Attr]) -> tuple[tuple[str, Attr], ...]:
    """Return attributes in canonical form: sorted, sequences as tuples, integer expressions as ints."""
    return tuple(sorted((name, _canonical(value)) for name, value in attributes.items()))


def _canonical(value: Attr | list) -> Attr:
    if isinstance(value, (list, tuple)):
        return tuple(_canonical(v) for v in value)
    if isinstance(value, sympy.Expr):
        expanded = sympy.expand(value)
        return int(expanded) if expanded.is_Integer else expanded
    return value


_HOLE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand_range(name: str) -> list[str]:
    """Return the names that `a.{0..3}.b` stands for; a name without a range stands for itself."""
    return [range_at(name, i) for i in range(range_size(name))]


def range_size(name: str) -> int:
    """Return how many names a name with a range stands for (1 without one)."""
    found = _HOLE.search(name)
    return max(0, int(found[2]) - int(found[1]) + 1) if found else 1


def range_at(name: str, index: int) -> str:
    """Return one of the names that a name with a range stands for; itself without one."""
    found = _HOLE.search(name)
    return f"{name[: found.start()]}{int(found[1]) + index}{name[found.end() :]}" if found else name


def bindings(op: Op) -> dict[str, str]:
    """Return what a call binds in the weight names of its callee, e.g. {"layer": "3"}."""
    return {name: str(value) for name, value in op.attrs}


def walk_calls(module: Module) -> Iterator[tuple[Function, dict[str, str]]]:
    """Yield every function once for each time the program runs it, with the bindings of that call, in order."""

    def visit(function: Function, bound: dict[str, str]) -> Iterator[tuple[Function, dict[str, str]]]:
        yield function, bound
        for op in function.ops:
            if op.callee:
                yield from visit(module.by_name[op.callee], {**bound, **bindings(op)})

    yield from visit(module.main, {})
