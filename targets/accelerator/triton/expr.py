"""Prints expressions of the tile language as Triton's Python, with the meaning that tile/expr.py gives them in numpy.

An expression is typed first, by numpy's rules, with Python's own numbers taking the dtype of what they meet. Where
Triton would compute in another dtype, the cast is printed; where numpy leaves the language's dtypes (i32 with f32 is
f64) or the two differ in a way that no cast mends, the expression is refused. bf16 and f16 are computed in f32 and
rounded after each step, as numpy does it. // and % round down in numpy and to zero in Triton: they are printed as they
stand for numbers that cannot be negative, as shifts and masks for powers of two, and through a helper for others.

What is not kept: which of two NaN is meant, the maximum over numbers with NaN among them, numbers beyond the range of
f8e4m3 when cast to it (NaN in numpy, the largest in Triton), and the last bits of exp and its like.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from ....compiler.errors import MoecError
from ....compiler.ir.dtypes import DTYPES
from ..tile.expr import evaluate, parse

TRITON: Mapping[str, str] = {
    "f32": "float32", "bf16": "bfloat16", "f16": "float16", "f8e4m3": "float8e4nv", "f8e5m2": "float8e5",
    "i64": "int64", "i32": "int32", "i8": "int8", "u8": "uint8", "bool": "int1",
}  # fmt: skip
HELPERS: Mapping[str, str] = {
    "floor_mod": "return (a % b + b) % b",
    "floor_div": "return (a - (a % b + b) % b) // b",
}
SIGNED, NARROW, HALF, EIGHT = ("i32", "i64"), ("u8", "i8"), ("bf16", "f16"), ("f8e4m3", "f8e5m2")
FLOATS = ("f32", *HALF)


@dataclass(frozen=True)
class Kind:
    """The type of a value: a dtype, or "int" and "float" for Python's own numbers; a shape; whether it is never negative.

    `constant` is the number of a literal.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    natural: bool = False
    constant: float | None = None

    @property
    def weak(self) -> bool:
        """Whether it takes the dtype of what it meets."""
        return self.dtype in ("int", "float")


Printed: TypeAlias = "tuple[ast.expr, Kind]"


def call(name: str, *arguments: ast.expr, **named: ast.expr) -> ast.expr:
    """Return the tree of name(arguments...)."""
    function = ast.parse(name, mode="eval").body
    return ast.Call(function, list(arguments), [ast.keyword(key, value) for key, value in named.items()])


def as_dtype(node: ast.expr, dtype: str) -> ast.expr:
    """Return the tree of node.to(dtype)."""
    return ast.Call(ast.Attribute(node, "to"), [dtype_node(dtype)], [])


def strong(node: ast.expr, kind: Kind, dtype: str) -> ast.expr:
    """Return the tree of a value in a dtype, whether or not it is a number of Python's."""
    if kind.constant is not None:
        return call("tl.full", sizes_node(()), node, dtype_node(dtype))
    return call("tl.cast", node, dtype_node(dtype)) if kind.weak else as_dtype(node, dtype)


def dtype_node(dtype: str) -> ast.expr:
    """Return the tree of Triton's name of a dtype."""
    return ast.Attribute(ast.Name("tl"), TRITON[dtype])


def sizes_node(shape: Sequence[int]) -> ast.expr:
    """Return the tree of a tuple of ints."""
    return ast.Tuple([ast.Constant(n) for n in shape])


@dataclass
class Expressions:
    """Prints the expressions of one kernel; `helpers` collects which of HELPERS they call."""

    kinds: dict[str, Kind]
    helpers: set[str] = field(default_factory=set)

    def print(self, text: str | int) -> Printed:
        """Return an expression as Triton's tree, and what it is; MoecError where Triton cannot say it."""
        try:
            return self._visit(parse(str(text)))
        except MoecError as error:
            raise MoecError(error.what, where=error.where or str(text), todo=error.todo) from error

    def _visit(self, node: ast.expr) -> Printed:
        match node:
            case ast.Constant(bool()):
                raise MoecError("True and False are no numbers of the tile language for Triton", todo="compare instead")
            case ast.Constant(int() as value):
                return node, Kind("int", natural=value >= 0, constant=value)
            case ast.Constant(float() as value):
                return node, Kind("float", natural=value >= 0, constant=value)
            case ast.Name("inf"):
                return call("float", ast.Constant("inf")), Kind("f32")
            case ast.Name(name):
                if name not in self.kinds:
                    raise MoecError(f"{name} has no value here: what a loop or an if makes is gone behind it")
                return ast.Name(name), self.kinds[name]
            case ast.BinOp(left, operator, right):
                return self._binary(operator, self._visit(left), self._visit(right))
            case ast.UnaryOp(operator, operand):
                return self._unary(operator, self._visit(operand))
            case ast.Compare(left, operators, [right]):
                a, b, kind = self._promoted(self._visit(left), self._visit(right), wide=True)
                return ast.Compare(a, operators, [b]), Kind("bool", kind.shape, True)
            case ast.Call(ast.Name(name), arguments):
                return self._function(name, arguments)
            case ast.Subscript(value, ast.Tuple(axes) as index):
                return self._axes(self._visit(value), axes, index)
        raise AssertionError(f"{ast.unparse(node)} passed the check")

    # --- dtypes ---

    def _promoted(self, a: Printed, b: Printed, wide: bool = False) -> tuple[ast.expr, ast.expr, Kind]:
        """Return both as numpy would take them and the kind of the result; `wide`: halves are taken as f32."""
        dtype = _common(a[1], b[1])
        shape = broadcast(a[1].shape, b[1].shape)
        used = "f32" if wide and dtype in HALF else dtype
        nodes = [_taken_as(node, kind, used) for node, kind in (a, b)]
        return nodes[0], nodes[1], Kind(dtype, shape, a[1].natural and b[1].natural)

    def _binary(self, operator: ast.operator, a: Printed, b: Printed) -> Printed:
        if a[1].constant is not None and b[1].constant is not None:
            value = evaluate(ast.unparse(ast.BinOp(a[0], operator, b[0])), {})
            return self._visit(ast.parse(repr(value), mode="eval").body)
        match operator:
            case ast.Add() | ast.Sub() | ast.Mult():
                left, right, kind = self._promoted(a, b, wide=True)
                natural = kind.natural and not isinstance(operator, ast.Sub)
                kind = Kind(kind.dtype, kind.shape, natural)
                _no_bool(kind, operator)
                return _rounded(ast.BinOp(left, operator, right), kind)
            case ast.Div():
                left, right, kind = self._promoted(a, b, wide=True)
                if kind.dtype not in FLOATS:
                    raise MoecError(f"/ of {kind.dtype} is f64 in numpy", todo="cast to f32 first, or divide by //")
                return _rounded(ast.BinOp(left, operator, right), kind)
            case ast.FloorDiv() | ast.Mod():
                return self._division(operator, a, b)
            case ast.LShift() | ast.RShift():
                left, right, kind = self._promoted(a, b)
                _integers(kind, operator)
                natural = a[1].natural and isinstance(operator, ast.RShift)
                return ast.BinOp(left, operator, right), Kind(kind.dtype, kind.shape, natural or kind.dtype == "u8")
            case _:
                left, right, kind = self._promoted(a, b)
                if kind.dtype != "bool":
                    _integers(kind, operator)
                natural = kind.natural or (isinstance(operator, ast.BitAnd) and (a[1].natural or b[1].natural))
                return ast.BinOp(left, operator, right), Kind(kind.dtype, kind.shape, natural)

    def _division(self, operator: ast.operator, a: Printed, b: Printed) -> Printed:
        left, right, kind = self._promoted(a, b)
        _integers(kind, operator)
        modulo, by = isinstance(operator, ast.Mod), b[1].constant
        if a[1].natural and b[1].natural:
            return ast.BinOp(left, operator, right), Kind(kind.dtype, kind.shape, True)
        if by is None or by <= 0:
            raise MoecError("// and % by what may be negative", todo="divide by a constant, or what cannot be below 0")
        kind, number = Kind(kind.dtype, kind.shape, modulo), int(by)
        if number & (number - 1) == 0:
            simple = ast.BinOp(left, ast.BitAnd(), ast.Constant(number - 1)) if modulo else _shift(left, number)
            return simple, kind
        name = "floor_mod" if modulo else "floor_div"
        self.helpers.add(name)
        return call(name, left, right), kind

    def _unary(self, operator: ast.unaryop, a: Printed) -> Printed:
        node, kind = a
        if isinstance(operator, ast.Invert):
            if kind.dtype != "bool":
                _integers(kind, operator)
            return ast.UnaryOp(operator, node), Kind(kind.dtype, kind.shape)
        if kind.dtype in ("bool", "u8", *EIGHT):
            raise MoecError(f"- of {kind.dtype}", todo="cast it first")
        constant = None if kind.constant is None else -kind.constant
        return _rounded(ast.UnaryOp(operator, _widened(node, kind)), Kind(kind.dtype, kind.shape, False, constant))

    def _axes(self, value: Printed, axes: Sequence[ast.expr], index: ast.expr) -> Printed:
        node, kind = value
        sizes, shape = iter(kind.shape), []
        for axis in axes:
            size = next(sizes, 0) if isinstance(axis, ast.Slice) else 1
            if not size:
                raise MoecError(f"{ast.unparse(index)} names more axes than {list(kind.shape)} has")
            shape.append(size)
        if any(True for _ in sizes):
            raise MoecError(f"{ast.unparse(index)} names fewer axes than {list(kind.shape)} has")
        return ast.Subscript(node, index), Kind(kind.dtype, tuple(shape), kind.natural)

    # --- functions ---

    def _function(self, name: str, arguments: Sequence[ast.expr]) -> Printed:
        match name, arguments:
            case "arange", [size]:
                count = _constant(size)
                powers_of_two((count,))
                return call("tl.arange", ast.Constant(0), ast.Constant(count)), Kind("i32", (count,), True)
            case "full", [*sizes, value, ast.Constant(str() as dtype)]:
                shape = tuple(map(_constant, sizes))
                powers_of_two(shape)
                node, kind = self._visit(value)
                return call("tl.full", sizes_node(shape), node, dtype_node(dtype)), Kind(dtype, shape, kind.natural)
            case "cast", [value, ast.Constant(str() as dtype)]:
                return _cast(self._visit(value), dtype)
            case "bitcast", [value, ast.Constant(str() as dtype)]:
                node, kind = self._visit(value)
                if kind.weak or DTYPES[kind.dtype].bits != DTYPES[dtype].bits or "bool" in (dtype, kind.dtype):
                    raise MoecError(f"bitcast of {kind.dtype} to {dtype}: they have not the same bits")
                named = call("x", dtype_node(dtype), bitcast=ast.Constant(True))
                assert isinstance(named, ast.Call)
                named.func = ast.Attribute(node, "to")
                return named, Kind(dtype, kind.shape, dtype == "u8")
            case "reshape", [value, *sizes]:
                node, kind = self._visit(value)
                shape = tuple(map(_constant, sizes))
                if int(np.prod(shape)) != int(np.prod(kind.shape)):
                    raise MoecError(f"reshape of {list(kind.shape)} to {list(shape)}")
                return call("tl.reshape", node, sizes_node(shape)), Kind(kind.dtype, shape, kind.natural)
            case "trans", [value]:
                node, kind = self._visit(value)
                order = [*range(len(kind.shape) - 2), len(kind.shape) - 1, len(kind.shape) - 2]
                shape = tuple(kind.shape[i] for i in order)
                more = [ast.Constant(i) for i in order] if len(order) > 2 else []
                return call("tl.trans", node, *more), Kind(kind.dtype, shape, kind.natural)
        if name in _REDUCE:
            return self._reduced(name, arguments)
        return self._plain(name, [self._visit(a) for a in arguments])

    def _reduced(self, name: str, arguments: Sequence[ast.expr]) -> Printed:
        node, kind = self._visit(arguments[0])
        axis = _constant(arguments[1]) % max(len(kind.shape), 1)
        if not kind.shape:
            raise MoecError(f"{name} of a scalar")
        if name in ("sum", "cumsum"):
            if kind.dtype not in ("bool", "f32", *SIGNED):
                raise MoecError(f"{name} of {kind.dtype}", todo="cast it to f32 or i32 first")
            node, dtype = _taken_as(node, kind, "i32") if kind.dtype == "bool" else node, kind.dtype
            dtype = "i32" if dtype == "bool" else dtype
        elif kind.dtype in ("bool", *NARROW, *EIGHT):
            raise MoecError(f"{name} of {kind.dtype}", todo="cast it to f32 or i32 first")
        else:
            node, dtype = _widened(node, kind), "i32" if name == "argmax" else kind.dtype
        shape = kind.shape if name == "cumsum" else kind.shape[:axis] + kind.shape[axis + 1 :]
        found = Kind(dtype, shape, kind.natural or name == "argmax")
        node = call(f"tl.{name}", node, axis=ast.Constant(axis))
        return (node, found) if name == "argmax" else _rounded(node, found)

    def _plain(self, name: str, given: Sequence[Printed]) -> Printed:
        if all(isinstance(kind.constant, int) for _, kind in given) and name in ("cdiv", "minimum", "maximum"):
            return self._visit(
                ast.Constant(int(evaluate(f"{name}({', '.join(ast.unparse(n) for n, _ in given)})", {})))
            )
        match name, given:
            case "where", [condition, a, b]:
                left, right, kind = self._promoted(a, b)
                if condition[1].dtype != "bool" or kind.weak:
                    raise MoecError("where wants a bool and at least one number that has a dtype", todo="cast one")
                shape = broadcast(condition[1].shape, kind.shape)
                return call("tl.where", condition[0], left, right), Kind(kind.dtype, shape, kind.natural)
            case (("minimum" | "maximum"), [a, b]):
                left, right, kind = self._promoted(a, b, wide=True)
                _no_bool(kind, name)
                natural = kind.natural or (name == "maximum" and (a[1].natural or b[1].natural))
                keep = {"propagate_nan": ast.parse("tl.PropagateNan.ALL", mode="eval").body}
                node = call(f"tl.{name}", left, right, **(keep if kind.dtype in FLOATS else {}))
                return _rounded(node, Kind(kind.dtype, kind.shape, natural))
            case "cdiv", [a, b]:
                return self._ceiling(a, b)
            case "abs", [a]:
                return _rounded(call("tl.abs", _widened(*a)), Kind(a[1].dtype, a[1].shape, True))
        (argument,) = given
        if argument[1].dtype not in FLOATS:
            raise MoecError(f"{name} of {argument[1].dtype}", todo="cast it to f32 first")
        x = _widened(*argument)
        return _rounded(
            _tanh(x) if name == "tanh" else call(f"tl.{name}", x), Kind(argument[1].dtype, argument[1].shape)
        )

    def _ceiling(self, a: Printed, b: Printed) -> Printed:
        left, right, kind = self._promoted(a, b)
        _integers(kind, "cdiv")
        if a[1].natural and b[1].natural:
            return call("tl.cdiv", left, right), Kind(kind.dtype, kind.shape, True)
        by = int(b[1].constant or 0)
        if by <= 0:
            raise MoecError("cdiv by what may be negative", todo="divide by a constant")
        more = ast.BinOp(left, ast.Add(), ast.Constant(by - 1)) if by > 1 else left
        return self._division(ast.FloorDiv(), (more, Kind(kind.dtype, kind.shape)), b)


_REDUCE = ("sum", "max", "min", "argmax", "cumsum")


def _tanh(x: ast.expr) -> ast.expr:
    """Return 2 sigmoid(2 x) - 1."""
    twice = ast.BinOp(ast.Constant(2.0), ast.Mult(), x)
    return ast.BinOp(ast.BinOp(ast.Constant(2.0), ast.Mult(), call("tl.sigmoid", twice)), ast.Sub(), ast.Constant(1.0))


def broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of two together; Triton only broadcasts tiles of as many axes."""
    if a and b and len(a) != len(b):
        raise MoecError(f"{list(a)} with {list(b)}: Triton wants as many axes", todo="add axes with [:, None]")
    try:
        return np.broadcast_shapes(a, b)
    except ValueError as error:
        raise MoecError(f"{list(a)} with {list(b)}") from error


def powers_of_two(shape: Sequence[int]) -> None:
    """Raise MoecError for a shape that no tile of Triton has."""
    if any(n < 1 or n & (n - 1) for n in shape):
        raise MoecError(f"a tile of {list(shape)}: Triton's sizes are powers of two")


def _common(a: Kind, b: Kind) -> str:
    """Return the dtype that numpy gives two together; MoecError where the language has none for it."""
    if a.weak and b.weak:
        if a.dtype == b.dtype == "int" or (a.constant is not None and b.constant is not None):
            return "float" if "float" in (a.dtype, b.dtype) else "int"
        raise MoecError("a number of Python's that is no int, with one that is only known at launch")
    if a.weak or b.weak:
        weak, strong = (a, b) if a.weak else (b, a)
        fits = strong.dtype in FLOATS or (weak.dtype == "int" and strong.dtype in (*SIGNED, *NARROW))
        if weak.constant is not None and strong.dtype in (*SIGNED, *NARROW):
            range_ = np.iinfo(DTYPES[strong.dtype].numpy)
            fits = fits and range_.min <= weak.constant <= range_.max
        if fits and (weak.constant is not None or strong.dtype not in (*NARROW, *HALF)):
            return strong.dtype
        raise MoecError(f"{strong.dtype} with {weak.dtype}", todo="cast one of the two")
    if a.dtype == b.dtype and a.dtype not in EIGHT:
        return a.dtype
    pair = {a.dtype, b.dtype}
    if "bool" in pair and len(pair & {"f32", *SIGNED}) == 1:
        return next(iter(pair - {"bool"}))
    if pair <= {*SIGNED, *NARROW} and pair != set(NARROW):
        return "i64" if "i64" in pair else "i32"
    if "f32" in pair and pair <= {"f32", *HALF, *NARROW}:
        return "f32"
    raise MoecError(f"{a.dtype} with {b.dtype}: numpy takes them as neither", todo="cast one of the two")


def _taken_as(node: ast.expr, kind: Kind, dtype: str) -> ast.expr:
    """Return a value as an operand of this dtype; what Triton does by itself is not printed."""
    by_itself = kind.weak or kind.dtype == dtype or (dtype == "f32" and kind.dtype == "i8")
    return node if by_itself else as_dtype(node, dtype)


def _widened(node: ast.expr, kind: Kind) -> ast.expr:
    return as_dtype(node, "f32") if kind.dtype in HALF else node


def _rounded(node: ast.expr, kind: Kind) -> Printed:
    return (as_dtype(node, kind.dtype) if kind.dtype in HALF else node), kind


def _shift(node: ast.expr, by: int) -> ast.expr:
    return ast.BinOp(node, ast.RShift(), ast.Constant(by.bit_length() - 1)) if by > 1 else node


def _cast(value: Printed, dtype: str) -> Printed:
    node, kind = value
    natural = kind.natural or dtype in ("u8", "bool")
    if kind.weak:
        return strong(node, kind, dtype), Kind(dtype, (), natural)
    if dtype == "bool" and kind.dtype != "bool":
        return ast.Compare(_widened(node, kind), [ast.NotEq()], [ast.Constant(0)]), Kind("bool", kind.shape, True)
    if kind.dtype == dtype:
        return value
    if dtype in EIGHT and kind.dtype not in FLOATS:
        node = as_dtype(node, "f32")
    return as_dtype(node, dtype), Kind(dtype, kind.shape, natural and dtype != "i8")


def _constant(node: ast.expr) -> int:
    value = evaluate(ast.unparse(node), {})
    if not isinstance(value, int):
        raise MoecError(f"{ast.unparse(node)} is no int")
    return value


def _no_bool(kind: Kind, what: object) -> None:
    if kind.dtype == "bool":
        raise MoecError(f"{_sign(what)} of bools", todo="use & and |, or cast them to i32")


def _integers(kind: Kind, what: object) -> None:
    if kind.dtype not in ("int", *SIGNED, *NARROW):
        raise MoecError(f"{_sign(what)} of {kind.dtype}", todo="it is for integers")


def _sign(what: object) -> str:
    return what if isinstance(what, str) else type(what).__name__
