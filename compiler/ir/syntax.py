"""Text to trees: the grammar, the tree of a file, and the places that errors point to.

The trees know nothing of dims, ops or types; `parser.py` gives them their meaning. A lark token is a string that
remembers its line and column, so every leaf can be pointed at.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken

from ..errors import MoecError, caret_line

Node = tuple[Any, ...]  # a literal or a size: (kind, parts...), with tokens as leaves


class Place(NamedTuple):
    """A place in a text: 1-based line and column, and its width."""

    line: int
    column: int
    width: int


def token_place(first: Token, last: Token | None = None) -> Place:
    """Return the place of a token, or from one token to another."""
    end = (last or first).end_pos or 0
    return Place(first.line or 1, first.column or 1, end - (first.start_pos or 0))


@dataclass(frozen=True)
class Source:
    """A text and the name that errors call it by."""

    text: str
    filename: str

    def error(self, what: str, at: Place | Token, *, todo: str = "", model: str = "") -> MoecError:
        """Return an error that points at a place of the text."""
        spot = token_place(at) if isinstance(at, Token) else at
        line = self.text.split("\n")[spot.line - 1].rstrip("\r").replace("\t", " ")
        width = min(spot.width, len(line) - spot.column + 1)
        where = f"{self.filename}:{spot.line}:{spot.column}"
        return MoecError(what, where, caret_line(line, spot.column, width), model, todo)


# --- the tree of a file ----------------------------------------------------------------------------------------


class TypeNode(NamedTuple):
    """A written type; `key` is all but its place."""

    key: tuple[bool, Token, tuple[Node, ...]]
    place: Place


class AttrNode(NamedTuple):
    """`name=literal`."""

    name: Token
    value: Node


class RecipeNode(NamedTuple):
    """`name(arguments)`; an argument is a recipe, a type, an attribute, a string or a list."""

    name: Token
    arguments: tuple[RecipeNode | TypeNode | AttrNode | Node, ...]


class ConstNode(NamedTuple):
    """`const value : type = recipe`."""

    value: Token
    type: TypeNode
    recipe: RecipeNode


class StatementNode(NamedTuple):
    """`results = op(operands) {attrs} : types loc(...)`; a call has the op `call` and a callee."""

    results: tuple[Token, ...]
    op: Token
    callee: Token | None
    operands: tuple[Token, ...]
    attrs: tuple[AttrNode, ...]
    types: tuple[TypeNode, ...] = ()
    loc: tuple[str, ...] = ()


class FunctionNode(NamedTuple):
    """A function; `counts` are the result types with how often each stands."""

    name: Token
    params: tuple[tuple[Token, TypeNode], ...]
    counts: tuple[tuple[Token | None, TypeNode], ...]
    weights: str
    body: tuple[ConstNode | StatementNode, ...]
    return_: tuple[Token, ...]  # the word itself, then the values


class ModuleNode(NamedTuple):
    """A file."""

    version: Token
    stage: Token
    source: str
    dims: tuple[tuple[Token, Token, Token], ...]
    functions: tuple[FunctionNode, ...]


class Slot(NamedTuple):
    """An operand or result of a signature."""

    name: Token
    state: bool
    dtype: Token
    sizes: tuple[Node, ...]
    optional: bool
    variadic: bool


def _read_nan(token: str) -> float:
    """Return the NaN with the bits that a text says; NaN itself where they are those of a number."""
    (value,) = struct.unpack(">d", bytes.fromhex(token.removeprefix("nan0x")))
    return value if math.isnan(value) else math.nan


def _unquote_text(token: Token) -> str:
    try:
        return json.loads(token, strict=False)
    except ValueError as error:
        raise _Misread(f"the text {token} is not well written: {error}", token) from None


class _Misread(Exception):
    """An error at a token, raised where the whole text is not known."""

    def __init__(self, what: str, token: Token) -> None:
        super().__init__(what)
        self.what = what
        self.token = token


def _all_children(_: Any, *children: Any) -> tuple:
    return children


def _node_of_kind(kind: str) -> Callable[..., Node]:
    return lambda _, *parts: (kind, *parts)


@v_args(inline=True)
class _Builder(Transformer):
    """Turns each rule of the grammar into its node while lark parses."""

    add, sub, mul, neg, int, name, range = map(_node_of_kind, ("add", "sub", "mul", "neg", "int", "name", "range"))
    star = _node_of_kind("star")
    params = counted = values = operands = types = sizes = attrs = slots = slot_sizes = statements = pipeline = (
        _all_children
    )
    dim = param = count = signature = _all_children

    def size(self, expression: Node) -> Node:
        return expression

    def module(self, version: Token, stage: Token, source: str | None, *parts: Any) -> ModuleNode:
        functions = tuple(p for p in parts if isinstance(p, FunctionNode))
        return ModuleNode(
            version, stage, source or "", tuple(p for p in parts if not isinstance(p, FunctionNode)), functions
        )

    def source(self, text: Token) -> str:
        return _unquote_text(text)

    def function(self, name: Token, params: tuple, counts: tuple, weights: Token | None, *body: Any) -> FunctionNode:
        return FunctionNode(name, params, counts, _unquote_text(weights) if weights else "", body[:-1], body[-1])

    def const(self, value: Token, type: TypeNode, recipe: RecipeNode) -> ConstNode:
        return ConstNode(value, type, recipe)

    def return_(self, word: Token, values: tuple[Token, ...] | None) -> tuple[Token, ...]:
        return (word, *(values or ()))

    def op(self, results: tuple, op: Token, operands: tuple, attrs: tuple | None) -> StatementNode:
        return StatementNode(results, op, None, operands, attrs or ())

    def call(self, results: tuple, word: Token, callee: Token, operands: tuple, attrs: tuple | None) -> StatementNode:
        return StatementNode(results, word, callee, operands, attrs or ())

    def statement(self, head: StatementNode, types: tuple | None, loc: tuple | None) -> StatementNode:
        return head._replace(types=types or (), loc=loc or ())

    pattern = statement

    def loc(self, *texts: Token) -> tuple[str, ...]:
        return tuple(map(_unquote_text, texts))

    def type(self, state: Token | None, dtype: Token, sizes: tuple, close: Token) -> TypeNode:
        return TypeNode((state is not None, dtype, sizes), token_place(state or dtype, close))

    def attr(self, name: Token, value: Node) -> AttrNode:
        return AttrNode(name, value)

    def recipe(self, name: Token, *arguments: Any) -> RecipeNode:
        return RecipeNode(name, arguments)

    def slot(self, name: Token, state: Any, dtype: Token, sizes: tuple, optional: Any, variadic: Any) -> Slot:
        return Slot(name, state is not None, dtype, sizes, optional is not None, variadic is not None)

    def step(self, name: Token, attrs: tuple | None) -> tuple[Token, tuple]:
        return name, attrs or ()

    def function_call(self, name: Token, *arguments: Node) -> Node:
        return ("call", name, arguments)

    def string(self, token: Token) -> Node:
        return ("value", _unquote_text(token))

    def float(self, token: Token) -> Node:
        return ("value", _read_nan(token) if token.startswith("nan0x") else float(token))

    def negative_float(self, token: Token) -> Node:
        return ("value", math.nan if token.startswith("nan") else -float(token))

    def true(self) -> Node:
        return ("value", True)

    def false(self) -> Node:
        return ("value", False)

    def list(self, *items: Node) -> Node:
        return ("list", items)


setattr(_Builder, "return", _Builder.return_)  # the rule has the name of the keyword


@lru_cache(maxsize=1)
def _lark_parser() -> Lark:
    grammar = Path(__file__).with_name("grammar.lark").read_text("utf-8")
    starts = ["module", "statements", "signature", "pipeline", "size"]
    return Lark(grammar, parser="lalr", start=starts, transformer=_Builder(), maybe_placeholders=True)


# --- reading ---------------------------------------------------------------------------------------------------

DESCRIPTIONS = {
    "VALUE": "a value (%x)", "SYMBOL": "a function (@f)", "OPNAME": "an op (core.add)", "PASSNAME": "a pass",
    "NAME": "a name", "FLOAT": "a number", "INT": "an integer", "STRING": "a string", "$END": "the end",
}  # fmt: skip


def parse_text(start: str, source: Source) -> Any:
    """Return the tree of a text for one of the grammar's start symbols; MoecError at what does not fit."""
    try:
        return _lark_parser().parse(source.text, start=start)
    except _Misread as error:
        raise source.error(error.what, error.token) from None
    except UnexpectedInput as error:
        raise _syntax_error(source, error) from None


def _syntax_error(source: Source, error: UnexpectedInput) -> MoecError:
    match error:
        case UnexpectedToken(token=token) if token.type != "$END":
            found, at = f"{str(token)!r}", token_place(token)
        case UnexpectedCharacters():
            rest = source.text[error.pos_in_stream or 0 :]
            word = re.match(r"[%@]?[\w.]+|.", rest, re.DOTALL)
            text = word[0] if word else rest[:1]
            found, at = repr(text), Place(error.line, error.column, len(text))
        case _:
            body = source.text.rstrip()
            found, at = "the end", Place(body.count("\n") + 1, len(body) - body.rfind("\n"), 1)
    return source.error(f"syntax error: {found} does not fit here", at, todo=f"expected {_expected_tokens(error)}")


def _expected_tokens(error: UnexpectedInput) -> str:
    match error:
        case UnexpectedToken():
            names = set(error.accepts or error.expected)
        case UnexpectedCharacters():
            names = set(error.allowed or ())
        case UnexpectedEOF():
            names = set(error.expected)
        case _:
            names = set()
    patterns = {t.name: t.pattern.value for t in _lark_parser().terminals}
    texts = sorted({DESCRIPTIONS.get(n, f"'{patterns.get(n, n)}'") for n in names})
    shown = texts[:6] + ["..."] * (len(texts) > 6)
    return " or ".join([", ".join(shown[:-1])] * (len(shown) > 1) + shown[-1:])


# --- what reading needs ------------------------------------------------------------------------------------------


def suggest_names(name: str, known: Iterable[str], sign: str = "") -> str:
    """Return advice with the known names that look like `name`, each behind its sign (% or @), or nothing."""
    found = get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(sign + f for f in found)}?" if found else ""


@contextmanager
def refuse_deep_nesting(source: Source) -> Iterator[None]:
    """Raise MoecError for a text that is nested too deeply for Python's stack."""
    try:
        yield
    except RecursionError:
        raise MoecError("the text is nested too deeply", where=f"{source.filename}:1:1") from None
