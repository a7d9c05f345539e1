"""From an op to kernels that a tile can be searched for: the types of the tables in this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ....compiler.formats.table import find_format
from ....compiler.ir.module import Op
from ....compiler.ir.types import TensorType
from ..chip.chip import Profile
from ..kernels.choices import RowTile, Tile
from ..tile.packing import Packing
from .search import KernelTemplate


@dataclass(frozen=True)
class Tokens:
    """A step: `new` tokens of each of `batch` sequences behind `past` others."""

    batch: int
    new: int
    past: int

    @property
    def count(self) -> int:
        """All tokens of the step."""
        return self.batch * self.new

    @property
    def scalars(self) -> dict[str, int]:
        """The scalars that kernels are launched with."""
        return {"T": self.count, "B": self.batch, "S": self.new, "P": self.past}


@dataclass(frozen=True)
class Implementation:
    """An implementation of an op: kernels that run one after the other."""

    name: str
    kernels: tuple[KernelTemplate, ...]


@dataclass(frozen=True)
class Computation:
    """What an op computes: ops of one kind and equal problems share kernels; `implementations` gives those for a step.

    Where they differ with the new tokens of a sequence, `changes_at` is the number from which they are others; where
    with all of its tokens, those that are past and the new ones, `slots_at` is.
    """

    kind: str
    problem: Any
    weights: Mapping[str, Packing]
    implementations: Callable[[Tokens, Profile], tuple[Implementation, ...]]
    changes_at: int | None = None
    slots_at: int | None = None
    matmuls: str = "bf16"  # dtype of what is multiplied as matrices: a chip that has none leaves it to the framework


Selector = Callable[[Op, Mapping[str, Packing]], Computation | None]  # None: the framework computes this one


def operand_types(op: Op) -> dict[str, TensorType]:
    """Return the types of an op's operands by their names in its signature; absent ones are left out."""
    return {name: v.type for name, v in op.named}


def given_in(x: TensorType) -> str:
    """Return in what a kernel gets an operand: in the quantized format that it is in, else in bf16."""
    return x.dtype if find_format(x.dtype) else "bf16"


def row_tile(tile: Tile) -> RowTile:
    """Return a tile of the search as one of a kernel without matmuls."""
    return RowTile(tile.m, tile.n, tile.warps)


def row_shapes(columns: int, rows: tuple[int, ...] = (1, 2, 4, 8)) -> tuple[tuple[int, int, int], ...]:
    """Return tiles of kernels that work on rows: (rows, columns, 1)."""
    widths = [n for n in (128, 256, 512, 1024, 2048, 4096) if n < 2 * columns] or [128]
    return tuple((m, n, 1) for m in rows for n in widths)


def only_implementation(*kernels: KernelTemplate) -> tuple[Implementation, ...]:
    """Return the one implementation of an op that has no others."""
    return (Implementation("plain", kernels),)
