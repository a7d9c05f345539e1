"""Appends ops to a function under construction; result types come from the ops' own inference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import MoecError
from ..ir.module import Const, Function, Op, Value
from ..ir.recipes import Recipe
from ..ir.types import TensorType, make_attrs
from ..ops import OPS


@dataclass
class Builder:
    """A function while it is written. Names are `base`, `base_1`, ... in the order of appearance."""

    name: str
    params: list[Value] = field(default_factory=list)
    consts: list[Const] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    loc: tuple[str, ...] = ()

    def fresh(self, base: str) -> str:
        """Return a name that is not taken."""
        count = self.names.get(base)
        self.names[base] = (count or 0) + 1
        if count is None:
            return base
        return self.fresh(f"{base}_{count}") if f"{base}_{count}" in self.names else self._claim(f"{base}_{count}")

    def _claim(self, name: str) -> str:
        self.names[name] = 1
        return name

    def param(self, name: str, type: TensorType) -> Value:
        """Add a parameter."""
        value = Value(self.fresh(name), type)
        self.params.append(value)
        return value

    def const(self, name: str, recipe: Recipe) -> Value:
        """Add a weight."""
        value = Value(self.fresh(name), recipe.type)
        self.consts.append(Const(value, recipe))
        return value

    def op(self, name: str, *operands: Value | None, hint: Any = "", **attributes: Any) -> Any:
        """Add an op; return its result, or a tuple of them. `hint` is the base of the result's name."""
        attrs = make_attrs(attributes)
        try:
            types = OPS[name].infer([None if v is None else v.type for v in operands], dict(attrs))
        except MoecError as error:
            raise replace(error, model=".".join(self.loc)) from None
        base = hint or name.split(".")[-1]
        result_names = [p.name for p in OPS[name].signature.results]
        hints = [base] if len(types) == 1 else [f"{base}_{n}" for n in result_names]
        results = tuple(Value(self.fresh(h), t) for h, t in zip(hints, types, strict=True))
        self.ops.append(Op(name, operands, results, attrs, loc=self.loc))
        return results[0] if len(results) == 1 else results

    def call(self, callee: Function, operands: list[Value], hints: list[str], **attributes: Any) -> tuple[Value, ...]:
        """Add a call of a function."""
        results = tuple(Value(self.fresh(h), t) for h, t in zip(hints, callee.types, strict=True))
        self.ops.append(Op("call", tuple(operands), results, make_attrs(attributes), callee=callee.name))
        return results

    def finish(self, results: list[Value], weights: str = "") -> Function:
        """Return the function."""
        return Function(self.name, tuple(self.params), tuple(self.consts), tuple(self.ops), tuple(results), weights)
