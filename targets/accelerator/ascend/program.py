"""Rewrites tile programs to what triton-ascend lowers well; what they compute stays the same.

FP8 tensors are loaded as bytes and decoded by arithmetic, except for what a matmul takes as it is: before the Ascend
950 there are no such types, and for it the adapter has neither constants of them nor a conversion to f32.
Weights in fractals are loaded as tiles of three axes, block by block: by the quotients and remainders of their rows and
columns the adapter would load number by number. Where rows are gathered it reads those too that are masked, and throws
them away: their indices are kept inside the tensor. Of a row it reads the whole tile: after a tensor's end there must be
room for a tile's columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import and_

from ....compiler.errors import MoecError
from ..tile.expr import COMPARISONS, Axes, Binary, Call, Expr, Name, Number, add_axes, make_binary, make_call
from ..tile.scope import Scope
from ..tile.tiles import Argument, Dot, For, If, Let, Load, Move, Program, Statement, Store, walk_statements

FP8_MANTISSA_AND_BIAS = {"f8e4m3": (3, 7), "f8e5m2": (2, 15)}  # bits of the mantissa, bias


def for_ascend(program: Program, newer: bool) -> Program:
    """Return the program for an Ascend 950 (`newer`) or one before it.

    Tiles must begin at a multiple of a fractal's width. NaN and infinity in FP8 become finite values before the 950. MoecError
    for a program that computes FP8 values there.
    """
    rewriter = _Rewriter(program, newer)
    scope = rewriter.scope
    for a in program.arguments:
        scope.tensor(rewriter.argument(a))
    for name in (*program.scalars, *(name for name, _ in program.grid)):
        scope.integer(name)
    body = rewriter.body(program.body)
    return replace(program, arguments=tuple(scope.arguments.values()), buffers=scope.buffers, body=body)


@dataclass(frozen=True)
class _Blocks:
    """A load of `rows` x `width` values of a weight in fractals, by its indices into [columns, rows, across].

    In that shape, of the same bytes, all fractals of one column are one block.
    """

    at: tuple[Expr, ...]
    mask: Expr | None
    width: int
    rows: int
    across: int  # columns of a fractal


@dataclass
class _Rewriter:
    program: Program
    newer: bool
    scope: Scope = field(init=False)  # of the program that is made
    known: dict[str, str] = field(default_factory=dict)  # how the values of a name follow each other, see `steps`
    ranges: frozenset[str] = frozenset()  # names of masks that `is_range` is true of
    kept: frozenset[str] = frozenset()  # tiles that stay FP8: those that are multiplied, and those that are computed
    fractal: frozenset[str] = frozenset()  # weights of which each load is one of blocks
    made: list[Statement] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scope = Scope(self.program.name, buffers=dict(self.program.buffers))
        computed = {s.name for s in walk_statements(self.program.body) if isinstance(s, Let)}
        self.kept = _multiplied_tiles(self.program) | computed if self.newer else frozenset()
        for name, buffer in self.program.buffers.items():
            if buffer.dtype in FP8_MANTISSA_AND_BIAS and name not in self.kept:
                self.scope.buffers[name] = replace(buffer, dtype="f32")
        loads: dict[str, list[bool]] = {}
        for statement in walk_statements(self.program.body):
            if isinstance(statement, (Load, Store)):
                loads.setdefault(statement.tensor, []).append(self.blocks(statement) is not None)
        self.fractal = frozenset(name for name, found in loads.items() if all(found))

    def argument(self, a: Argument) -> Argument:
        """Return a tensor as the rewritten program takes it: the same bytes."""
        if a.name in self.fractal:
            *lead, columns, rows, high, across = a.shape
            assert isinstance(rows, int) and isinstance(high, int)
            a = replace(a, shape=(*lead, columns, rows * high, across))
        return replace(a, dtype="u8") if a.dtype in FP8_MANTISSA_AND_BIAS else a

    def body(self, body: Sequence[Statement]) -> tuple[Statement, ...]:
        outer, self.made = self.made, []
        for statement in body:
            self.rewrite(statement)
        made, self.made = tuple(self.made), outer
        return made

    def add(self, statement: Let | Load | Store | Move | Dot) -> None:
        self.made.append(self.scope.add(statement))

    def rewrite(self, statement: Statement) -> None:
        value = self.scope.value
        match statement:
            case For(var, start, stop, step, inner):
                with self.scope.loop(var, value(start), value(stop), value(step)):
                    body = self.body(inner)
                self.made.append(replace(statement, start=value(start), stop=value(stop), step=value(step), body=body))
            case If(condition, inner):
                with self.scope.when(value(condition)):
                    body = self.body(inner)
                self.made.append(replace(statement, condition=value(condition), body=body))
            case Load(at=at, mask=mask):
                self.load(replace(statement, at=tuple(map(value, at)), mask=self.scope.mask(mask)))
            case Store(tensor, at, stored, mask):
                stored, dtype = value(stored), self.program.argument(tensor).dtype
                if dtype in FP8_MANTISSA_AND_BIAS:
                    self.check(make_call("cast", 0.0, parameters=(dtype,)))
                    stored = make_call("bitcast", stored, parameters=("u8",))
                self.add(replace(statement, at=tuple(map(value, at)), value=stored, mask=self.scope.mask(mask)))
            case Let(name, given):
                given = value(given)
                self.check(given)
                self.known[name] = self.steps(given)
                self.ranges = self.ranges | {name} if self.is_range(given) else self.ranges - {name}
                self.add(Let(name, given))
            case Dot(scales=scales) if scales:
                self.add(self.widened(statement, scales))
            case Move() | Dot():
                self.add(statement)

    def widened(self, dot: Dot, scales: tuple[str, str]) -> Dot:
        """Return a product of codes under scales as one of bf16, which has their products exactly: the adapter has no other."""
        found = []
        for name, scale in zip((dot.a, dot.b), scales, strict=True):
            codes, by = self.scope.value(name), self.scope.value(scale)
            rows, groups = self.scope.buffers[scale].shape
            if self.program.buffers[name].dtype == "u8":
                codes = _decode_pairs(codes, rows, self.scope.buffers[name].shape[1])
            power = make_call("bitcast", make_call("cast", by, parameters=("i32",)) << 23, parameters=("f32",))
            depth = codes.type.shape[1]
            parted = make_call("reshape", codes, parameters=(rows, groups, depth // groups))
            value = make_call("reshape", parted * add_axes(power, (True, True, False)), parameters=(rows, depth))
            wide = self.beside(name, "wide", "bf16", (rows, depth))
            self.add(Let(wide, make_call("cast", value, parameters=("bf16",))))
            found.append(wide)
        a, b = found
        return replace(dot, a=a, b=b, scales=None)

    def check(self, value: Expr) -> None:
        """Raise MoecError for an expression that makes FP8 values where there are none."""
        if not self.newer and _makes_eight(value):
            what = f"{self.program.name}: {value} is of a type that an Ascend before the 950 has not"
            raise MoecError(what, todo="keep these numbers in bf16, or in int8")

    def load(self, statement: Load) -> None:
        reached = [self.steps(index) for index in statement.at]
        loose = statement.mask is not None and not self.is_range(statement.mask)
        if statement.mask and (loose or "any" in reached) and statement.tensor not in self.fractal:
            statement = replace(statement, at=self.inside(statement, reached, loose))
        self.known[statement.name] = "none" if set(reached) <= {"none"} else "any"
        name, dtype = statement.name, self.program.argument(statement.tensor).dtype
        if dtype not in FP8_MANTISSA_AND_BIAS:
            self.in_blocks(statement)
            return
        assert statement.other == 0
        bits = self.beside(name, "bits", "u8")
        self.in_blocks(replace(statement, name=bits))
        codes = self.scope.value(bits)
        kept = name in self.kept
        self.add(
            Let(
                name,
                make_call("bitcast", codes, parameters=(dtype,))
                if kept
                else _decode_fp8(codes, *FP8_MANTISSA_AND_BIAS[dtype]),
            )
        )

    def steps(self, expr: Expr) -> str:
        """Return how values follow each other: `none` for a scalar, `even` by the same step, or `any`."""
        match expr:
            case Name(name):
                return self.known.get(name, "none")  # those that are not known are scalars of the launch and the grid
            case Call("arange"):
                return "even"
            case Axes(value):
                return self.steps(value)
            case Call("sum" | "max" | "min" | "argmax", [value], _):
                return "any" if value.names & self.scope.buffers.keys() else "none"
        parts = [self.steps(part) for part in expr.operands]
        if all(part == "none" for part in parts):
            return "none"
        match expr:
            case Binary("+" | "-") if "any" not in parts:
                return "even"
            case Binary("*") if "any" not in parts and "none" in parts:
                return "even"
        return "any"

    def is_range(self, mask: Expr) -> bool:
        """Return whether the adapter reads only what a mask allows: values of even steps are compared with scalars."""
        match mask:
            case Name(name):
                return name in self.ranges or self.known.get(name, "none") == "none"
            case Axes(value):
                return self.is_range(value)
            case Binary("&", left, right):
                return self.is_range(left) and self.is_range(right)
            case Binary(operator, left, right) if operator in COMPARISONS:
                return "any" not in (self.steps(left), self.steps(right))
        return self.steps(mask) == "none"

    def inside(self, statement: Load, reached: Sequence[str], loose: bool) -> tuple[Expr, ...]:
        """Return the indices of a load, those of no even step kept inside the tensor; `loose`: all before the last."""
        found = []
        shape = self.program.argument(statement.tensor).shape
        for axis, (index, size, how) in enumerate(zip(statement.at, shape, reached, strict=True)):
            kept = how == "any" or (loose and how == "even" and axis < len(shape) - 1)
            found.append(_clamped_index(index, size) if kept else index)
        return tuple(found)

    def in_blocks(self, statement: Load) -> None:
        blocks = self.blocks(statement) if statement.tensor in self.fractal else None
        if blocks is None:
            self.add(statement)
            return
        name = statement.name
        shape = (blocks.width // blocks.across, blocks.rows, blocks.across)
        loaded = self.beside(name, "blocks", self.scope.buffers[name].dtype, shape)
        self.add(replace(statement, name=loaded, at=(*statement.at[:-4], *blocks.at), mask=blocks.mask))
        columns = make_call(
            "reshape", make_call("trans", self.scope.value(loaded)), parameters=(blocks.width, blocks.rows)
        )
        self.add(Let(name, make_call("trans", columns)))

    def beside(self, name: str, label: str, dtype: str, shape: tuple[int, ...] = ()) -> str:
        """Return the name of a value that another is made of; it lies where that one does."""
        new, buffers = f"{name}_{label}", self.scope.buffers
        if name in buffers:
            buffer = replace(buffers[name], dtype=dtype, shape=shape or buffers[name].shape)
            assert buffers.get(new, buffer) == buffer, f"{new} has two buffers"
            buffers[new] = buffer
        return new

    def blocks(self, statement: Load | Store) -> _Blocks | None:
        """Return what a load of a weight in fractals reads; None for anything else."""
        shape = self.program.argument(statement.tensor).shape
        if isinstance(statement, Store) or len(shape) < 4 or len(statement.at) != len(shape):
            return None
        match statement.at[-4:]:
            case [
                Binary("//", column, Number(int(across))),
                Binary("//", row, Number(int(high))),
                Binary("%", row_again, Number(high_again)),
                Binary("%", column_again, Number(across_again)),
            ] if (high, across) == (high_again, across_again) == shape[-2:]:
                if column != column_again or row != row_again:
                    return None
            case _:
                return None
        match column, row:
            case (
                Axes(Binary("+", start, Call("arange", [], [int(width)]))),
                Axes(rows),
            ) if width % across == 0 and statement.name in self.scope.buffers:
                every = make_call("arange", parameters=(width // across,))
                block = add_axes(start // across + every, (True, False, False))
                masks = _mask_terms(statement.mask, column, make_binary("<", block, shape[-4]))
            case _:
                return None
        if masks is None:
            return None
        within = add_axes(make_call("arange", parameters=(across,)), (False, False, True))
        at = (block, add_axes(rows, (False, True, False)), within)
        return _Blocks(
            at, reduce(and_, masks) if masks else None, width, self.scope.buffers[statement.name].shape[0], across
        )


def _multiplied_tiles(program: Program) -> frozenset[str]:
    """Return the tiles that the matrix unit takes as they are loaded."""
    found = {n for s in walk_statements(program.body) if isinstance(s, Dot) and not s.scales for n in (s.a, s.b)}
    for statement in reversed(list(walk_statements(program.body))):
        if isinstance(statement, Move) and statement.name in found:
            found.add(statement.value)
    return frozenset(found)


def _makes_eight(value: Expr) -> bool:
    """Return whether an expression makes FP8 values anywhere in it."""
    own = isinstance(value, Call) and any(p in FP8_MANTISSA_AND_BIAS for p in value.parameters)
    return own or any(map(_makes_eight, value.operands))


def _clamped_index(index: Expr, size: Expr | int) -> Expr:
    """Return an index, kept inside an axis; axes that it adds are added last."""
    if isinstance(index, Axes):
        return add_axes(_clamped_index(index.value, size), index.kept)
    return make_call("maximum", make_call("minimum", index, make_binary("-", size, 1)), 0)


def _mask_terms(mask: Expr | None, column: Expr, whole: Expr) -> list[Expr] | None:
    """Return the terms of a mask [rows, columns] for a load in blocks; None if one is neither of rows nor of columns.

    `whole` says which blocks there are: what follows the last column in its fractal is packed as zeros.
    """
    terms: list[Expr] = []
    rest = [mask] if mask else []
    while rest:
        match rest.pop():
            case Binary("&", left, right):
                rest += [right, left]
            case Axes(value, (True, False)):
                terms.append(add_axes(value, (False, True, False)))
            case Binary("<", value, Number(int())) if value == column:
                terms.append(whole)
            case _:
                return None
    return terms


def _decode_pairs(codes: Expr, rows: int, width: int) -> Expr:
    """Return E2M1 numbers as f32, two from each byte of codes, by the definition of the format."""
    shift = add_axes(make_call("arange", parameters=(2,)) * 4, (False, False, True))
    apart = make_call("cast", codes, parameters=("i32",))
    code = make_call("reshape", add_axes(apart, (True, True, False)) >> shift & 15, parameters=(rows, 2 * width))
    low, exponent = code & 1, code >> 1 & 3
    normal = make_call("bitcast", (exponent + 126) << 23 | low << 22, parameters=("f32",))
    below = make_call("cast", low, parameters=("f32",)) * 0.5
    sign = make_call("cast", make_binary("-", 1, (code >> 3) * 2), parameters=("f32",))
    return make_call("where", make_binary("==", exponent, 0), below, normal) * sign


def _decode_fp8(bits: Expr, mantissa: int, bias: int) -> Expr:
    """Return FP8 values as f32 from their bytes, by the definition of the format: sign, exponent, mantissa."""
    code = make_call("cast", bits, parameters=("i32",))
    low, scale = code & (1 << mantissa) - 1, 2.0 ** (1 - bias - mantissa)
    exponent = code >> mantissa & (1 << 7 - mantissa) - 1
    normal = make_call("bitcast", (exponent + (127 - bias)) << 23 | low << 23 - mantissa, parameters=("f32",))
    small = make_call("cast", low, parameters=("f32",)) * scale
    sign = make_call("cast", make_binary("-", 1, (code >> 7) * 2), parameters=("f32",))
    return make_call("where", make_binary("==", exponent, 0), small, normal) * sign
