"""Types in the tile language: dtypes, what an expression's type is, and the type that two operands have together.

The rules are numpy's, with Python's own numbers taking the dtype of what they meet. Where numpy leaves the language's
dtypes (i32 with f32 is f64), or broadcasts tiles of different numbers of axes, which Triton does not, there is no type.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ....compiler.errors import MoecError
from ....compiler.ir.dtypes import DTYPES

TILE_DTYPES = ("f32", "bf16", "f16", "f8e4m3", "f8e5m2", "f8e4m3fnuz", "i64", "i32", "i8", "u8", "bool")
SIGNED, NARROW, HALF = ("i32", "i64"), ("u8", "i8"), ("bf16", "f16")
EIGHT = ("f8e4m3", "f8e5m2", "f8e4m3fnuz")
FLOATS = ("f32", *HALF)
INTEGERS = ("int", *SIGNED, *NARROW)
INDICES = ("int", *SIGNED)


class ExprType(NamedTuple):
    """The type of an expression: a dtype, or "int" and "float" for Python's own numbers, and a shape.

    `constant` is the number of an expression of literals. (A tuple, because types are keys of what is read once.)
    """

    dtype: str
    shape: tuple[int, ...] = ()
    constant: int | float | None = None

    @property
    def weak(self) -> bool:
        """Whether it takes the dtype of what it meets."""
        return self.dtype in ("int", "float")

    def __str__(self) -> str:
        """Return dtype and shape as messages have them."""
        return f"{self.dtype}{list(self.shape)}"


INT = ExprType("int")


def constant_type(value: int | float) -> ExprType:
    """Return the type of a literal."""
    return ExprType("float" if isinstance(value, float) else "int", constant=value)


def broadcast_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of two operands together; MoecError where they have different numbers of axes, or sizes."""
    if a == b or not b:
        return a
    if not a:
        return b
    if len(a) != len(b):
        raise MoecError(f"{list(a)} with {list(b)}: both want as many axes", todo="add axes with [:, None]")
    try:
        return np.broadcast_shapes(a, b)
    except ValueError as error:
        raise MoecError(f"{list(a)} with {list(b)}") from error


def common_dtype(a: ExprType, b: ExprType) -> str:
    """Return the dtype that numpy gives two operands together; MoecError where the language has none for it."""
    if a.weak and b.weak:
        if a.dtype == b.dtype == "int" or (a.constant is not None and b.constant is not None):
            return "float" if "float" in (a.dtype, b.dtype) else "int"
        raise MoecError("a number of Python's that is no int, with one that is only known at launch")
    if a.weak or b.weak:
        weak, strong = (a, b) if a.weak else (b, a)
        if _fits_dtype(weak, strong.dtype):
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


def _fits_dtype(weak: ExprType, dtype: str) -> bool:
    """Return whether one of Python's numbers takes a dtype, at any value that it may have."""
    if weak.constant is None:
        return dtype == "f32" or (weak.dtype == "int" and dtype in SIGNED)
    if dtype in FLOATS:
        return True
    return weak.dtype == "int" and dtype in (*SIGNED, *NARROW) and in_range(weak.constant, dtype)


def in_range(value: int | float, dtype: str) -> bool:
    """Return whether an integer dtype has a number."""
    range_ = np.iinfo(DTYPES[dtype].numpy)
    return bool(range_.min <= value <= range_.max)


def promoted_type(a: ExprType, b: ExprType) -> ExprType:
    """Return the type of two operands together."""
    return ExprType(common_dtype(a, b), broadcast_shapes(a.shape, b.shape))


def check_integers(type: ExprType, what: str) -> None:
    """Raise MoecError for an operand that is no integer."""
    if type.dtype not in INTEGERS:
        raise MoecError(f"{what} of {type.dtype}", todo="it is for integers")


def check_no_bool(type: ExprType, what: str) -> None:
    """Raise MoecError for an operand that is a bool."""
    if type.dtype == "bool":
        raise MoecError(f"{what} of bools", todo="use & and |, or cast them to i32")
