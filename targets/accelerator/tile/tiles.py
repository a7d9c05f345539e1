"""The tile language: a kernel as a small program over tiles, which says where each tile lies while it is used.

A program runs once for every point of its grid. It loads tiles of tensors from device memory into a named memory of the
chip, computes with them, moves them from one memory to another and stores them. One program is all that a kernel is:
the simulator executes it, the Triton source is printed from it, and its bytes and FLOPs are counted on it.

Statements are plain data whose expressions are nodes of expr.py; scope.py checks them as they are added. In JSON
expressions are text and a statement is an object whose first key says what it is: {"load": "a", "from": "x", "at":
["rows[:, None]", "cols[None, :]"], "mask": "..."}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

from ....compiler.ir.dtypes import DTYPES
from .expr import Expr, Name

DEVICE = "device"  # what programs call the outermost memory, whatever the chip's own name for it is


@dataclass(frozen=True)
class Let:
    """name = value. A value of two axes or more has a buffer; scalars and index vectors need none."""

    name: str
    value: Expr


@dataclass(frozen=True)
class Load:
    """name = tensor[at...], broadcast over the indices; where `mask` is false the number is `other`."""

    name: str
    tensor: str
    at: tuple[Expr, ...]
    mask: Expr | None = None
    other: float = 0


@dataclass(frozen=True)
class Store:
    """tensor[at...] = value where `mask` is true."""

    tensor: str
    at: tuple[Expr, ...]
    value: Expr
    mask: Expr | None = None

    @property
    def stored(self) -> str:
        """The name that is stored as it is; empty for another value."""
        return self.value.name if isinstance(self.value, Name) else ""


@dataclass(frozen=True)
class Dot:
    """acc += a b in f32: a [M, K], b [K, N] or with `transpose` [N, K], on the matrix unit.

    With `scales`, of a [M, K / group] and of b [N, K / group], the operands are codes, each group along K under its scale:
    E4M3, or bytes (u8) of two E2M1 each, the first in the low bits; b is [N, K]. Scales in u8 are powers of two (E8M0)
    for 32 codes, those in E4M3 are for 16. With `bits` the unit takes the operands' bits as numbers of that dtype.
    """

    acc: str
    a: str
    b: str
    transpose: bool = False
    scales: tuple[str, str] | None = None
    bits: str = ""


@dataclass(frozen=True)
class Move:
    """name = value: the same tile in another memory."""

    name: str
    value: str


@dataclass(frozen=True)
class For:
    """Run the body for var = start, start + step, ... below stop; loads of `stages` - 1 later iterations are under way."""

    var: str
    start: Expr
    stop: Expr
    step: Expr
    body: tuple[Statement, ...]
    stages: int = 1


@dataclass(frozen=True)
class If:
    """Run the body if a scalar is not 0."""

    condition: Expr
    body: tuple[Statement, ...]


Statement: TypeAlias = "Let | Load | Store | Dot | Move | For | If"


@dataclass(frozen=True)
class Buffer:
    """The buffer of a tile: `copies` of it at once (2 and more: the next ones are loaded while this one is used)."""

    memory: str
    dtype: str
    shape: tuple[int, ...]
    copies: int = 1

    @property
    def bytes(self) -> int:
        """Bytes of all copies."""
        return self.copies * prod(self.shape) * DTYPES[self.dtype].bits // 8


@dataclass(frozen=True)
class Argument:
    """A tensor of a kernel, row by row in device memory. Sizes are ints and expressions over the kernel's scalars."""

    name: str
    dtype: str
    shape: tuple[int | Expr, ...]
    role: str = "input"  # input, weight, output or scratch


@dataclass(frozen=True)
class Program:
    """A kernel: the body is run for each point of `grid` (variable, extent), in any order.

    `scalars` are ints that are known when the kernel is launched, such as T, the number of tokens.
    """

    name: str
    grid: tuple[tuple[str, Expr], ...]
    arguments: tuple[Argument, ...]
    scalars: tuple[str, ...]
    buffers: Mapping[str, Buffer]
    body: tuple[Statement, ...]
    doc: str = ""

    def argument(self, name: str) -> Argument:
        """Return a tensor by name."""
        return next(a for a in self.arguments if a.name == name)


def walk_statements(body: Sequence[Statement]) -> Iterator[Statement]:
    """Yield every statement, outer ones before those in them."""
    for statement in body:
        yield statement
        if isinstance(statement, (For, If)):
            yield from walk_statements(statement.body)


# --- memory --------------------------------------------------------------------------------------------------------


def round_up(n: int, to: int) -> int:
    """Return n rounded up to a multiple."""
    return -(-n // to) * to


@dataclass
class Usage:
    """Bytes in use in each memory while a program runs, and the most there were."""

    align: Mapping[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    def take(self, buffer: Buffer) -> int:
        """Take a buffer's bytes and return how many are in use in its memory then."""
        size = round_up(buffer.bytes, self.align.get(buffer.memory, 1))
        self.used[buffer.memory] = self.used.get(buffer.memory, 0) + size
        self.peak[buffer.memory] = max(self.peak.get(buffer.memory, 0), self.used[buffer.memory])
        return self.used[buffer.memory]

    def give(self, buffer: Buffer) -> None:
        """Give a buffer's bytes back."""
        self.used[buffer.memory] -= round_up(buffer.bytes, self.align.get(buffer.memory, 1))


def made_by(statement: Statement) -> str | None:
    """Return the name that a statement gives a value to."""
    return statement.name if isinstance(statement, (Let, Load, Move)) else None


def memory_footprint(program: Program, align: Mapping[str, int]) -> dict[str, int]:
    """Return the most bytes of each memory that one run of the program has in use.

    A buffer lives from the statement that makes it to the end of the body that the statement is in.
    """
    usage = Usage(align)
    _hold_buffers(program, program.body, usage, set())
    return usage.peak


def _hold_buffers(program: Program, body: Sequence[Statement], usage: Usage, held: set[str]) -> None:
    own: list[str] = []
    for statement in body:
        name = made_by(statement)
        if name in program.buffers and name not in held:
            assert name
            usage.take(program.buffers[name])
            own.append(name)
            held.add(name)
        if isinstance(statement, (For, If)):
            _hold_buffers(program, statement.body, usage, held)
    for name in own:
        usage.give(program.buffers[name])
        held.discard(name)
