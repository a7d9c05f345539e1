"""A function that is being lowered: its ops so far, new weights, new names."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...compiler.errors import Refuse
from ...compiler.ir import Attr, Const, Function, Op, Value, make_attrs
from ...compiler.ops import OPS
from ...compiler.recipes import Recipe


@dataclass
class Draft:
    """A function being rewritten: its ops so far, new weights, and which value stands for which with other axes."""

    function: Function
    ops: list[Op] = field(default_factory=list)
    consts: dict[str, Const] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)  # what did not become the op it could have been, and why
    turned: dict[str, Value] = field(default_factory=dict)  # [B, H, S, D] value -> the same as [B, S, H, D]

    @staticmethod
    def of(function: Function) -> Draft:
        """Return an empty draft of a function."""
        return Draft(function, consts={c.value.name: c for c in function.consts}, taken=set(function.names))

    def fresh(self, base: str) -> str:
        """Return a free name: `base`, `base.1`, ..."""
        name, number = base, 1
        while name in self.taken:
            name, number = f"{base}.{number}", number + 1
        self.taken.add(name)
        return name

    def add(self, name: str, *operands: Value | None, hint: str, loc: tuple[str, ...], **attrs: Attr) -> Value:
        """Add an op with one result and return it."""
        (type_,) = OPS[name].infer([None if v is None else v.type for v in operands], attrs)
        result = Value(self.fresh(hint), type_)
        self.ops.append(Op(name, operands, (result,), make_attrs(attrs), loc=loc))
        return result

    def weight(self, name: str, recipe: Recipe) -> Value:
        """Return a new weight, or the one that has this recipe already."""
        for const in self.consts.values():
            if repr(const.recipe) == repr(recipe):
                return const.value
        value = Value(self.fresh(name), recipe.type)
        self.consts[value.name] = Const(value, recipe)
        return value

    def recipe(self, value: Value) -> Recipe:
        """Return how a weight is made; Refuse for a value that is none."""
        if value.name not in self.consts:
            raise Refuse(f"{value} is not a weight", value)
        return self.consts[value.name].recipe
