"""The smaller texts: sizes, op signatures, the sides of rules; for those of pipelines see `pipelines.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
from lark import Token

from ..errors import MoecError
from .activation import Activation
from .dims import Size, dim, size_text
from .literals import Names, read_attribute, read_attributes, read_size
from .syntax import Slot, Source, StatementNode, parse_text, refuse_deep_nesting, suggest_names


@dataclass(frozen=True)
class Var:
    """A pattern variable of a rule: a bare capitalised name as an attribute value, as in `{k=K}`."""

    name: str


@dataclass(frozen=True)
class PatternOp:
    """One line of a rule's side. Names are without the %; an absent operand `_` is None; written types are dropped."""

    name: str
    operands: tuple[str | None, ...]
    results: tuple[str, ...]
    attrs: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Operand:
    """An operand or a result of an op signature.

    `dtype` is as written (a single capital is a variable). An element of `dims` is `"*X"` (any number of sizes),
    `("broadcast", "*X", "*Y")`, or a sympy expression over the names in it.
    """

    name: str
    dtype: str
    dims: tuple[str | tuple[str, ...] | Size, ...]
    state: bool = False
    optional: bool = False
    variadic: bool = False

    def __str__(self) -> str:
        dims = ", ".join(map(_dim_text, self.dims))
        marks = "?" * self.optional + "..." * self.variadic
        return f"{self.name}: {'state ' * self.state}{self.dtype}[{dims}]{marks}"


@dataclass(frozen=True)
class Signature:
    """The operands and results of an op."""

    operands: tuple[Operand, ...]
    results: tuple[Operand, ...]

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.operands))} -> {', '.join(map(str, self.results))}".lstrip()


def _dim_text(pattern: str | tuple[str, ...] | Size) -> str:
    match pattern:
        case str():
            return pattern
        case (name, *stars):
            return f"{name}({', '.join(s[1:] for s in stars)})"
    return size_text(pattern)


def parse_size(text: str, dims: Collection[str]) -> Size:
    """Return the size that a text such as `4*B + floordiv(T, 8)` says over the declared dims."""
    source = Source(text, "<size>")
    with refuse_deep_nesting(source):
        return sympy.expand(read_size(parse_text("size", source), source, names_of_dims(source, dims)))


def parse_statements(text: str) -> tuple[PatternOp, ...]:
    """Return the statements of a rule's side; types may be left out, and `{k=K}` holds `Var("K")`."""
    source = Source(text, "<rule>")

    def names(token: Token, alone: bool) -> Any:
        if not alone:
            return dim(token)
        return Var(str(token)) if token[0].isupper() else str(token)

    def pattern(node: StatementNode) -> PatternOp:
        if node.callee:
            raise source.error("a rule has no calls", node.op)
        for token in (*node.results, *node.operands):
            if "{" in token:
                raise source.error("a rule has no ranges of values", token)
        operands = tuple(None if t == "_" else str(t[1:]) for t in node.operands)
        results = tuple(str(t[1:]) for t in node.results)
        return PatternOp(str(node.op), operands, results, read_attributes(node.attrs, source, names))

    with refuse_deep_nesting(source):
        return tuple(map(pattern, parse_text("statements", source)))


def parse_activation(text: str) -> Activation:
    """Return the activation that a text such as `gated(silu, limit=7.0)` says."""
    source = Source(text, "<activation>")
    found = read_attribute(parse_text("size", source), source, lambda token, alone: str(token))
    if not isinstance(found, Activation):
        raise MoecError(f"{text} is no activation", todo="write it as in gated(silu) or plain(relu)")
    return found


def parse_signature(text: str) -> Signature:
    """Return the signature that a text such as `x: A[*X, K], b: A[N]? -> y: A[*X, N]` says."""
    source = Source(text, "<signature>")

    def sizes(slot: Slot) -> Iterator[str | tuple[str, ...] | Size]:
        for node in slot.sizes:
            match node:
                case ("star", token):
                    yield f"*{token}"
                case ("call", "broadcast", arguments):
                    yield ("broadcast", *(f"*{name}" for _, name in arguments))
                case _:
                    yield sympy.expand(read_size(node, source, lambda token, _: dim(token)))

    def operand(slot: Slot) -> Operand:
        return Operand(str(slot.name), str(slot.dtype), tuple(sizes(slot)), slot.state, slot.optional, slot.variadic)

    operands, results = parse_text("signature", source)
    for slot in operands[:-1]:
        if slot.variadic:
            raise source.error("only the last operand may be variadic", slot.name)
    return Signature(tuple(map(operand, operands)), tuple(map(operand, results)))


def names_of_dims(source: Source, dims: Collection[str]) -> Names:
    """Return the meaning of names where dims are declared: a dim, or a word where one may stand."""

    def names(token: Token, alone: bool) -> Any:
        if token in dims:
            return dim(token)
        if alone:
            return str(token)
        known = f"declared: {', '.join(dims)}" if dims else "there are none"
        raise source.error(f"unknown dim {token}", token, todo=suggest_names(token, dims) or known)

    return names
