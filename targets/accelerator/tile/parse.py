"""Reads the text of expressions, once, into typed nodes: a small part of Python's syntax and nothing else.

Nothing else parses: a spec from elsewhere cannot make the simulator run anything.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import inf

from ....compiler.errors import MoecError
from .expr import BINARY, COMPARISONS, UNARY, Expr, Name, add_axes, make_binary, make_call, make_number, make_unary
from .functions import FUNCTIONS, Parameter
from .types import INT, ExprType

_SIGNS: Mapping[type, str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.BitAnd: "&",
    ast.BitOr: "|", ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">",
    ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.USub: "-", ast.Invert: "~",
}  # fmt: skip


def parse_expr(text: str, types: Mapping[str, ExprType]) -> Expr:
    """Return the expression of a text over names of these types; MoecError for what is none or has no type."""
    _, names = _syntax_tree(text)
    given = tuple(map(types.get, names))
    if None in given:
        what = f"{names[given.index(None)]} has no value here: what a loop or an if makes is gone after it"
        raise MoecError(what, where=text)
    return _typed_expr(text, given)


def parse_size(size: int | str, names: Sequence[str]) -> Expr | int:
    """Return a size over scalars: an int as it is, a text as an expression."""
    return size if isinstance(size, int) else parse_expr(size, dict.fromkeys(names, INT))


@lru_cache(maxsize=65536)
def _syntax_tree(text: str) -> tuple[ast.expr, tuple[str, ...]]:
    """Return a text's tree and the names that it reads."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MoecError(f"{text!r} is no expression of the tile language") from error
    called = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called}
    return tree, tuple(sorted(found - {"inf"}))


@lru_cache(maxsize=65536)
def _typed_expr(text: str, types: tuple[ExprType, ...]) -> Expr:
    """Return the expression of a text over its names, of these types: the same object for equal ones."""
    tree, names = _syntax_tree(text)
    try:
        return replace(_typed_node(tree, dict(zip(names, types, strict=True))), source=text)
    except MoecError as error:
        raise MoecError(error.what, where=text, todo=error.todo) from error
    except RecursionError as error:
        raise MoecError("an expression that is nested too deeply", where=f"{text[:40]} ...") from error


def _typed_node(tree: ast.expr, types: Mapping[str, ExprType]) -> Expr:
    match tree:
        case ast.Constant(bool()):
            raise MoecError("True and False are no numbers of the tile language", todo="compare instead")
        case ast.Constant(int() | float() as value):
            return make_number(value)
        case ast.Name("inf"):
            return make_number(inf)
        case ast.Name(name):
            return Name(name, type=types[name])
        case ast.BinOp(left, sign, right) | ast.Compare(left, [sign], [right]) if _SIGNS.get(type(sign)) in _OPERATORS:
            return make_binary(_SIGNS[type(sign)], _typed_node(left, types), _typed_node(right, types))
        case ast.UnaryOp(sign, operand) if _SIGNS.get(type(sign)) in UNARY:
            return make_unary(_SIGNS[type(sign)], _typed_node(operand, types))
        case ast.Call(ast.Name(name), arguments, []) if name in FUNCTIONS:
            return _typed_call(name, arguments, types)
        case ast.Subscript(value, ast.Tuple(index)) if all(_is_axis(a) for a in index):
            return add_axes(_typed_node(value, types), [isinstance(a, ast.Slice) for a in index])
    raise MoecError(
        f"{ast.unparse(tree)} is not of the tile language", todo=f"its functions are {', '.join(FUNCTIONS)}"
    )


_OPERATORS = {**BINARY, **COMPARISONS}


def _typed_call(name: str, arguments: Sequence[ast.expr], types: Mapping[str, ExprType]) -> Expr:
    """Return a call: its values are written before its parameters, but for `full`, whose sizes are written first."""
    count, first = FUNCTIONS[name].values, max(len(arguments) - 2, 0) if name == "full" else 0
    values = [_typed_node(a, types) for a in arguments[first : first + count]]
    rest = [_parse_parameter(a, types) for a in (*arguments[:first], *arguments[first + count :])]
    return make_call(name, *values, parameters=rest)


def _parse_parameter(tree: ast.expr, types: Mapping[str, ExprType]) -> Parameter:
    """Return a size, an axis or a dtype."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        return tree.value
    constant = _typed_node(tree, types).type.constant
    if not isinstance(constant, int):
        raise MoecError(f"{ast.unparse(tree)} is no int")
    return constant


def _is_axis(tree: ast.expr) -> bool:
    whole = isinstance(tree, ast.Slice) and not (tree.lower or tree.upper or tree.step)
    return whole or (isinstance(tree, ast.Constant) and tree.value is None)
