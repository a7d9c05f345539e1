"""What the tiling search chooses of a kernel: the sizes of its tiles, its buffers and the warps of a block."""

from __future__ import annotations

from dataclasses import dataclass

TILE_ROWS = tuple(16 << level for level in range(5))  # rows of a tile of a matmul


@dataclass(frozen=True)
class Tile:
    """The choices of a matrix kernel: rows, columns and depth of a tile, buffers of its loads, warps of a block.

    `group` tiles of rows run side by side, one column of tiles after the other (order.py). `swapped`: the weight is the
    first operand, whose rows some matrix units want 64 of, and the sums lie transposed.
    """

    m: int
    n: int
    k: int
    stages: int = 2
    warps: int = 4
    group: int = 1
    swapped: bool = False

    @property
    def sums(self) -> tuple[int, int]:
        """The shape in which the matrix unit adds."""
        return (self.n, self.m) if self.swapped else (self.m, self.n)


@dataclass(frozen=True)
class RowTile:
    """The choices of a kernel without matmuls: rows and columns of a tile, warps of a block."""

    m: int
    n: int
    warps: int = 4


@dataclass(frozen=True)
class AttentionTile:
    """The choices of an attention kernel: rows of queries, keys at once, widest part of a head, buffers of loads, warps.

    `split` runs share the keys of a row of queries; attention_merge puts their results together.
    """

    m: int
    n: int
    part: int = 128
    stages: int = 2
    warps: int = 4
    split: int = 1
