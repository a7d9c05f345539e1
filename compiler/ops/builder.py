"""Makes ops and weights: the declarations of ops give result types, and names are free ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ..errors import MoecError
from ..ir.module import Const, Function, Op, Value
from ..ir.names import Names
from ..ir.recipes import Recipe
from ..ir.types import Attr, TensorType, make_attrs
from .define import OPS


class IRBuilder:
    """A function while it is written. Ops go behind those so far, and come from `loc` in the source model."""

    def __init__(
        self, name: str, params: Iterable[Value] = (), consts: Iterable[Const] = (), names: Names | None = None
    ) -> None:
        """Start without ops."""
        self.name = name
        self.params = list(params)
        self.consts = {c.value.name: c for c in consts}
        self.ops: list[Op] = []
        self.names = names or Names(mark="_")
        self.loc: tuple[str, ...] = ()

    def param(self, hint: str, type: TensorType) -> Value:
        """Add a parameter."""
        value = Value(self.names.fresh(hint), type)
        self.params.append(value)
        return value

    def const(self, hint: str, recipe: Recipe) -> Value:
        """Add a weight."""
        value = Value(self.names.fresh(hint), recipe.type)
        self.consts[value.name] = Const(value, recipe)
        return value

    @contextmanager
    def at(self, loc: tuple[str, ...]) -> Iterator[None]:
        """Set the place in the source model of ops that are added inside the block."""
        before, self.loc = self.loc, loc
        try:
            yield
        finally:
            self.loc = before

    def add(self, name: str, *operands: Value | None, hint: str | Value = "", **attributes: Attr) -> Value:
        """Add an op with one result and return it; for `hint` see `add_all`."""
        (value,) = self.add_all(name, *operands, hints=[hint or name.split(".")[-1]], **attributes)
        return value

    def add_all(
        self, name: str, *operands: Value | None, hints: str | Sequence[str | Value] = "", **attributes: Attr
    ) -> tuple[Value, ...]:
        """Add an op and return its results.

        A result is named after its hint, which may be the value that it becomes. One hint for all results is followed
        by their names in the declaration; it is by default the name of the op.
        """
        attrs = make_attrs(attributes)
        try:
            types = OPS[name].infer([None if v is None else v.type for v in operands], dict(attrs))
            if isinstance(hints, str):
                hints = [f"{hints or name.split('.')[-1]}_{r.name}" for r in OPS[name].signature.results]
            results = tuple(self._result(hint, type, name) for hint, type in zip(hints, types, strict=True))
        except MoecError as error:
            raise replace(error, model=".".join(self.loc)) from None
        self.ops.append(Op(name, operands, results, attrs, loc=self.loc))
        return results

    def _result(self, hint: str | Value, type: TensorType, name: str) -> Value:
        if isinstance(hint, str):
            return Value(self.names.fresh(hint), type)
        if hint.type != type:
            raise MoecError(f"{name} gives {type} for {hint}, which is {hint.type}")
        return hint

    def call(
        self, callee: Function, operands: Sequence[Value], hints: Sequence[str], **attributes: Attr
    ) -> tuple[Value, ...]:
        """Add a call of a function."""
        results = tuple(Value(self.names.fresh(h), t) for h, t in zip(hints, callee.types, strict=True))
        self.ops.append(Op("call", tuple(operands), results, make_attrs(attributes), callee=callee.name))
        return results

    def build(self, results: Iterable[Value], weights: str = "") -> Function:
        """Return the function with these results."""
        consts = tuple(self.consts.values())
        return Function(self.name, tuple(self.params), consts, tuple(self.ops), tuple(results), weights)
