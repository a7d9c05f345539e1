"""The tile language: a kernel as a small program over tiles, which says where each tile lies while it is used.

A program runs once for every point of its grid. It loads tiles of tensors from device memory into a named memory of the
chip, computes with them, moves them from one memory to another and stores them. One program is all that a kernel is:
the simulator executes it, the Triton source is printed from it, and its bytes and FLOPs are counted on it.

Statements are plain data; expressions are text in the small language of expr.py. In JSON a statement is an object
whose first key says what it is: {"load": "a", "from": "x", "at": ["rows[:, None]", "cols[None, :]"], "mask": "..."}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

from ....compiler.errors import MoecError
from ....compiler.ir.dtypes import DTYPES

DEVICE = "device"  # what programs call the outermost memory, whatever the chip's own name for it is


@dataclass(frozen=True)
class Let:
    """name = value. A value of two axes or more has a buffer; scalars and index vectors need none."""

    name: str
    value: str


@dataclass(frozen=True)
class Load:
    """name = tensor[at...], broadcast over the indices; where `mask` is false the number is `other`."""

    name: str
    tensor: str
    at: tuple[str, ...]
    mask: str = ""
    other: float = 0


@dataclass(frozen=True)
class Store:
    """tensor[at...] = value where `mask` is true; `add` adds, atomically."""

    tensor: str
    at: tuple[str, ...]
    value: str
    mask: str = ""
    add: bool = False


@dataclass(frozen=True)
class Dot:
    """acc += a b in f32: a [M, K], b [K, N] or with `transpose` [N, K], on the matrix unit."""

    acc: str
    a: str
    b: str
    transpose: bool = False


@dataclass(frozen=True)
class Move:
    """name = value: the same tile in another memory."""

    name: str
    value: str


@dataclass(frozen=True)
class For:
    """Run the body for var = start, start + step, ... below stop; loads of `stages` - 1 later turns are under way."""

    var: str
    start: str
    stop: str
    step: str
    body: tuple[Statement, ...]
    stages: int = 1


@dataclass(frozen=True)
class If:
    """Run the body if a scalar is not 0."""

    condition: str
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
    """A tensor of a kernel, row by row in device memory. Sizes are ints and names of the kernel's scalars."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: str = "input"  # input, weight, output or scratch


@dataclass(frozen=True)
class Program:
    """A kernel: the body is run for each point of `grid` (variable, extent), in any order.

    `scalars` are ints that are known when the kernel is launched, such as T, the number of tokens.
    """

    name: str
    grid: tuple[tuple[str, str], ...]
    arguments: tuple[Argument, ...]
    scalars: tuple[str, ...]
    buffers: Mapping[str, Buffer]
    body: tuple[Statement, ...]
    doc: str = ""

    def argument(self, name: str) -> Argument:
        """Return a tensor by name."""
        return next(a for a in self.arguments if a.name == name)

    def to_json(self) -> dict[str, Any]:
        """Return the program as JSON values; `from_json` reads them."""
        return {
            "name": self.name,
            "doc": self.doc,
            "grid": [list(axis) for axis in self.grid],
            "scalars": list(self.scalars),
            "arguments": [
                {"name": a.name, "dtype": a.dtype, "shape": list(a.shape), "role": a.role} for a in self.arguments
            ],
            "buffers": {
                name: {"memory": b.memory, "dtype": b.dtype, "shape": list(b.shape), "copies": b.copies, "bytes": b.bytes}
                for name, b in self.buffers.items()
            },
            "body": _write(self.body),
        }  # fmt: skip

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Program:
        """Return the program of JSON values; MoecError for anything but a statement."""
        buffers = {
            name: Buffer(b["memory"], b["dtype"], tuple(b["shape"]), b["copies"]) for name, b in data["buffers"].items()
        }
        arguments = tuple(Argument(a["name"], a["dtype"], tuple(a["shape"]), a["role"]) for a in data["arguments"])
        grid = tuple((name, extent) for name, extent in data["grid"])
        return Program(
            data["name"], grid, arguments, tuple(data["scalars"]), buffers, _read(data["body"]), data.get("doc", "")
        )


def _write(body: Sequence[Statement]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for statement in body:
        match statement:
            case Let(name, value):
                entry: dict[str, Any] = {"let": name, "value": value}
            case Load(name, tensor, at, mask, other):
                entry = {"load": name, "from": tensor, "at": list(at), "mask": mask}
                entry |= {"other": other} if other else {}
            case Store(tensor, at, value, mask, add):
                entry = {"store": tensor, "at": list(at), "value": value, "mask": mask}
                entry |= {"add": True} if add else {}
            case Dot(acc, a, b, transpose):
                entry = {"dot": acc, "a": a, "b": b, "transpose": transpose}
            case Move(name, value):
                entry = {"move": name, "value": value}
            case For(var, start, stop, step, inner, stages):
                entry = {"for": var, "start": start, "stop": stop, "step": step, "stages": stages}
                entry["body"] = _write(inner)
            case If(condition, inner):
                entry = {"if": condition, "body": _write(inner)}
        found.append(entry)
    return found


def _read(entries: Sequence[Mapping[str, Any]]) -> tuple[Statement, ...]:
    return tuple(_read_one(entry) for entry in entries)


def _read_one(entry: Mapping[str, Any]) -> Statement:
    match entry:
        case {"let": name, "value": value}:
            return Let(name, value)
        case {"load": name, "from": tensor, "at": at}:
            return Load(name, tensor, tuple(at), entry.get("mask", ""), entry.get("other", 0))
        case {"store": tensor, "at": at, "value": value}:
            return Store(tensor, tuple(at), value, entry.get("mask", ""), entry.get("add", False))
        case {"dot": acc, "a": a, "b": b}:
            return Dot(acc, a, b, entry.get("transpose", False))
        case {"move": name, "value": value}:
            return Move(name, value)
        case {"for": var, "start": start, "stop": stop, "step": step, "body": body}:
            return For(var, start, stop, step, _read(body), entry.get("stages", 1))
        case {"if": condition, "body": body}:
            return If(condition, _read(body))
    raise MoecError(f"{dict(entry)} is no statement of a tile program")


def walk(body: Sequence[Statement]) -> Iterator[Statement]:
    """Yield every statement, outer ones before those in them."""
    for statement in body:
        yield statement
        if isinstance(statement, (For, If)):
            yield from walk(statement.body)


# --- memory --------------------------------------------------------------------------------------------------------


def aligned(size: int, align: int) -> int:
    """Return a number of bytes, rounded up to the alignment."""
    return -(-size // align) * align


@dataclass
class Usage:
    """Bytes in use in each memory while a program runs, and the most there were."""

    align: Mapping[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    def take(self, buffer: Buffer) -> int:
        """Take a buffer's bytes and return how many are in use in its memory then."""
        size = aligned(buffer.bytes, self.align.get(buffer.memory, 1))
        self.used[buffer.memory] = self.used.get(buffer.memory, 0) + size
        self.peak[buffer.memory] = max(self.peak.get(buffer.memory, 0), self.used[buffer.memory])
        return self.used[buffer.memory]

    def give(self, buffer: Buffer) -> None:
        """Give a buffer's bytes back."""
        self.used[buffer.memory] -= aligned(buffer.bytes, self.align.get(buffer.memory, 1))


def made_by(statement: Statement) -> str | None:
    """Return the name that a statement gives a value to."""
    return statement.name if isinstance(statement, (Let, Load, Move)) else None


def footprint(program: Program, align: Mapping[str, int]) -> dict[str, int]:
    """Return the most bytes of each memory that one run of the program has in use.

    A buffer lives from the statement that makes it to the end of the body that the statement is in.
    """
    usage = Usage(align)
    _hold(program, program.body, usage, set())
    return usage.peak


def _hold(program: Program, body: Sequence[Statement], usage: Usage, held: set[str]) -> None:
    own: list[str] = []
    for statement in body:
        name = made_by(statement)
        if name in program.buffers and name not in held:
            assert name
            usage.take(program.buffers[name])
            own.append(name)
            held.add(name)
        if isinstance(statement, (For, If)):
            _hold(program, statement.body, usage, held)
    for name in own:
        usage.give(program.buffers[name])
        held.discard(name)
