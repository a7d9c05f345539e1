"""Checks a tile program while it is built: names, types and shapes of every statement, ranges of what is constant.

The builder, the reader of JSON and what rewrites programs add their statements to a `Scope`; so a program that exists
is one in which each name has a value of one type, each tile what its buffer states, and each matmul operands that fit.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from ....compiler.errors import MoecError
from .expr import Expr, shape_of, with_types
from .parse import parse_expr
from .tiles import Argument, Buffer, Dot, Let, Load, Move, Store
from .types import EIGHT, FLOATS, INDICES, INT, TILE_DTYPES, ExprType, broadcast_shapes

MULTIPLIED = (*FLOATS, *EIGHT)  # dtypes that are multiplied as matrices

SCALED_GROUPS = {"u8": 32, "f8e4m3": 16}  # dtype of scales -> codes under one of them

S = TypeVar("S", bound="Let | Load | Store | Move | Dot")


@dataclass
class Scope:
    """The names that have a value at one place of a program, with their types; `program` is its name, for messages."""

    program: str
    arguments: dict[str, Argument] = field(default_factory=dict)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    types: dict[str, ExprType] = field(default_factory=dict)

    def integer(self, name: str) -> str:
        """Declare a name that is an int: a scalar of the launch or a variable of the grid."""
        self._check_name(name)
        self.types[name] = INT
        return name

    def tensor(self, argument: Argument) -> None:
        """Declare a tensor; MoecError for a dtype that the language has not."""
        if argument.dtype not in TILE_DTYPES:
            raise self._error(f"{argument.name} is {argument.dtype}", todo=f"dtypes are {', '.join(TILE_DTYPES)}")
        self.arguments[argument.name] = argument

    def value(self, given: str | int | Expr) -> Expr:
        """Return what is written in text, or an expression of another scope, as an expression over the names here."""
        try:
            if isinstance(given, Expr):
                return with_types(given, self.types)
            return parse_expr(str(given), self.types)
        except MoecError as error:
            raise self._error(error.what, error.where, error.todo) from error

    def size(self, given: str | int) -> Expr | int:
        """Return a size: an int as it is, a text as an expression."""
        return given if isinstance(given, int) else self.value(given)

    def mask(self, given: str | Expr | None) -> Expr | None:
        """Return the mask of a load or store; None where there is none."""
        return self.value(given) if given else None

    def add(self, statement: S) -> S:
        """Check a statement that follows the ones before, and give its name the type that it has from here on."""
        try:
            match statement:
                case Let(name, value):
                    self._bind(name, value.type)
                case Load(name):
                    self._bind(name, self._loaded(statement))
                case Move(name, value):
                    self._bind(name, self._known(value))
                case Store():
                    self._check_store(statement)
                case Dot():
                    self._check_dot(statement)
        except MoecError as error:
            raise self._error(error.what, error.where, error.todo) from error
        return statement

    @contextmanager
    def loop(self, var: str, start: Expr, stop: Expr, step: Expr) -> Iterator[None]:
        """Check the bounds of a loop, and what is added inside."""
        if any(bound.type.shape or bound.type.dtype not in INDICES for bound in (start, stop, step)):
            raise self._error(f"the bounds of {var} are no ints", f"{start}, {stop}, {step}")
        if not step.type.constant or step.type.constant < 0:
            raise self._error(f"the step of {var} is no constant above 0", str(step))
        if var in self.types:
            raise self._error(f"{var} is a name before its loop", todo="name it otherwise")
        with self._inside():
            self.integer(var)
            yield

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        """Check the condition of an `If`, and what is added inside."""
        if condition.type.shape or condition.type.dtype not in ("bool", *INDICES):
            raise self._error(f"a condition that is {condition.type}", str(condition), "it is a bool or an int")
        with self._inside():
            yield

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Forget the names that are made inside; the others must keep their types there."""
        outer = dict(self.types)
        yield
        inner, self.types = self.types, outer
        for name, before in outer.items():
            if inner[name] != before:
                raise self._error(
                    f"{name} is {before} before and {inner[name]} in a body",
                    todo="a name that a loop or an if changes has one type: cast it",
                )

    # --- statements ---

    def _bind(self, name: str, type: ExprType) -> None:
        if name not in self.types:
            self._check_name(name)
        buffer = self.buffers.get(name)
        if buffer is not None and (buffer.dtype, buffer.shape) != (type.dtype, type.shape):
            raise MoecError(f"{name} is stated as {buffer.dtype}{list(buffer.shape)} and gets {type}")
        if buffer is None and len(type.shape) > 1:
            raise MoecError(f"{name} is a tile of shape {list(type.shape)} without a buffer")
        self.types[name] = type if type.constant is None else ExprType(type.dtype)

    def _loaded(self, load: Load) -> ExprType:
        dtype = self._argument(load.tensor).dtype
        if load.other and dtype not in ("bool", *FLOATS) and not float(load.other).is_integer():
            raise MoecError(f"{load.other} instead of what is masked, in {load.tensor} of {dtype}")
        return ExprType(dtype, self._cells(load.tensor, load.at, load.mask))

    def _cells(self, tensor: str, at: Sequence[Expr], mask: Expr | None) -> tuple[int, ...]:
        """Return the shape of what a load or store reaches; MoecError for indices and masks that are none."""
        sizes = self._argument(tensor).shape
        if len(at) != len(sizes):
            raise MoecError(f"{tensor} has {len(sizes)} axes, {len(at)} indices were given")
        for index, size in zip(at, sizes, strict=True):
            if index.type.dtype not in INDICES:
                raise MoecError(f"an index that is {index.type.dtype}", where=str(index))
            constant = index.type.constant
            if constant is not None and (constant < 0 or (isinstance(size, int) and constant >= size)):
                raise MoecError(f"index {constant} of an axis of {size} of {tensor}")
        if mask is not None and mask.type.dtype != "bool":
            raise MoecError(f"a mask that is {mask.type.dtype}", where=str(mask))
        return shape_of(*at, mask)

    def _check_store(self, store: Store) -> None:
        shape = self._cells(store.tensor, store.at, store.mask)
        if broadcast_shapes(shape, store.value.type.shape) != shape:
            what = f"a value of {list(store.value.type.shape)} stored to {list(shape)} cells"
            raise MoecError(what, where=str(store.value))

    def _check_dot(self, dot: Dot) -> None:
        a, b, acc = (self._known(name) for name in (dot.a, dot.b, dot.acc))
        if dot.scales:
            self._check_scaled(dot, a, b, acc)
            return
        b_shape = b.shape[::-1] if dot.transpose else b.shape
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b_shape[0] or acc.shape != (a.shape[0], b_shape[1]):
            raise MoecError(f"{dot.acc}{list(acc.shape)} += {list(a.shape)} times {list(b_shape)}")
        if a.dtype != b.dtype or acc.dtype != "f32" or a.dtype not in MULTIPLIED:
            what = f"{dot.acc} ({acc.dtype}) += {a.dtype} times {b.dtype}"
            raise MoecError(what, todo="a matmul adds floats of one dtype in f32")
        if dot.bits and not (dot.bits in EIGHT and a.dtype in EIGHT):
            raise MoecError(f"the bits of {a.dtype} are not those of {dot.bits}")

    def _check_scaled(self, dot: Dot, a: ExprType, b: ExprType, acc: ExprType) -> None:
        assert dot.scales
        scales = [self._known(name) for name in dot.scales]
        codes = [t.shape[-1] * (2 if t.dtype == "u8" else 1) for t in (a, b)]
        group = SCALED_GROUPS.get(scales[0].dtype, 1)
        fits = acc == ExprType("f32", (a.shape[0], b.shape[0])) and dot.transpose and codes[0] == codes[1]
        if not fits or any(
            len(t.shape) != 2
            or t.dtype not in ("f8e4m3", "u8")
            or s != ExprType(scales[0].dtype, (t.shape[0], n // group))
            for t, s, n in zip((a, b), scales, codes, strict=True)
        ):
            what = f"{dot.acc} ({acc}) += {a} under {scales[0]} times {b} under {scales[1]}"
            raise MoecError(what, todo="codes are f8e4m3, or two in a u8, under u8 for 32 of them or f8e4m3 for 16")

    # --- names ---

    def _argument(self, tensor: str) -> Argument:
        if tensor not in self.arguments:
            raise MoecError(f"{tensor} is no tensor of it", todo=f"it has {', '.join(self.arguments)}")
        return self.arguments[tensor]

    def _known(self, name: str) -> ExprType:
        if name not in self.types:
            raise MoecError(f"{name} has no value here")
        return self.types[name]

    def _check_name(self, name: str) -> None:
        if not str(name).isidentifier() or keyword.iskeyword(name) or name == "inf":
            raise self._error(f"{name} is no name for a value")

    def _error(self, what: str, where: str = "", todo: str = "") -> MoecError:
        whole = where if where.startswith(self.program) else f"{self.program}, {where}" if where else self.program
        return MoecError(what, where=whole, todo=todo)
