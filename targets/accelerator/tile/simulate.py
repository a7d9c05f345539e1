"""Executes tile programs in numpy: the same tiles in the same order, in memories of the chip's sizes.

What a program does is checked where it is done: a tile that does not fit the memory it is put into, a copy between
memories that the chip has no path for, an index outside its tensor, a cell that two runs both write. Nothing here knows
a kernel by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from ....compiler.errors import MoecError
from ....compiler.formats.table import ELEMENTS
from ....compiler.ir.dtypes import DTYPES, dtype_name
from .expr import Expr, evaluate_expr
from .tiles import DEVICE, Buffer, Dot, For, If, Let, Load, Move, Program, Statement, Store, Usage


@dataclass(frozen=True)
class Chip:
    """The figures of a chip that a simulation needs: bytes and alignment of each memory, and the paths between memories.

    `paths` holds (from, to) pairs, DEVICE among the names. `operands` names the memories that the matrix unit reads its
    first and second operand from and adds its results in.
    """

    capacity: Mapping[str, int]
    align: Mapping[str, int]
    paths: frozenset[tuple[str, str]]
    operands: tuple[str, str, str]


def simulate_program(
    program: Program, tensors: Mapping[str, np.ndarray], scalars: Mapping[str, int], chip: Chip
) -> dict[str, int]:
    """Run a program on tensors, whose outputs are changed in place; return the most bytes used of each memory.

    `tensors` has an array for every argument, `scalars` an int for every scalar. MoecError says what a statement does
    that the chip or the program's own statements do not allow.
    """
    _check_arguments(program, tensors, scalars)
    written = {a.name: np.full(tensors[a.name].shape, -1, np.int64) for a in program.arguments if a.role == "output"}
    extents = [int(evaluate_expr(extent, scalars)) for _, extent in program.grid]
    usage = Usage(chip.align)
    for number, point in enumerate(product(*(range(n) for n in extents))):
        values: dict[str, Any] = {**scalars, **dict(zip([name for name, _ in program.grid], point, strict=True))}
        run = _Run(program, tensors, chip, usage, values, written, number)
        run.body(program.body)
        assert not any(usage.used.values())
    return usage.peak


def _check_arguments(program: Program, tensors: Mapping[str, np.ndarray], scalars: Mapping[str, int]) -> None:
    for argument in program.arguments:
        given = tensors.get(argument.name)
        shape = tuple(int(evaluate_expr(n, scalars)) for n in argument.shape)
        if given is None or given.shape != shape or given.dtype != DTYPES[argument.dtype].numpy:
            found = "nothing" if given is None else f"{given.dtype}{list(given.shape)}"
            raise MoecError(f"{program.name}: {argument.name} is {argument.dtype}{list(shape)}, {found} was given")


@dataclass
class _Run:
    """One run of the body, at one point of the grid."""

    program: Program
    tensors: Mapping[str, np.ndarray]
    chip: Chip
    usage: Usage
    values: dict[str, Any]
    written: Mapping[str, np.ndarray]
    number: int
    held: set[str] = field(default_factory=set)

    def body(self, statements: Sequence[Statement]) -> None:
        own: list[str] = []
        for statement in statements:
            match statement:
                case Let(name, value):
                    self.put(name, evaluate_expr(value, self.values), own)
                case Load():
                    self.load(statement, own)
                case Store():
                    self.store(statement)
                case Dot():
                    self.dot(statement)
                case Move(name, value):
                    self.path(self.memory(value), self.memory(name), f"{name} = {value}")
                    self.put(name, self.values[value], own)
                case For(var, start, stop, step, inner):
                    bounds = (int(evaluate_expr(n, self.values)) for n in (start, stop, step))
                    for number in range(*bounds):
                        self.values[var] = number
                        self.body(inner)
                case If(condition, inner):
                    if bool(evaluate_expr(condition, self.values)):
                        self.body(inner)
        for name in own:
            self.usage.give(self.program.buffers[name])
            self.held.discard(name)

    def fail(self, what: str) -> MoecError:
        return MoecError(f"{self.program.name}: {what}", where=f"point {self.number} of the grid")

    def memory(self, name: str) -> str:
        return self.program.buffers[name].memory

    def path(self, source: str, to: str, what: str) -> None:
        if source != to and (source, to) not in self.chip.paths:
            raise self.fail(f"{what}: the chip has no path from {source} to {to}")

    def put(self, name: str, value: Any, own: list[str]) -> None:
        """Give a name its value; the first time in a body, its buffer is taken."""
        buffer = self.program.buffers.get(name)
        if buffer is not None:
            assert np.shape(value) == buffer.shape and dtype_name(np.asarray(value).dtype) == buffer.dtype, (
                f"{name}: its type is wrong"
            )
            if name not in self.held:
                self.held.add(name)
                own.append(name)
                self.take(name, buffer)
        self.values[name] = value

    def take(self, name: str, buffer: Buffer) -> None:
        used, there = self.usage.take(buffer), self.chip.capacity.get(buffer.memory)
        if there is None:
            raise self.fail(f"{name} lies in {buffer.memory}, which the chip has not")
        if used > there:
            raise self.fail(f"{name} does not fit: {buffer.memory} has {there} bytes, with it {used} are in use")

    def cells(self, tensor: str, at: Sequence[Expr], mask: Expr | None) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Return the indices of a load or store, masked ones as 0, and the mask, all of one shape."""
        array = self.tensors[tensor]
        indices = [np.asarray(evaluate_expr(i, self.values)) for i in at]
        wanted = np.asarray(True if mask is None else evaluate_expr(mask, self.values))
        *indices, wanted = np.broadcast_arrays(*indices, wanted)
        for axis, index in enumerate(indices):
            outside = wanted & ((index < 0) | (index >= array.shape[axis]))
            if outside.any():
                raise self.fail(f"index {index[outside][0]} of axis {axis} is outside {tensor}{list(array.shape)}")
        return tuple(np.where(wanted, index, 0) for index in indices), wanted

    def load(self, statement: Load, own: list[str]) -> None:
        indices, wanted = self.cells(statement.tensor, statement.at, statement.mask)
        array = self.tensors[statement.tensor]
        value = np.where(wanted, array[indices] if array.size else 0, statement.other).astype(array.dtype)
        if statement.name in self.program.buffers:
            self.path(DEVICE, self.memory(statement.name), f"load of {statement.name}")
        self.put(statement.name, value if value.ndim else value[()], own)

    def store(self, statement: Store) -> None:
        indices, wanted = self.cells(statement.tensor, statement.at, statement.mask)
        array = self.tensors[statement.tensor]
        if statement.stored in self.program.buffers:
            self.path(self.memory(statement.stored), DEVICE, f"store of {statement.stored}")
        value = np.broadcast_to(np.asarray(evaluate_expr(statement.value, self.values)), wanted.shape)
        places = tuple(i[wanted] for i in indices)
        if (marks := self.written.get(statement.tensor)) is not None:
            if np.isin(marks[places], (-1, self.number), invert=True).any():
                raise self.fail(f"a cell of {statement.tensor} is written by two points of the grid")
            marks[places] = self.number
        array[places] = value[wanted].astype(array.dtype)

    def dot(self, statement: Dot) -> None:
        where = tuple(self.memory(n) for n in (statement.a, statement.b, statement.acc))
        if where != self.chip.operands:
            raise self.fail(f"the matrix unit works in {self.chip.operands}, the tiles lie in {where}")
        a, b, acc = (np.asarray(self.values[n]) for n in (statement.a, statement.b, statement.acc))
        if statement.bits:
            a, b = (x.view(DTYPES[statement.bits].numpy) for x in (a, b))
        if statement.scales:
            a, b = (_dequantize_codes(x, self.values[s]) for x, s in zip((a, b), statement.scales, strict=True))
        b = b.T if statement.transpose else b
        self.values[statement.acc] = acc + a.astype(np.float32) @ b.astype(np.float32)


def _dequantize_codes(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the numbers of codes [M, K], or of two E2M1 in each byte, under scales for groups along K."""
    if codes.dtype == np.uint8:
        codes = np.array(ELEMENTS["e2m1"], np.float32)[np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), -1)]
    powers = scales.dtype == np.uint8
    numbers = np.exp2(scales.astype(np.float32) - 127) if powers else scales.astype(np.float32)
    return codes.astype(np.float32) * np.repeat(numbers, codes.shape[1] // scales.shape[1], 1)
