"""The expressions of the tile language: typed immutable nodes over ints and tiles, with one meaning in numpy.

Numbers, names, + - * / // %, comparisons, & | ^ ~ << >>, axes that are added, and the functions of functions.py. A node
is made by `make_binary`, `make_unary`, `make_call`, `add_axes` or Python's operators, which give it its type or raise MoecError: there is
no node of two operands that do not go together. parse.py makes nodes of text; what reads programs folds over nodes.
"""

from __future__ import annotations

import ast
import operator as python
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Any, TypeAlias

import numpy as np

from ....compiler.errors import MoecError
from ....compiler.ir.dtypes import DTYPES
from .functions import FUNCTIONS, Parameter
from .types import (
    EIGHT,
    FLOATS,
    TILE_DTYPES,
    ExprType,
    broadcast_shapes,
    check_integers,
    check_no_bool,
    common_dtype,
    constant_type,
    promoted_type,
)

BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": python.add, "-": python.sub, "*": python.mul, "/": python.truediv, "//": python.floordiv, "%": python.mod,
    "&": python.and_, "|": python.or_, "^": python.xor, "<<": python.lshift, ">>": python.rshift,
}  # fmt: skip
COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": python.lt, "<=": python.le, ">": python.gt, ">=": python.ge, "==": python.eq, "!=": python.ne,
}  # fmt: skip
UNARY: Mapping[str, Callable[[Any], Any]] = {"-": python.neg, "~": python.invert}

Operand: TypeAlias = "Expr | int | float"


def _operator_method(operator: str) -> Callable[[Expr, Operand], Expr]:
    return lambda self, other: make_binary(operator, self, other)


@dataclass(frozen=True, kw_only=True)
class Expr:
    """An expression; `source` is the text that it was written as, which messages and kernels.json show."""

    type: ExprType
    source: str = field(default="", compare=False, repr=False)

    @property
    def operands(self) -> tuple[Expr, ...]:
        """The expressions that it is made of."""
        match self:
            case Binary(_, left, right):
                return left, right
            case Unary(_, value) | Axes(value):
                return (value,)
            case Call(_, values):
                return values
        return ()

    @cached_property
    def names(self) -> frozenset[str]:
        """The names that it reads."""
        if isinstance(self, Name):
            return frozenset((self.name,))
        return frozenset[str]().union(*(part.names for part in self.operands))

    @cached_property
    def operators(self) -> int:
        """How many operators it applies to every number; functions count as FUNCTIONS says, a literal of a dtype as none."""
        inner = sum(part.operators for part in self.operands)
        match self:
            case Number() | Name() | Axes() | Call("cast", [Expr(type=ExprType(constant=int() | float()))]):
                return inner
            case Call(function):
                return inner + FUNCTIONS[function].operators
        return inner + 1

    def __str__(self) -> str:
        """Return it as text that parse.py reads."""
        return self.source or ast.unparse(python_syntax(self))

    __add__ = _operator_method("+")
    __mul__ = _operator_method("*")
    __floordiv__ = _operator_method("//")
    __and__ = _operator_method("&")
    __or__ = _operator_method("|")
    __lshift__ = _operator_method("<<")
    __rshift__ = _operator_method(">>")
    __lt__ = _operator_method("<")


@dataclass(frozen=True)
class Number(Expr):
    """A literal, one of Python's numbers; infinity is an f32."""

    value: int | float


@dataclass(frozen=True)
class Name(Expr):
    """A scalar of the launch, a variable of the grid or of a loop, or what a statement before made."""

    name: str


@dataclass(frozen=True)
class Binary(Expr):
    """Two operands with one of BINARY or COMPARISONS."""

    operator: str
    left: Expr
    right: Expr


@dataclass(frozen=True)
class Unary(Expr):
    """An operand with one of UNARY."""

    operator: str
    operand: Expr


@dataclass(frozen=True)
class Call(Expr):
    """A function of FUNCTIONS on values, with parameters that are known when the program is written."""

    function: str
    values: tuple[Expr, ...]
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Axes(Expr):
    """A value with axes of size 1 added: `kept` is True for each axis of its own and False for each new one."""

    value: Expr
    kept: tuple[bool, ...]


# --- making nodes --------------------------------------------------------------------------------------------------


def make_number(value: int | float) -> Number:
    """Return a literal."""
    return Number(value, type=ExprType("f32") if value == inf else constant_type(value))


def make_binary(operator: str, left: Operand, right: Operand) -> Binary:
    """Return two operands with an operator; MoecError where they do not go together."""
    left, right = (x if isinstance(x, Expr) else make_number(x) for x in (left, right))
    return Binary(operator, left, right, type=_binary_type(operator, left.type, right.type))


def _binary_type(operator: str, a: ExprType, b: ExprType) -> ExprType:
    if operator in COMPARISONS:
        common_dtype(a, b)
        return ExprType("bool", broadcast_shapes(a.shape, b.shape))
    if a.constant is not None and b.constant is not None:
        return _folded_type(operator, a.constant, b.constant)
    both = promoted_type(a, b)
    if operator in ("+", "-", "*"):
        check_no_bool(both, operator)
    elif operator == "/" and both.dtype not in FLOATS:
        raise MoecError(f"/ of {both.dtype} is f64 in numpy", todo="cast to f32 first, or divide by //")
    elif operator in ("//", "%", "<<", ">>") or (operator != "/" and both.dtype != "bool"):
        check_integers(both, operator)
    if operator in ("<<", ">>") and b.constant is not None:
        _check_shift(b.constant, 64 if both.weak else DTYPES[both.dtype].bits)
    return both


def _folded_type(operator: str, a: int | float, b: int | float) -> ExprType:
    if operator in ("<<", ">>"):
        _check_shift(b, 64)
    try:
        return constant_type(BINARY[operator](a, b))
    except (TypeError, ArithmeticError) as error:
        raise MoecError(f"{a} {operator} {b}: {error}") from error


def _check_shift(by: int | float, bits: int) -> None:
    if not 0 <= by < bits:
        raise MoecError(f"a shift by {by}, of numbers of {bits} bits")


def make_unary(operator: str, operand: Expr) -> Unary:
    """Return an operand with - or ~; MoecError for a type that has it not."""
    given = operand.type
    constant = None
    if operator == "~":
        if given.dtype != "bool":
            check_integers(given, operator)
    elif given.dtype in ("bool", "u8", *EIGHT):
        raise MoecError(f"- of {given.dtype}", todo="cast it first")
    elif given.constant is not None:
        constant = -given.constant
    return Unary(operator, operand, type=ExprType(given.dtype, given.shape, constant))


def make_call(name: str, *values: Operand, parameters: Sequence[Parameter] = ()) -> Call:
    """Return a function's value; MoecError for a number or type of values and parameters that it does not take."""
    function = FUNCTIONS[name]
    given = tuple(x if isinstance(x, Expr) else make_number(x) for x in values)
    if len(given) != function.values or not _match_parameters(function.parameters, parameters):
        takes = ", ".join(("a value",) * function.values + function.parameters)
        raise MoecError(f"{name} of {len(given)} values and {list(parameters)}", todo=f"it takes {takes}")
    constants = [x.type.constant for x in given if isinstance(x.type.constant, int)]
    if name in ("cdiv", "minimum", "maximum") and len(constants) == len(given):
        if name == "cdiv" and not constants[1]:
            raise MoecError("cdiv by 0")
        type = constant_type(int(function.compute(*constants)))
    else:
        type = function.type(name, [x.type for x in given], parameters)
    return Call(name, given, tuple(parameters), type=type)


def _match_parameters(wanted: Sequence[str], given: Sequence[Parameter]) -> bool:
    dtypes, sizes = [p for p in given if isinstance(p, str)], [p for p in given if not isinstance(p, str)]
    if dtypes != list(given[len(sizes) :]) or len(dtypes) != ("dtype" in wanted) or not set(dtypes) <= set(TILE_DTYPES):
        return False
    return "sizes" in wanted or len(sizes) == len(wanted) - len(dtypes)


def add_axes(value: Expr, kept: Sequence[bool]) -> Axes:
    """Return a value with axes added; MoecError where `kept` has not each axis of its own."""
    shape = value.type.shape
    if sum(kept) != len(shape):
        what = "more" if sum(kept) > len(shape) else "fewer"
        raise MoecError(f"{_index_text(kept)} names {what} axes than {list(shape)} has")
    sizes = iter(shape)
    return Axes(value, tuple(kept), type=ExprType(value.type.dtype, tuple(next(sizes) if k else 1 for k in kept)))


def _index_text(kept: Sequence[bool]) -> str:
    return f"[{', '.join(':' if k else 'None' for k in kept)}]"


# --- folds ---------------------------------------------------------------------------------------------------------


def shape_of(*exprs: Expr | None) -> tuple[int, ...]:
    """Return the shape that expressions broadcast to, such as the indices and the mask of a load."""
    shape: tuple[int, ...] = ()
    for expr in exprs:
        shape = shape if expr is None else broadcast_shapes(shape, expr.type.shape)
    return shape


def with_types(expr: Expr, types: Mapping[str, ExprType]) -> Expr:
    """Return an expression over names of other types; MoecError where it has none then."""
    match expr:
        case Name(name):
            return replace(expr, type=types[name])
        case Binary(operator, left, right):
            made: Expr = make_binary(operator, with_types(left, types), with_types(right, types))
        case Unary(operator, operand):
            made = make_unary(operator, with_types(operand, types))
        case Call(function, values, parameters):
            made = make_call(function, *(with_types(v, types) for v in values), parameters=parameters)
        case Axes(value, kept):
            made = add_axes(with_types(value, types), kept)
        case _:
            return expr
    return replace(made, source=expr.source)


def evaluate_expr(expr: Expr | int, values: Mapping[str, Any]) -> Any:
    """Return the value of an expression; MoecError for a name without one."""
    match expr:
        case int():
            return expr
        case Number(value):
            return np.float32(value) if value == inf else value
        case Name(name):
            if name not in values:
                raise MoecError(f"{name} has no value")
            return values[name]
        case Binary(operator, left, right):
            compute = BINARY.get(operator) or COMPARISONS[operator]
            return compute(evaluate_expr(left, values), evaluate_expr(right, values))
        case Unary(operator, operand):
            return UNARY[operator](evaluate_expr(operand, values))
        case Call(function, arguments, parameters):
            return FUNCTIONS[function].compute(*(evaluate_expr(a, values) for a in arguments), *parameters)
        case Axes(value, kept):
            return evaluate_expr(value, values)[tuple(slice(None) if k else None for k in kept)]
    raise AssertionError(f"{type(expr).__name__} is no node")


def python_syntax(expr: Expr, spell: Callable[[str, list[ast.expr]], ast.expr] | None = None) -> ast.expr:
    """Return the tree of an expression as Python has it; `spell` makes the tree of a function's call."""
    match expr:
        case Number(value):
            return ast.Name("inf") if value == inf else ast.Constant(value)
        case Name(name):
            return ast.Name(name)
        case Binary(operator, left, right):
            return operator_node(operator, python_syntax(left, spell), python_syntax(right, spell))
        case Unary(operator, operand):
            return ast.UnaryOp(_UNARY_SYNTAX[operator](), python_syntax(operand, spell))
        case Call(function, values, parameters):
            given = [ast.Constant(p) for p in parameters]
            first = len(given) - 1 if function == "full" else 0
            arguments = [*given[:first], *(python_syntax(v, spell) for v in values), *given[first:]]
            return spell(function, arguments) if spell else ast.Call(ast.Name(function), arguments, [])
        case Axes(value, kept):
            return ast.Subscript(python_syntax(value, spell), index_syntax(kept))
    raise AssertionError(f"{type(expr).__name__} is no node")


_SIGNS: Mapping[str, ast.expr] = {sign: ast.parse(f"a {sign} b", mode="eval").body for sign in (*BINARY, *COMPARISONS)}
_UNARY_SYNTAX: Mapping[str, type[ast.unaryop]] = {"-": ast.USub, "~": ast.Invert}


def operator_node(operator: str, left: ast.expr, right: ast.expr) -> ast.expr:
    """Return the tree of an operator of Python's between two trees."""
    match _SIGNS[operator]:
        case ast.BinOp(op=sign):
            return ast.BinOp(left, sign, right)
        case ast.Compare(ops=signs):
            return ast.Compare(left, signs, [right])
    raise AssertionError(operator)


def index_syntax(kept: Sequence[bool]) -> ast.expr:
    """Return the tree of the index that adds axes, such as `:, None`."""
    return ast.Tuple([ast.Slice() if k else ast.Constant(None) for k in kept])
