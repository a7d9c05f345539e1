"""The expressions of the tile language: a small part of Python's, over ints and tiles, with one meaning in numpy.

Numbers, names, + - * / // %, comparisons, & | ~ << >>, `x[:, None]` to add axes, and the functions in FUNCTIONS. Nothing
else parses: a spec from elsewhere cannot make the simulator run anything.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ....compiler.errors import MoecError
from ....compiler.ir.dtypes import DTYPES


def _cast(x: Any, dtype: str) -> Any:
    return np.asarray(x).astype(DTYPES[dtype].numpy)


def _full(*shape_value_dtype: Any) -> np.ndarray:
    *shape, value, dtype = shape_value_dtype
    return np.full(shape, value, DTYPES[dtype].numpy)


def _erf(x: np.ndarray) -> np.ndarray:
    # Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7
    t = 1 / (1 + 0.3275911 * np.abs(x))
    series = ((((1.061405429 * t - 1.453152027) * t) + 1.421413741) * t - 0.284496736) * t + 0.254829592
    return np.sign(x) * (1 - series * t * np.exp(-x * x))


def _exp(x: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.exp(x)


def _log(x: Any) -> Any:
    with np.errstate(divide="ignore"):
        return np.log(x)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "arange": lambda n: np.arange(n, dtype=np.int32),  # 0 .. n - 1
    "full": _full,  # full(M, N, value, "f32")
    "cast": _cast,  # cast(x, "bf16"), rounding to nearest even
    "bitcast": lambda x, dtype: np.asarray(x).view(DTYPES[dtype].numpy),  # the same bits
    "where": np.where,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "cdiv": lambda a, b: -(-a // b),
    "exp": _exp,
    "log": _log,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + _exp(-x)),
    "tanh": np.tanh,
    "erf": _erf,
    "abs": np.abs,
    "sum": lambda x, axis: np.sum(x, axis=axis, dtype=np.int32 if x.dtype in (np.bool_, np.int32) else None),
    "max": lambda x, axis: np.max(x, axis=axis),
    "min": lambda x, axis: np.min(x, axis=axis),
    "argmax": lambda x, axis: np.argmax(x, axis=axis).astype(np.int32),  # the first of equal ones
    "cumsum": lambda x, axis: np.cumsum(x, axis=axis, dtype=np.int32 if x.dtype in (np.bool_, np.int32) else None),
    "reshape": lambda x, *shape: np.reshape(x, shape),
    "trans": lambda x: np.swapaxes(x, -1, -2),
}

_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b, ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b, ast.Mod: lambda a, b: a % b, ast.BitAnd: lambda a, b: a & b,
    ast.BitOr: lambda a, b: a | b, ast.BitXor: lambda a, b: a ^ b, ast.LShift: lambda a, b: a << b,
    ast.RShift: lambda a, b: a >> b,
}  # fmt: skip
_COMPARE: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Lt: lambda a, b: a < b, ast.LtE: lambda a, b: a <= b, ast.Gt: lambda a, b: a > b, ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b,
}  # fmt: skip
_UNARY: Mapping[type, Callable[[Any], Any]] = {ast.USub: lambda a: -a, ast.Invert: lambda a: ~a}


@lru_cache(maxsize=65536)
def parse(text: str) -> ast.expr:
    """Return an expression's tree; MoecError for anything that is not of this language."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise MoecError(f"{text!r} is no expression of the tile language") from error
    _check(tree, text)
    return tree


def _check(node: ast.expr, text: str) -> None:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None) | ast.Name():
            return
        case ast.BinOp(left, operator, right) if type(operator) in _BINARY:
            parts = [left, right]
        case ast.UnaryOp(operator, operand) if type(operator) in _UNARY:
            parts = [operand]
        case ast.Compare(left, [operator], [right]) if type(operator) in _COMPARE:
            parts = [left, right]
        case ast.Call(ast.Name(name), arguments, []) if name in FUNCTIONS:
            parts = arguments
        case ast.Subscript(value, ast.Tuple(axes)) if all(_is_axis(a) for a in axes):
            parts = [value]
        case _:
            raise MoecError(
                f"{ast.unparse(node)} in {text!r} is not of the tile language",
                todo=f"its functions are {', '.join(FUNCTIONS)}",
            )
    for part in parts:
        _check(part, text)


def _is_axis(node: ast.expr) -> bool:
    whole = isinstance(node, ast.Slice) and not (node.lower or node.upper or node.step)
    return whole or (isinstance(node, ast.Constant) and node.value is None)


@lru_cache(maxsize=65536)
def names(text: str) -> frozenset[str]:
    """Return the names that an expression reads."""
    tree = parse(text)
    called = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    return frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called)


def evaluate(text: str | int, values: Mapping[str, Any]) -> Any:
    """Return the value of an expression; MoecError for a name without one."""
    return text if isinstance(text, int) else _value(parse(text), values, text)


def _value(node: ast.expr, values: Mapping[str, Any], text: str) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.Name("inf"):
            return np.float32(np.inf)
        case ast.Name(name):
            if name not in values:
                raise MoecError(f"{name} in {text!r} has no value")
            return values[name]
        case ast.BinOp(left, operator, right):
            return _BINARY[type(operator)](_value(left, values, text), _value(right, values, text))
        case ast.UnaryOp(operator, operand):
            return _UNARY[type(operator)](_value(operand, values, text))
        case ast.Compare(left, [operator], [right]):
            return _COMPARE[type(operator)](_value(left, values, text), _value(right, values, text))
        case ast.Call(ast.Name(name), arguments):
            return FUNCTIONS[name](*(_value(a, values, text) for a in arguments))
        case ast.Subscript(value, ast.Tuple(axes)):
            return _value(value, values, text)[tuple(slice(None) if isinstance(a, ast.Slice) else None for a in axes)]
    raise AssertionError(f"{ast.unparse(node)} passed the check")
