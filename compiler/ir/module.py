"""The IR: immutable, typed, straight-line SSA.

A `Module` holds dims and functions; the last function is `@main`. A `Function` holds the weights it reads
(`Const`, each with a recipe) and its ops in order. A layer that repeats is one function with one call a layer;
each call binds the attributes (usually `layer`) in braces in the function's weight names.
Nothing here is ever changed in place: a pass returns a new module, and "unchanged" means the same object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import MoecError
from .declared import DECLARED
from .deferred import DeferredFunction
from .types import Attr, Attrs, Keyed, TensorType, attr_key, make_attrs

if TYPE_CHECKING:
    from .recipes import Recipe


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
    def attributes(self) -> Attrs:
        """The attributes by name."""
        return Attrs(self.attrs)

    @cached_property
    def settings(self) -> Attrs:
        """The attributes by name, with the declared defaults of those that are left out."""
        return Attrs(DECLARED[self.name].complete(self.attributes))

    @property
    def operand_types(self) -> tuple[TensorType | None, ...]:
        """The types of the operands, None for an absent one."""
        return tuple(None if v is None else v.type for v in self.operands)

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The operands that are there."""
        return tuple(v for v in self.operands if v is not None)

    def get(self, name: str) -> Value | None:
        """Return the operand that the op's declaration names; None if it is absent."""
        return self.operands[DECLARED[self.name].places[name]]

    def __getitem__(self, name: str | int) -> Value:
        """Return the operand that the op's declaration names, or the one at a place; MoecError if it is absent."""
        value = self.operands[name] if isinstance(name, int) else self.get(name)
        if value is None:
            raise MoecError(f"{self.name} has no operand {name}", model=", ".join(self.loc))
        return value

    @property
    def named(self) -> list[tuple[str, Value]]:
        """The operands that are there, each with its name."""
        return [(DECLARED[self.name].operand_name(k), v) for k, v in enumerate(self.operands) if v is not None]

    def reading(self, **operands: Value | None) -> Op:
        """Return the op with other operands at some names."""
        places = {DECLARED[self.name].places[name]: value for name, value in operands.items()}
        return replace(self, operands=tuple(places.get(k, v) for k, v in enumerate(self.operands)))

    def become(self, name: str, *operands: Value | None, **attributes: Attr) -> Op:
        """Return another op with the results of this one, and its place in the source model."""
        return Op(name, operands, self.results, make_attrs(attributes), loc=self.loc)


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

    def renamed(self, names: Mapping[str, str]) -> Function:
        """Return the function with other names for its weights and for what its ops make; itself without any."""
        if not names:
            return self

        def named(value: Value) -> Value:
            return replace(value, name=names[value.name]) if value.name in names else value

        consts = tuple(replace(c, value=named(c.value)) for c in self.consts)
        ops = tuple(
            replace(op, operands=tuple(v and named(v) for v in op.operands), results=tuple(map(named, op.results)))
            for op in self.ops
        )
        return replace(self, consts=consts, ops=ops)


@dataclass(frozen=True)
class Dim:
    """A named size and its inclusive range."""

    name: str
    low: int
    high: int


_PRINT = DeferredFunction(f"{__name__.removesuffix('.ir.module')}.text.printer", "print_module")


@dataclass(frozen=True, repr=False)
class Module:
    """A program at a stage. `source` names the checkpoint folder that the weights come from, as the user gave it."""

    stage: str
    dims: tuple[Dim, ...]
    functions: tuple[Function, ...]
    source: str = ""

    def __repr__(self) -> str:
        """Say in one line what is in it."""
        ops = sum(len(f.ops) for f in self.functions)
        origin = f" of {self.source}" if self.source else ""
        return f"<Module{origin}, stage {self.stage}: {len(self.functions)} functions, {ops} ops>"

    def __str__(self) -> str:
        """Return the program as text, which `moec.parse` reads."""
        return str(_PRINT(self))

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


def call_bindings(op: Op) -> dict[str, str]:
    """Return what a call binds in the weight names of its callee, e.g. {"layer": "3"}."""
    return {name: str(value) for name, value in op.attrs}


def walk_calls(module: Module) -> Iterator[tuple[Function, dict[str, str]]]:
    """Yield every function once for each time the program runs it, with the bindings of that call, in order."""

    def visit(function: Function, bound: dict[str, str]) -> Iterator[tuple[Function, dict[str, str]]]:
        yield function, bound
        for op in function.ops:
            if op.callee:
                yield from visit(module.by_name[op.callee], {**bound, **call_bindings(op)})

    yield from visit(module.main, {})
