"""Counts what a tile program moves and computes, on the program itself: bytes, FLOPs of dots, numbers computed.

Loops are counted by their bounds. Where these depend on the place in the grid (a causal edge), the middle of the grid
stands for all; where they depend on numbers that are loaded, the caller says what to expect. What a condition on the
place in the grid guards counts for the share of the points where it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ....compiler.ir.dtypes import DTYPES
from .expr import Expr, evaluate_expr, shape_of
from .tiles import Dot, For, If, Let, Load, Move, Program, Statement, Store

SCALED = ("mxfp8", "mxfp4", "nvfp4")  # what profiles call products of codes under scales


class Axis(NamedTuple):
    """An axis of a grid, with how many of its points do something."""

    name: str
    extent: float


class Depends(NamedTuple):
    """The axes of the grid that a value depends on: by what is computed from them, and by numbers that are loaded."""

    computed: frozenset[str] = frozenset()
    loaded: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return self.computed | self.loaded


@dataclass
class Counts:
    """Of all points of a grid together; bytes are those of tiles, as often as they are moved."""

    points: float
    axes: tuple[Axis, ...] = ()  # the first is the fastest
    depends: dict[str, Depends] = field(default_factory=dict)  # by tensor: of the places where it is read and written
    loaded: dict[str, float] = field(default_factory=dict)  # by tensor
    stored: dict[str, float] = field(default_factory=dict)  # by tensor
    moved: dict[tuple[str, str], float] = field(default_factory=dict)  # (from, to) memory -> bytes
    dots: dict[str, float] = field(default_factory=dict)  # by dtype of the operands, with padding
    computed: float = 0.0  # numbers x operators outside of the matrix unit
    steps: float = 0.0  # iterations of the innermost loops that load, of one point

    @property
    def traffic(self) -> float:
        """Bytes between device memory (or the cache before it) and the cores."""
        return sum(self.loaded.values()) + sum(self.stored.values())


def count_program(program: Program, scalars: Mapping[str, int], expect: Mapping[str, float]) -> Counts:
    """Count a program at given scalars; `expect` holds numbers that are only known when it runs.

    A key of `expect` is a variable of the grid (how many points of that axis do something), or a name that a bound reads.
    """
    values: dict[str, Any] = dict(scalars)
    axes: list[Axis] = []
    whole: dict[str, int] = {}
    for name, extent in program.grid:
        size = float(evaluate_expr(extent, scalars))
        axes.append(Axis(name, min(size, expect.get(name, size))))
        values[name] = int((size - 1) / 2)
        if axes[-1].extent == size:
            whole[name] = max(int(size), 1)
    values |= {name: value for name, value in expect.items() if name not in values}
    # a launch that finds nothing to do costs as one that finds one point
    points = max(prod(axis.extent for axis in axes), 1.0)
    counts = Counts(points, tuple(axes))
    depends = {axis.name: Depends(frozenset((axis.name,))) for axis in axes}
    _Counter(program, counts, values, depends, scalars, whole).body(program.body, points)
    return counts


def unit_dtype_and_depth(program: Program, dot: Dot) -> tuple[str, int]:
    """Return what a chip's profile calls the operands of a matmul, and how deep it is."""
    a, b = program.buffers[dot.a], program.buffers[dot.b]
    depth = a.shape[1]
    if not dot.scales:
        return dot.bits or a.dtype, depth
    powers = program.buffers[dot.scales[0]].dtype == "u8"
    mxfp8, mxfp4, nvfp4 = SCALED
    name = mxfp8 if "f8e4m3" in (a.dtype, b.dtype) else mxfp4 if powers else nvfp4
    return name, depth * (2 if a.dtype == "u8" else 1)


@dataclass
class _Counter:
    program: Program
    counts: Counts
    values: dict[str, Any]
    depends: dict[str, Depends]  # of names
    scalars: Mapping[str, int]
    whole: Mapping[str, int]  # extents of the axes of which every point does something

    def body(self, statements: Sequence[Statement], times: float) -> None:
        for statement in statements:
            match statement:
                case Let(name, value):
                    self.let(name, value, times)
                case Load(name, tensor, at):
                    place = self.place(tensor, at)
                    self.depends[name] = Depends(loaded=place.names)
                    if name not in self.program.buffers:
                        self.values[name] = np.zeros(shape_of(*at), DTYPES[self.program.argument(tensor).dtype].numpy)
                    size = self.elements(name) * DTYPES[self.program.argument(tensor).dtype].bits / 8
                    self.counts.loaded[tensor] = self.counts.loaded.get(tensor, 0) + times * size
                case Store(tensor, at):
                    self.place(tensor, at)
                    size = prod(shape_of(*at)) * DTYPES[self.program.argument(tensor).dtype].bits / 8
                    self.counts.stored[tensor] = self.counts.stored.get(tensor, 0) + times * size
                case Dot(acc):
                    m, n = self.program.buffers[acc].shape
                    dtype, depth = unit_dtype_and_depth(self.program, statement)
                    self.counts.dots[dtype] = self.counts.dots.get(dtype, 0) + 2.0 * m * n * depth * times
                case Move(name, source):
                    key = (self.program.buffers[source].memory, self.program.buffers[name].memory)
                    size = self.program.buffers[name].bytes / self.program.buffers[name].copies
                    self.counts.moved[key] = self.counts.moved.get(key, 0) + times * size
                case For(var, start, stop, step, inner):
                    first, last, by = (float(self.bound(n)) for n in (start, stop, step))
                    self.depends[var] = self.on(start)
                    iterations = max(-(-(last - first) // by), 0.0)
                    self.values[var] = int(first + (iterations // 2) * by)
                    if any(isinstance(s, Load) for s in inner):
                        self.counts.steps += iterations
                    self.body(inner, times * iterations)
                case If(condition, inner):
                    self.body(inner, times * self.share(condition))

    def share(self, condition: Expr) -> float:
        """Return the share of the grid's points where a condition holds; 1 where it asks more than where a point is."""
        if not condition.names <= self.scalars.keys() | self.whole.keys():
            return 1.0
        names = sorted(condition.names & self.whole.keys())
        places = np.meshgrid(*(np.arange(self.whole[name]) for name in names), sparse=True)
        return float(np.mean(evaluate_expr(condition, {**self.scalars, **dict(zip(names, places, strict=True))}) != 0))

    def bound(self, expr: Expr) -> Any:
        """Return the value of an expression over what is known; tiles and other unknown numbers count as 0."""
        missing = {n: self.zero(n) for n in expr.names if n not in self.values}
        with np.errstate(all="ignore"):
            return evaluate_expr(expr, {**self.values, **missing} if missing else self.values)

    def zero(self, name: str) -> Any:
        buffer = self.program.buffers.get(name)
        return np.broadcast_to(np.zeros((), DTYPES[buffer.dtype].numpy), buffer.shape) if buffer else 0

    def on(self, *exprs: Expr) -> Depends:
        """Return what expressions depend on."""
        names = frozenset[str]().union(*(expr.names for expr in exprs))
        found = [known for name in names if (known := self.depends.get(name))]
        return Depends(*(frozenset[str]().union(*parts) for parts in zip(*found, strict=True))) if found else Depends()

    def place(self, tensor: str, at: Sequence[Expr]) -> Depends:
        """Return what the place of a load or store depends on, and keep it of its tensor."""
        place, known = self.on(*at), self.counts.depends.get(tensor, Depends())
        self.counts.depends[tensor] = Depends(known.computed | place.computed, known.loaded | place.loaded)
        return place

    def let(self, name: str, value: Expr, times: float) -> None:
        before, after = self.depends.get(name, Depends()), self.on(value)
        self.depends[name] = Depends(before.computed | after.computed, before.loaded | after.loaded)
        if name in self.program.buffers:
            self.counts.computed += times * self.elements(name) * value.operators
        else:
            self.values[name] = self.bound(value)
            self.counts.computed += times * np.size(self.values[name]) * value.operators

    def elements(self, name: str) -> int:
        buffer = self.program.buffers.get(name)
        return prod(buffer.shape) if buffer else np.size(self.values[name])
