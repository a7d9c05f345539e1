"""Prints expressions of the tile language as Triton's Python, with the meaning that tile/expr.py gives them in numpy.

Where Triton would compute in another dtype than an expression's type, the cast is printed; what differs in a way that no
cast mends is refused. bf16 and f16 are computed in f32 and rounded after each step, as numpy does it. // and % round
down in numpy and to zero in Triton: they are printed unchanged for numbers that cannot be negative, as shifts and
masks for powers of two, and through a helper for others.

What is not kept: which of two NaN is meant, the maximum over numbers with NaN among them, numbers beyond the range of
f8e4m3 when cast to it (NaN in numpy, the largest in Triton), and the last bits of exp and its like.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ....compiler.errors import MoecError
from ..tile.expr import COMPARISONS, Axes, Binary, Call, Expr, Name, Number, Unary, index_syntax, operator_node
from ..tile.types import EIGHT, FLOATS, HALF, ExprType, common_dtype

TRITON: Mapping[str, str] = {
    "f32": "float32", "bf16": "bfloat16", "f16": "float16", "f8e4m3": "float8e4nv", "f8e5m2": "float8e5",
    "f8e4m3fnuz": "float8e4b8",
    "i64": "int64", "i32": "int32", "i8": "int8", "u8": "uint8", "bool": "int1",
}  # fmt: skip
HELPERS: Mapping[str, str] = {
    "floor_mod": "return (a % b + b) % b",
    "floor_div": "return (a - (a % b + b) % b) // b",
}


def call_node(name: str, *arguments: ast.expr, **named: ast.expr) -> ast.expr:
    """Return the tree of name(arguments...)."""
    function = ast.parse(name, mode="eval").body
    return ast.Call(function, list(arguments), [ast.keyword(key, value) for key, value in named.items()])


def as_dtype(node: ast.expr, dtype: str, **named: ast.expr) -> ast.expr:
    """Return the tree of node.to(dtype)."""
    keywords = [ast.keyword(key, value) for key, value in named.items()]
    return ast.Call(ast.Attribute(node, "to"), [dtype_node(dtype)], keywords)


def typed_constant(node: ast.expr, type: ExprType, dtype: str) -> ast.expr:
    """Return the tree of a value in a dtype, whether or not it is a number of Python's."""
    if type.constant is not None:
        return call_node("tl.full", sizes_node(()), node, dtype_node(dtype))
    return call_node("tl.cast", node, dtype_node(dtype)) if type.weak else as_dtype(node, dtype)


def dtype_node(dtype: str) -> ast.expr:
    """Return the tree of Triton's name of a dtype."""
    return ast.Attribute(ast.Name("tl"), TRITON[dtype])


def sizes_node(shape: Sequence[int]) -> ast.expr:
    """Return the tree of a tuple of ints."""
    return ast.Tuple([ast.Constant(n) for n in shape])


def powers_of_two(shape: Sequence[int]) -> None:
    """Raise MoecError for a shape that no tile of Triton has."""
    if any(n < 1 or n & (n - 1) for n in shape):
        raise MoecError(f"a tile of {list(shape)}: Triton's sizes are powers of two")


@dataclass
class Expressions:
    """Prints the expressions of one kernel.

    `nonnegative` says of each name whether it is never negative; `helpers` collects which of HELPERS are called.
    """

    nonnegative: dict[str, bool]
    helpers: set[str] = field(default_factory=set)

    def print(self, expr: Expr) -> ast.expr:
        """Return an expression as Triton's tree; MoecError where Triton cannot express it."""
        try:
            return self._visit(expr)
        except MoecError as error:
            raise MoecError(error.what, where=error.where or str(expr), todo=error.todo) from error

    def _visit(self, expr: Expr) -> ast.expr:
        if expr.type.constant is not None:
            return ast.parse(repr(expr.type.constant), mode="eval").body
        match expr:
            case Number():
                return call_node("float", ast.Constant("inf"))
            case Name(name):
                return ast.Name(name)
            case Binary(operator, left, right):
                return self._binary(operator, left, right, expr.type.dtype)
            case Unary("~", operand):
                return ast.UnaryOp(ast.Invert(), self._visit(operand))
            case Unary(_, operand):
                return _round_to_half(ast.UnaryOp(ast.USub(), self._widened(operand)), expr.type.dtype)
            case Call(function, values, parameters):
                powers_of_two(expr.type.shape)
                return self._call(function, values, parameters, expr.type)
            case Axes(value, kept):
                return ast.Subscript(self._visit(value), index_syntax(kept))
        raise AssertionError(f"{type(expr).__name__} is no node")

    # --- operators ---

    def _binary(self, operator: str, a: Expr, b: Expr, dtype: str) -> ast.expr:
        if operator in ("//", "%"):
            return self._division(operator, self._taken_as(a, dtype), a, b, dtype)
        if operator in COMPARISONS:
            return operator_node(operator, *self._wide(a, b, common_dtype(a.type, b.type)))
        if operator in ("+", "-", "*", "/"):
            return _round_to_half(operator_node(operator, *self._wide(a, b, dtype)), dtype)
        return operator_node(operator, self._taken_as(a, dtype), self._taken_as(b, dtype))

    def _wide(self, a: Expr, b: Expr, dtype: str) -> tuple[ast.expr, ast.expr]:
        """Return both operands as what they are computed in: f32 instead of a half."""
        used = "f32" if dtype in HALF else dtype
        return self._taken_as(a, used), self._taken_as(b, used)

    def _taken_as(self, expr: Expr, dtype: str) -> ast.expr:
        """Return an operand in a dtype; what Triton does by itself is not printed."""
        given = expr.type
        by_itself = given.weak or given.dtype == dtype or (dtype == "f32" and given.dtype == "i8")
        return self._visit(expr) if by_itself else as_dtype(self._visit(expr), dtype)

    def _widened(self, expr: Expr) -> ast.expr:
        return as_dtype(self._visit(expr), "f32") if expr.type.dtype in HALF else self._visit(expr)

    def _division(self, operator: str, dividend: ast.expr, a: Expr | None, b: Expr, dtype: str) -> ast.expr:
        """Return // or %, rounded down; `a` is None for a dividend that may be negative."""
        divisor, by = self._taken_as(b, dtype), b.type.constant
        if a is not None and self.is_nonnegative(a) and self.is_nonnegative(b):
            return operator_node(operator, dividend, divisor)
        if by is None or by <= 0:
            raise MoecError("// and % by what may be negative", todo="divide by a constant, or what cannot be below 0")
        number = int(by)
        if number & (number - 1) == 0:
            if operator == "%":
                return operator_node("&", dividend, ast.Constant(number - 1))
            return operator_node(">>", dividend, ast.Constant(number.bit_length() - 1)) if number > 1 else dividend
        name = "floor_mod" if operator == "%" else "floor_div"
        self.helpers.add(name)
        return call_node(name, dividend, divisor)

    def _ceiling(self, a: Expr, b: Expr, dtype: str) -> ast.expr:
        left = self._taken_as(a, dtype)
        if self.is_nonnegative(a) and self.is_nonnegative(b):
            return call_node("tl.cdiv", left, self._taken_as(b, dtype))
        by = int(b.type.constant or 0)
        if by <= 0:
            raise MoecError("cdiv by what may be negative", todo="divide by a constant")
        more = operator_node("+", left, ast.Constant(by - 1)) if by > 1 else left
        return self._division("//", more, None, b, dtype)

    # --- functions ---

    def _call(self, name: str, values: Sequence[Expr], parameters: Sequence[int | str], type: ExprType) -> ast.expr:
        match name, values:
            case "arange", []:
                return call_node("tl.arange", ast.Constant(0), ast.Constant(type.shape[0]))
            case "full", [value]:
                return call_node("tl.full", sizes_node(type.shape), self._visit(value), dtype_node(type.dtype))
            case "cast", [value]:
                return self._cast(value, type.dtype)
            case "bitcast", [value]:
                return as_dtype(self._visit(value), type.dtype, bitcast=ast.Constant(True))
            case "reshape", [value]:
                return call_node("tl.reshape", self._visit(value), sizes_node(type.shape))
            case "trans", [value]:
                count = len(type.shape)
                order = [*range(count - 2), count - 1, count - 2] if count > 2 else []
                return call_node("tl.trans", self._visit(value), *map(ast.Constant, order))
            case "where", [condition, a, b]:
                left, right = self._taken_as(a, type.dtype), self._taken_as(b, type.dtype)
                return call_node("tl.where", self._visit(condition), left, right)
            case (("minimum" | "maximum"), [a, b]):
                keep = {"propagate_nan": ast.parse("tl.PropagateNan.ALL", mode="eval").body}
                keep = keep if type.dtype in FLOATS else {}
                return _round_to_half(call_node(f"tl.{name}", *self._wide(a, b, type.dtype), **keep), type.dtype)
            case "cdiv", [a, b]:
                return self._ceiling(a, b, type.dtype)
            case "tanh", [value]:
                return _round_to_half(_tanh_node(self._widened(value)), type.dtype)
            case (("sum" | "cumsum"), [value]):
                node = self._taken_as(value, "i32") if value.type.dtype == "bool" else self._visit(value)
                return self._along(name, node, parameters, value)
            case (("max" | "min"), [value]):
                return _round_to_half(self._along(name, self._widened(value), parameters, value), type.dtype)
            case "argmax", [value]:
                return self._along(name, self._widened(value), parameters, value)
            case _, [value]:
                return _round_to_half(call_node(f"tl.{name}", self._widened(value)), type.dtype)
        raise AssertionError(f"no tree of {name}")

    def _along(self, name: str, node: ast.expr, parameters: Sequence[int | str], value: Expr) -> ast.expr:
        return call_node(f"tl.{name}", node, axis=ast.Constant(int(parameters[0]) % len(value.type.shape)))

    def _cast(self, value: Expr, dtype: str) -> ast.expr:
        given, node = value.type, self._visit(value)
        if given.weak:
            return typed_constant(node, given, dtype)
        if given.dtype == dtype:
            return node
        if dtype == "bool":
            return operator_node("!=", self._widened(value), ast.Constant(0))
        if dtype in EIGHT and given.dtype not in FLOATS:
            node = as_dtype(node, "f32")
        return as_dtype(node, dtype)

    # --- signs ---

    def is_nonnegative(self, expr: Expr) -> bool:
        """Return whether an expression is known to be never negative."""
        if expr.type.constant is not None:
            return expr.type.constant >= 0
        match expr:
            case Name(name):
                return self.nonnegative[name]
            case Binary(operator, left, right):
                return self._is_nonnegative_binary(operator, left, right, expr.type.dtype)
            case Call("cast", [value], _):
                given = value.type
                known = self.is_nonnegative(value) or expr.type.dtype in ("u8", "bool")
                return known and (given.weak or given.dtype == expr.type.dtype or expr.type.dtype != "i8")
            case Call("bitcast"):
                return expr.type.dtype == "u8"
            case Call("maximum", [a, b], _):
                return self.is_nonnegative(a) or self.is_nonnegative(b)
            case Call("cdiv" | "minimum", [a, b], _) | Call("where", [_, a, b], _):
                return self.is_nonnegative(a) and self.is_nonnegative(b)
            case Call("arange" | "argmax" | "abs"):
                return True
            case Call("full" | "reshape" | "trans" | "sum" | "cumsum" | "max" | "min", [value], _) | Axes(value):
                return self.is_nonnegative(value)
        return False

    def _is_nonnegative_binary(self, operator: str, a: Expr, b: Expr, dtype: str) -> bool:
        if operator in COMPARISONS:
            return True
        left, right = self.is_nonnegative(a), self.is_nonnegative(b)
        match operator:
            case "-":
                return False
            case "//" | "%":
                return (left and right) or operator == "%"
            case "<<" | ">>":
                return (left and operator == ">>") or dtype == "u8"
            case "&":
                return left or right
        return left and right


def _tanh_node(x: ast.expr) -> ast.expr:
    """Return 2 sigmoid(2 x) - 1."""
    twice = operator_node("*", ast.Constant(2.0), x)
    return operator_node("-", operator_node("*", ast.Constant(2.0), call_node("tl.sigmoid", twice)), ast.Constant(1.0))


def _round_to_half(node: ast.expr, dtype: str) -> ast.expr:
    """Return what was computed in f32 as the half that it has to be."""
    return as_dtype(node, dtype) if dtype in HALF else node
