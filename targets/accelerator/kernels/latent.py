"""The kernel that makes keys or values of cached latents: the up-projection of the expanded form of latent attention."""

from __future__ import annotations

from dataclasses import dataclass

from ..tile.builder import Builder, Layout
from ..tile.packing import Packing
from ..tile.tiles import Program
from .choices import Tile
from .experts import multiply


@dataclass(frozen=True)
class Expand:
    """y [B, heads, P + S, rows] of latents [B, 1, C, depth]: the latents of P + S tokens times each head's weight.

    A head has `rows` rows of the weight, or where it is `turned` `depth` rows, whose columns are the results. With a
    `window` only what the new tokens see is made.
    """

    heads: int
    rows: int
    depth: int
    weight: Packing
    turned: bool = False
    window: int = 0
    dtype: str = "bf16"

    @property
    def first(self) -> str:
        """The first token that is needed."""
        return f"maximum(P - {self.window - 1}, 0)" if self.window else "0"


def expand(p: Expand, t: Tile, layout: Layout) -> Program:
    """Make [t.m, t.n] of y for each point of the grid."""
    b = Builder("expand", layout, "y[b, h, token] = latent[b, token] of the head's up-projection")
    b.scalar("B", "S", "P", "C")
    b.grid("column", f"cdiv({p.rows}, {t.n})")
    b.grid("tile", f"cdiv(P + S - {p.first}, {t.m})")
    b.grid("head", p.heads)
    b.grid("batch", "B")
    b.tensor("latent", p.dtype, "B", 1, "C", p.depth)
    p.weight.declare(b, "w")
    b.tensor("y", p.dtype, "B", p.heads, "P + S", p.rows, role="output")
    b.let("row", f"{p.first} + tile * {t.m} + arange({t.m})")
    b.let("live", "row < P + S")
    b.let("n", f"column * {t.n} + arange({t.n})")
    b.let("n_live", f"n < {p.rows}")
    sums = _turned(b, p, t) if p.turned else _straight(b, p, t)
    for acc, (first, width) in sums.items():
        column = f"(column * {t.n} + {first} + arange({width}))[None, :]"
        b.let(f"y_{acc}", f'cast({b.result(acc)}, "{p.dtype}")', (t.m, width), p.dtype)
        mask = f"live[:, None] & ({column} < {p.rows})"
        b.store("y", ["batch", "head", "row[:, None]", column], f"y_{acc}", mask)
    return b.program()


def _straight(b: Builder, p: Expand, t: Tile) -> dict[str, tuple[int, int]]:
    """Add the sums over a weight whose rows are the results, and return the columns of each."""
    b.let("w_row", f"head * {p.rows} + n")
    b.accumulator("acc", (t.m, t.n))
    with b.loop("k", 0, p.depth, t.k, t.stages):
        multiply(
            b, p.weight, "w", "latent", "row", p.depth, t, {"acc": "w_row"}, "", lead=["batch", "0"], dtype=p.dtype
        )
    return {"acc": (0, t.n)}


def _turned(b: Builder, p: Expand, t: Tile) -> dict[str, tuple[int, int]]:
    """Add the sums over a weight whose columns are the results, and return the columns of each."""
    sums: dict[str, tuple[int, int]] = {}
    halves = 2 if p.weight.quantized and p.weight.quantized.bits == 4 else 1  # as the packing splits a tile
    for i in range(halves):
        width = t.n // halves
        sums[b.accumulator(f"acc{i}", (t.m, width))] = (i * width, width)
    with b.loop("k", 0, p.depth, t.k, t.stages):
        b.let("deep", f"k + arange({t.k})")
        b.let("deep_live", f"deep < {p.depth}")
        b.let("w_row", f"head * {p.depth} + deep")
        at = ["batch", "0", "row[:, None]", "deep[None, :]"]
        x = b.operand("x", "latent", at, "live[:, None] & deep_live[None, :]", (t.m, t.k), second=False)
        first = f"column * {t.n}"
        tiles = p.weight.operands(b, "w_tile", "w", None, "w_row", "deep_live", first, (t.k, t.n))
        for acc, (tile, _, _) in zip(sums, tiles, strict=True):
            b.dot(acc, x, tile, transpose=False)
    return sums
