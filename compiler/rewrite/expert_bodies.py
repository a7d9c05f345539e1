"""Reads what an expert computes, from its result back to the tokens: linears, and ops on each number alone.

A body is read from a function that computes each expert for all tokens, either all experts in one value with an axis for
them (`stacked`), or each in ops of its own. It is written again for rows that are sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..errors import Refuse
from ..ir.module import Function, Op, Value
from ..ir.types import Attr

ELEMENTWISE = frozenset(
    f"core.{name}" for name in (
        "add", "sub", "mul", "div", "pow", "maximum", "minimum", "neg", "exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid",
        "silu", "relu", "gelu", "softplus", "abs", "erf", "clamp", "cast", "reciprocal",
    )
)  # fmt: skip
Stored: TypeAlias = int | str | None
EXPERTS, FEATURES, ONE = "experts", "features", "one"


@dataclass(frozen=True)
class Node:
    """A value of a body: the tokens (no op), a linear, or an op of the function on other nodes and constants.

    `weight` and `bias` are those of a linear; a weight that is `by_column` multiplies from the right as it lies, [in, out].
    """

    op: str = ""
    inputs: tuple[Node | Value, ...] = ()
    attrs: tuple[tuple[str, Attr], ...] = ()
    weight: Value | None = None
    bias: Value | None = None
    by_column: bool = False
    loc: tuple[str, ...] = ()

    def alike(self, other: Node) -> bool:
        """Return whether two bodies compute the same but for their weights."""
        if (self.op, self.attrs, self.by_column, self.bias is None) != (
            other.op, other.attrs, other.by_column, other.bias is None,
        ) or len(self.inputs) != len(other.inputs):  # fmt: skip
            return False
        if self.weight is not None and (other.weight is None or self.weight.type != other.weight.type):
            return False
        return all(
            a.alike(b) if isinstance(a, Node) and isinstance(b, Node) else a == b
            for a, b in zip(self.inputs, other.inputs, strict=True)
        )


TOKENS = Node()


@dataclass
class BodyReader:
    """Reads bodies in a function whose experts get `tokens`; `own` are the names of what is computed of them."""

    function: Function
    tokens: Value
    own: frozenset[str]
    experts: int | None = None  # of stacked bodies
    read: dict[str, tuple[Node, tuple[str, ...]]] = field(default_factory=dict)

    @property
    def _token_axes(self) -> tuple[str, ...]:
        return (*(f"token{i}" for i in range(len(self.tokens.type.shape) - 1)), FEATURES)

    def body(self, value: Value) -> tuple[Node, tuple[str, ...]]:
        """Return the body of a value, and what each of its axes is; Refuse for an op that mixes rows."""
        if value == self.tokens:
            return TOKENS, self._token_axes
        if value.name not in self.read:
            op = self.function.producers.get(value.name)
            if op is None or (value.name not in self.own and op.name not in ("core.reshape", "core.expand")):
                raise Refuse(f"{value} is neither the experts' input nor computed of it", value)
            self.read[value.name] = self._body_of(op)
        return self.read[value.name]

    def _body_of(self, op: Op) -> tuple[Node, tuple[str, ...]]:
        match op.name:
            case "core.linear":
                node, axes = self.body(op["x"])
                self._check_weight(op["w"], axes)
                return Node("linear", (node,), weight=op["w"], bias=op.get("b"), loc=op.loc), axes
            case "core.matmul":
                return self._matmul(op)
            case "core.transpose":
                node, axes = self.body(op.inputs[0])
                return node, tuple(axes[p] for p in op.attributes.integers("perm"))
            case "core.reshape":
                return self._reshape(op)
            case "core.expand":
                return self._expand(op)
            case "core.slice":
                node, axes = self.body(op["x"])
                if axes[op.attributes.integer("axis")] != FEATURES:
                    raise Refuse(f"{op.results[0]} is a part of another axis than the features", op.results[0])
                return Node(op.name, (node,), tuple((k, v) for k, v in op.attrs if k != "axis"), loc=op.loc), axes
            case name if name in ELEMENTWISE:
                return self._elementwise(op)
        raise Refuse(f"an expert's {op.name} is not known to work on each row alone", op.results[0])

    def _check_weight(self, weight: Value, axes: tuple[str, ...]) -> None:
        if not self._is_weight(weight):
            raise Refuse(f"{weight} is not a weight", weight)
        if axes[-1] != FEATURES or EXPERTS in axes:
            raise Refuse(f"{weight} multiplies another axis than the features", weight)

    def _is_weight(self, value: Value) -> bool:
        return any(c.value == value for c in self.function.consts) or member_of(self.function, value) is not None

    def _stored(self, value: Value) -> tuple[Value, tuple[Stored, ...]]:
        """Return the weight that a value is, and which of its axes each axis is.

        None stands for an axis of 1 that was put in, a label for that of the tokens whose experts' matrices are copied.
        """
        op = self.function.producers.get(value.name)
        if self._is_weight(value):
            return value, tuple(range(len(value.type.shape)))
        if op is None:
            raise Refuse(f"{value} is not a weight", value)
        if op.name == "core.take" and op.attributes["axis"] == 0 and self._is_weight(op.inputs[0]):
            labels = [f"token{i}" for i in range(len(op.inputs[1].type.shape) - 1)]
            return op.inputs[0], (*labels, *range(len(op.inputs[0].type.shape)))
        weight, axes = self._stored(op.inputs[0]) if op.name in ("core.transpose", "core.reshape") else (value, ())
        if op.name == "core.transpose":
            return weight, tuple(axes[p] for p in op.attributes.integers("perm"))
        if op.name == "core.reshape" and (moved := _with_ones(axes, op.inputs[0].type.shape, value.type.shape)):
            return weight, moved
        raise Refuse(f"{value} is made by {op.name}, not a weight", value)

    def _matmul(self, op: Op) -> tuple[Node, tuple[str, ...]]:
        x, y = op.inputs
        node, axes = self.body(x)
        weight, stored = self._stored(y)
        if axes[-1] != FEATURES:
            raise Refuse(f"{op.results[0]} multiplies another axis than the features", op.results[0])
        if len(weight.type.shape) == 2:
            if EXPERTS in axes or len([a for a in stored if a is not None]) != 2:
                raise Refuse(f"{weight} is {weight.type}, the same for all experts", weight)
            return Node("linear", (node,), weight=weight, by_column=stored[-2:] == (0, 1), loc=op.loc), axes
        if len(weight.type.shape) != 3 or self.experts is None or weight.type.shape[0] != self.experts:
            raise Refuse(f"{weight} is {weight.type}, not a matrix for each of {self.experts} experts", weight)
        if stored[-2:] not in ((1, 2), (2, 1)):
            raise Refuse(f"{y} does not hold its experts in an axis before the matrices", y)
        rank = len(op.results[0].type.shape)
        lead = [ONE] * (rank - len(axes)) + list(axes[:-2])
        for place, axis in enumerate(stored[:-2], rank - len(stored)):
            if axis == 0 and lead[place] in (ONE, EXPERTS):
                lead[place] = EXPERTS
            elif axis is not None and axis != lead[place]:
                raise Refuse(f"{op.results[0]} multiplies tokens by the matrix of another expert each", op.results[0])
        if EXPERTS not in lead:
            raise Refuse(f"{y} is multiplied by no axis of experts", y)
        made = (*lead, axes[-2], FEATURES)
        return Node("linear", (node,), weight=weight, by_column=stored[-2:] == (1, 2), loc=op.loc), made

    def _reshape(self, op: Op) -> tuple[Node, tuple[str, ...]]:
        node, axes = self.body(op.inputs[0])
        before = op.inputs[0].type.shape
        kept = [(axis, n) for axis, n in zip(axes, before, strict=True) if axis != ONE]
        found: list[str] = []
        for n in op.results[0].type.shape:
            if kept and kept[0][1] == n:
                found.append(kept.pop(0)[0])
            elif n == 1:
                found.append(ONE)
            else:
                raise Refuse(f"{op.results[0]} puts rows or features together", op.results[0])
        if kept:
            raise Refuse(f"{op.results[0]} puts rows or features together", op.results[0])
        return node, tuple(found)

    def _expand(self, op: Op) -> tuple[Node, tuple[str, ...]]:
        """Return tokens that are repeated for each expert as those of each."""
        node, axes = self.body(op.inputs[0])
        sizes = op.results[0].type.shape
        made = [ONE] * (len(sizes) - len(axes)) + list(axes)
        before = [1] * (len(sizes) - len(axes)) + list(op.inputs[0].type.shape)
        for place, (old, new) in enumerate(zip(before, sizes, strict=True)):
            if old != new:
                if made[place] != ONE or new != self.experts or EXPERTS in made:
                    raise Refuse(f"{op.results[0]} repeats rows or features", op.results[0])
                made[place] = EXPERTS
        return node, tuple(made)

    def _elementwise(self, op: Op) -> tuple[Node, tuple[str, ...]]:
        """Return an op on numbers; a weight that is added with a number for each feature is a linear's bias."""
        read = [self.body(v) if v == self.tokens or v.name in self.own else None for v in op.inputs]
        axes = next(found[1] for found in read if found is not None)
        if any(found is not None and found[1] != axes for found in read):
            raise Refuse(f"{op.results[0]} puts values together whose axes lie in another order", op.results[0])
        if op.name == "core.add" and None in read and (biased := self._with_bias(op, read, axes)):
            return biased, axes
        inputs = [found[0] if found else self._constant(v) for found, v in zip(read, op.inputs, strict=True)]
        return Node(op.name, tuple(inputs), op.attrs, loc=op.loc), axes

    def _with_bias(self, op: Op, read: Sequence[Any], axes: tuple[str, ...]) -> Node | None:
        place = read.index(None)
        node = read[1 - place][0]
        try:
            bias, stored = self._stored(op.inputs[place])
        except Refuse:
            return None
        if node.op != "linear" or node.bias is not None:
            raise Refuse(f"{bias} is added to what no linear gives", bias)
        lead = [None if isinstance(s, str) else s for s in [None] * (len(axes) - len(stored)) + list(stored)]
        wanted = {2: {EXPERTS: 0, FEATURES: 1}, 1: {FEATURES: 0}}.get(len(bias.type.shape), {})
        if {axis: place for axis, place in zip(axes, lead, strict=True) if place is not None} != wanted:
            raise Refuse(f"{bias} is {bias.type}, not a number for each feature of an expert", bias)
        return Node("linear", node.inputs, node.attrs, node.weight, bias, node.by_column, node.loc)

    def _constant(self, value: Value) -> Value:
        op = self.function.producers.get(value.name)
        if op is None or op.name != "core.constant":
            raise Refuse(f"{value} is neither computed by the expert nor a number", value)
        return value


def member_of(function: Function, value: Value) -> tuple[Value, int] | None:
    """Return the stack of weights that a value is one of, and its number; None for another value."""
    shaped = function.producers.get(value.name)
    if shaped is None or shaped.name != "core.reshape" or not shaped.inputs:
        return None
    cut = function.producers.get(shaped.inputs[0].name)
    if cut is None or cut.name != "core.slice" or cut.attributes.integer("axis") != 0:
        return None
    stack, start = cut.inputs[0], cut.attributes.size("start")
    if cut.attributes.size("stop") - start != 1 or value.type.shape != stack.type.shape[1:] or not start.is_Integer:
        return None
    return (stack, int(start)) if any(c.value == stack for c in function.consts) else None


def _with_ones(axes: tuple[Stored, ...], before: Sequence[Any], after: Sequence[Any]) -> tuple[Stored, ...] | None:
    """Return the axes after a reshape that only puts in or takes away axes of 1; None for another."""
    kept = [(axis, n) for axis, n in zip(axes, before, strict=True) if n != 1]
    found: list[Stored] = []
    for n in after:
        if n == 1:
            found.append(None)
        elif kept and kept[0][1] == n:
            found.append(kept.pop(0)[0])
        else:
            return None
    return None if kept else tuple(found)
