"""Rewrites tile programs to what triton-ascend lowers well; what they compute stays the same.

FP8 tensors are loaded as bytes and decoded by arithmetic, except for what a product takes as it is: before the Ascend
950 there are no such types, and for it the adapter has neither constants of them nor a conversion to f32.
Weights in fractals are loaded as tiles of three axes, block by block: by the quotients and remainders of their rows and
columns the adapter would load number by number. Where rows are gathered it reads those too that are masked, and throws
them away: their indices are kept inside the tensor. Of a row it reads the whole tile: behind a tensor's end there must be
room for a tile's columns.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ....compiler.errors import MoecError
from ..tile.expr import names, parse
from ..tile.tiles import Argument, Buffer, Dot, For, If, Let, Load, Move, Program, Statement, Store, walk

EIGHT: Mapping[str, tuple[int, int]] = {"f8e4m3": (3, 7), "f8e5m2": (2, 15)}  # bits of the mantissa, bias


def for_ascend(program: Program, newer: bool) -> Program:
    """Return the program for an Ascend 950 (`newer`) or one before it.

    Tiles must begin at a multiple of a fractal's width. NaN and infinity in FP8 become numbers before the 950. MoecError
    for a program that computes FP8 numbers there.
    """
    rewriter = _Rewriter(program, newer)
    body = rewriter.body(program.body)
    arguments = tuple(rewriter.argument(a) for a in program.arguments)
    return replace(program, arguments=arguments, buffers=rewriter.buffers, body=body)


@dataclass(frozen=True)
class _Blocks:
    """A load of `rows` x `width` numbers of a weight in fractals, by its indices into [columns, rows, across].

    In that shape, of the same bytes, all fractals of one column are one block.
    """

    at: tuple[str, str, str]
    mask: str
    width: int
    rows: int
    across: int  # columns of a fractal


@dataclass
class _Rewriter:
    program: Program
    newer: bool
    buffers: dict[str, Buffer] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)  # how a name's numbers follow each other, as `steps` says it
    ranges: frozenset[str] = frozenset()  # names of masks that `is_range` is true of
    kept: frozenset[str] = frozenset()  # tiles that stay FP8
    fractal: frozenset[str] = frozenset()  # weights of which each load is one of blocks

    def __post_init__(self) -> None:
        self.buffers = dict(self.program.buffers)
        self.kept = _multiplied(self.program) if self.newer else frozenset()
        for name, buffer in self.program.buffers.items():
            if buffer.dtype in EIGHT and name not in self.kept:
                self.buffers[name] = replace(buffer, dtype="f32")
        loads: dict[str, list[bool]] = {}
        for statement in walk(self.program.body):
            if isinstance(statement, (Load, Store)):
                loads.setdefault(statement.tensor, []).append(self.blocks(statement) is not None)
        self.fractal = frozenset(name for name, found in loads.items() if all(found))

    def argument(self, a: Argument) -> Argument:
        """Return a tensor as the rewritten program takes it: the same bytes."""
        if a.name in self.fractal:
            *lead, columns, rows, high, across = a.shape
            assert isinstance(rows, int) and isinstance(high, int)
            a = replace(a, shape=(*lead, columns, rows * high, across))
        return replace(a, dtype="u8") if a.dtype in EIGHT else a

    def body(self, body: Sequence[Statement]) -> tuple[Statement, ...]:
        return tuple(new for old in body for new in self.rewrite(old))

    def rewrite(self, statement: Statement) -> Iterator[Statement]:
        match statement:
            case Load():
                yield from self.load(statement)
            case Store(tensor, _, value) if self.program.argument(tensor).dtype in EIGHT:
                self.check(f'cast(0.0, "{self.program.argument(tensor).dtype}")')
                yield replace(statement, value=f'bitcast({value}, "u8")')
            case For(body=inner) | If(body=inner):
                yield replace(statement, body=self.body(inner))
            case Let(name, value):
                self.check(value)
                self.known[name] = self.steps(parse(value))
                self.ranges = self.ranges | {name} if self.is_range(parse(value)) else self.ranges - {name}
                yield statement
            case _:
                yield statement

    def check(self, value: str) -> None:
        """Raise MoecError for an expression that makes FP8 numbers where there are none."""
        if not self.newer and any(isinstance(n, ast.Constant) and n.value in EIGHT for n in ast.walk(parse(value))):
            what = f"{self.program.name}: {value} is of a type that an Ascend before the 950 has not"
            raise MoecError(what, todo="keep these numbers in bf16, or in int8")

    def load(self, statement: Load) -> Iterator[Statement]:
        reached = [self.steps(parse(index)) for index in statement.at]
        loose = bool(statement.mask) and not self.is_range(parse(statement.mask))
        if statement.mask and (loose or "any" in reached) and statement.tensor not in self.fractal:
            statement = replace(statement, at=self.inside(statement, reached, loose))
        self.known[statement.name] = "none" if set(reached) <= {"none"} else "any"
        name, dtype = statement.name, self.program.argument(statement.tensor).dtype
        if dtype in EIGHT:
            assert statement.other == 0
            bits = self.beside(name, "bits", "u8")
            yield from self.in_blocks(replace(statement, name=bits))
            yield Let(name, f'bitcast({bits}, "{dtype}")' if name in self.kept else _decoded(bits, *EIGHT[dtype]))
        else:
            yield from self.in_blocks(statement)

    def steps(self, node: ast.expr) -> str:
        """Return how numbers follow each other: `none` for a scalar, `even` by the same step, or `any`."""
        match node:
            case ast.Name(name):
                return self.known.get(name, "none")  # those that are not known are scalars of the launch and the grid
            case ast.Call(ast.Name("arange")):
                return "even"
            case ast.Subscript(value):
                return self.steps(value)
            case ast.Call(ast.Name("sum" | "max" | "min" | "argmax"), [ast.expr() as value, _]):
                tiles = {n for n in names(ast.unparse(value)) if n in self.buffers}
                return "any" if tiles else "none"
        parts = [self.steps(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        if isinstance(node, ast.Call):
            parts = parts[1:]  # without the function's name
        if all(part == "none" for part in parts):
            return "none"
        match node:
            case ast.BinOp(op=ast.Add() | ast.Sub()) if "any" not in parts:
                return "even"
            case ast.BinOp(op=ast.Mult()) if "any" not in parts and "none" in parts:
                return "even"
        return "any"

    def is_range(self, mask: ast.expr) -> bool:
        """Return whether the adapter reads only what a mask allows: numbers of even steps are compared with scalars."""
        match mask:
            case ast.Name(name):
                return name in self.ranges or self.known.get(name, "none") == "none"
            case ast.Subscript(value):
                return self.is_range(value)
            case ast.BinOp(left, ast.BitAnd(), right):
                return self.is_range(left) and self.is_range(right)
            case ast.Compare(left, _, [right]):
                return "any" not in (self.steps(left), self.steps(right))
        return self.steps(mask) == "none"

    def inside(self, statement: Load, reached: Sequence[str], loose: bool) -> tuple[str, ...]:
        """Return the indices of a load, those of no even step kept inside the tensor; `loose`: all before the last."""
        found = []
        shape = self.program.argument(statement.tensor).shape
        for axis, (index, size, how) in enumerate(zip(statement.at, shape, reached, strict=True)):
            node = parse(index)
            inner, axes = ast.unparse(node), ""
            if isinstance(node, ast.Subscript):
                inner, axes = ast.unparse(node.value), f"[{ast.unparse(node.slice).strip('()')}]"
            kept = how == "any" or (loose and how == "even" and axis < len(shape) - 1)
            found.append(f"maximum(minimum({inner}, {size} - 1), 0){axes}" if kept else index)
        return tuple(found)

    def in_blocks(self, statement: Load) -> Iterator[Statement]:
        blocks = self.blocks(statement) if statement.tensor in self.fractal else None
        if blocks is None:
            yield statement
            return
        name = statement.name
        shape = (blocks.width // blocks.across, blocks.rows, blocks.across)
        loaded = self.beside(name, "blocks", self.buffers[name].dtype, shape)
        yield replace(statement, name=loaded, at=(*statement.at[:-4], *blocks.at), mask=blocks.mask)
        yield Let(name, f"trans(reshape(trans({loaded}), {blocks.width}, {blocks.rows}))")

    def beside(self, name: str, label: str, dtype: str, shape: tuple[int, ...] = ()) -> str:
        """Return the name of a value that another is made of; it lies where that one does."""
        new = f"{name}_{label}"
        if name in self.buffers:
            buffer = replace(self.buffers[name], dtype=dtype, shape=shape or self.buffers[name].shape)
            assert self.buffers.get(new, buffer) == buffer, f"{new} has two buffers"
            self.buffers[new] = buffer
        return new

    def blocks(self, statement: Load | Store) -> _Blocks | None:
        """Return what a load of a weight in fractals reads; None for anything else."""
        shape = self.program.argument(statement.tensor).shape
        if isinstance(statement, Store) or len(shape) < 4 or len(statement.at) != len(shape):
            return None
        match [parse(text) for text in statement.at[-4:]]:
            case [
                ast.BinOp(column, ast.FloorDiv(), ast.Constant(int() as across)),
                ast.BinOp(row, ast.FloorDiv(), ast.Constant(int() as high)),
                ast.BinOp(row_again, ast.Mod(), ast.Constant(high_again)),
                ast.BinOp(column_again, ast.Mod(), ast.Constant(across_again)),
            ] if (high, across) == (high_again, across_again) == shape[-2:]:
                if ast.dump(column) != ast.dump(column_again) or ast.dump(row) != ast.dump(row_again):
                    return None
            case _:
                return None
        match column, row:
            case (
                ast.Subscript(
                    ast.BinOp(start, ast.Add(), ast.Call(ast.Name("arange"), [ast.Constant(int() as width)]))
                ),
                ast.Subscript(rows),
            ) if width % across == 0 and statement.name in self.buffers:
                block = f"({ast.unparse(start)} // {across} + arange({width // across}))[:, None, None]"
                mask = _masks(statement.mask, column, f"({block} < {shape[-4]})")
            case _:
                return None
        if mask is None:
            return None
        at = (block, f"({ast.unparse(rows)})[None, :, None]", f"arange({across})[None, None, :]")
        return _Blocks(at, mask, width, self.buffers[statement.name].shape[0], across)


def _multiplied(program: Program) -> frozenset[str]:
    """Return the tiles that the matrix unit takes as they are loaded."""
    found = {name for s in walk(program.body) if isinstance(s, Dot) for name in (s.a, s.b)}
    for statement in reversed(list(walk(program.body))):
        if isinstance(statement, Move) and statement.name in found:
            found.add(statement.value)
    return frozenset(found)


def _masks(mask: str, column: ast.expr, whole: str) -> str | None:
    """Return a mask [rows, columns] for a load in blocks; None if a term of it is neither of rows nor of columns.

    `whole` says which blocks there are: what follows the last column in its fractal is packed as zeros.
    """
    terms, rest = [], [parse(mask)] if mask else []
    while rest:
        match rest.pop():
            case ast.BinOp(left, ast.BitAnd(), right):
                rest += [right, left]
            case ast.Subscript(value, ast.Tuple([ast.Slice(), ast.Constant(None)])):
                terms.append(f"({ast.unparse(value)})[None, :, None]")
            case ast.Compare(value, [ast.Lt()], [ast.Constant(int())]) if ast.dump(value) == ast.dump(column):
                terms.append(whole)
            case _:
                return None
    return " & ".join(terms)


def _decoded(bits: str, mantissa: int, bias: int) -> str:
    """Return FP8 numbers as f32 from their bytes, by the definition of the format: sign, exponent, mantissa."""
    code = f'cast({bits}, "i32")'
    low, scale = (1 << mantissa) - 1, 2.0 ** (1 - bias - mantissa)
    exponent = f"({code} >> {mantissa} & {(1 << 7 - mantissa) - 1})"
    normal = f'bitcast(({exponent} + {127 - bias}) << 23 | ({code} & {low}) << {23 - mantissa}, "f32")'
    small = f'cast({code} & {low}, "f32") * {scale!r}'
    return f'where({exponent} == 0, {small}, {normal}) * cast(1 - ({code} >> 7) * 2, "f32")'
