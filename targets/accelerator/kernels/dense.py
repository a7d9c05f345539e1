"""The kernels of dense layers: linear with any packing and activation, in blocks or per head, and the gated MLP.

A linear may be cut along its depth (`split`), for few tokens and few rows: then each part keeps its own sums and
`linear_sum` adds them up in order.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from ....compiler.errors import MoecError
from ....compiler.ir.activation import IDENTITY, Activation
from ..tile.builder import Builder, Layout
from ..tile.packing import Packing
from ..tile.tiles import Program
from .choices import Tile
from .experts import activation_text, add_multiply, summed
from .low_precision import begin_sums, declare_rows, scaled_sums, store_rows
from .order import tile_axes, tiles_that_exist


@dataclass(frozen=True)
class Linear:
    """y[t] = act(w x[t] + bias), in `blocks` independent parts: y [T, blocks rows], x [T, depth] or [T, blocks, depth].

    The weight has `rows` (gated: twice as many) for each block: concatenated, or as experts of the packing.
    The activation `act` may be gated. `wide`: x has so many numbers where it has `depth`, and those after them are not
    read (0: depth).
    """

    rows: int
    depth: int
    weight: Packing
    blocks: int = 1
    bias: bool = False
    _: KW_ONLY
    act: Activation = IDENTITY
    wide: int = 0
    dtype: str = "bf16"  # of x
    out: str = "bf16"  # of y, or the format that its rows are rounded to
    bits: str = ""  # as in Packing, of these


def linear_kernel(p: Linear, t: Tile, layout: Layout, split: int = 1, name: str = "linear") -> Program:
    """Multiply rows by a weight: [t.m, t.n] of y, or with `split` of `parts` f32[split, T, N], for each point of the grid.

    MoecError for a gated linear with a split: its two sums would be two results.
    """
    if split > 1 and p.act.gated:
        raise MoecError("a gated linear is not cut along its depth", todo="use split=1")
    b = Builder(
        name, layout, "y[t] = act(x[t] wᵀ + bias)" if split == 1 else "parts[i, t] = x[t, part i] w[:, part i]ᵀ"
    )
    b.scalar("T")
    tile_axes(b, f"cdiv({p.rows}, {t.n})", f"cdiv(T, {t.m})", t.group)
    if p.blocks > 1:
        b.grid("block", p.blocks)
    if split > 1:
        b.grid("part", split)
    declare_rows(b, "x", p.dtype, "T", *([p.blocks] if p.blocks > 1 else []), p.wide or p.depth)
    p.weight.declare(b, "w")
    wide = p.blocks * p.rows
    if split == 1:
        _declare_end(b, p)
        declare_rows(b, "y", p.out, "T", wide, role="output")
    else:
        b.tensor("parts", "f32", split, "T", wide, role="output")
    b.let("row", f"tile * {t.m} + arange({t.m})")
    b.let("live", "row < T")
    b.let("n", f"column * {t.n} + arange({t.n})")
    b.let("n_live", f"n < {p.rows}")
    with tiles_that_exist(b, f"tile * {t.m} < T", t.group):
        _product(b, p, t, split)
    return b.program()


def _product(b: Builder, p: Linear, t: Tile, split: int) -> None:
    """Add the loop over the depth and the stores of its sums."""
    sums = _weight_rows(b, p)
    apart = None if p.act.gated and p.act.interleaved else p.rows if p.act.gated or p.blocks > 1 else 0
    begin_sums(b, p.weight, p.dtype, t, {acc: f"{acc}_row" for acc in sums}, apart)
    start, stop = part_of_depth(b, p.depth, t.k, split)
    block = "block" if p.blocks > 1 else ""
    expert, middle = block if p.weight.experts else "", [block] if block else []
    with b.loop("k", start, stop, t.k, t.stages):
        add_multiply(
            b, p.weight, "w", "x", "row", p.depth, t, {acc: f"{acc}_row" for acc in sums},
            expert, middle, dtype=p.dtype,
        )  # fmt: skip
    b.let("place", f"block * {p.rows} + n" if block else "n")
    finished = {acc: summed(b, acc, t) for acc in sums}
    value = scaled_sums(b, p.weight, "w", "x", p.dtype, "row", finished, expert, middle)
    live = "live[:, None] & n_live[None, :]"
    if split > 1:
        b.store("parts", ["part", "row[:, None]", "place[None, :]"], value["gate"], live)
    else:
        y = _end_of_sums(b, p, value)
        if p.blocks == 1:
            store_rows(b, "y", p.out, y, (t.m, t.n), p.rows, ("row", "n", f"column * {t.n}"), p.bits)
        else:
            b.let("y_tile", f'cast({y}, "{p.out}")', (t.m, t.n), p.out)
            b.store("y", ["row[:, None]", "place[None, :]"], "y_tile", live)


def linear_sum(p: Linear, t: Tile, layout: Layout, split: int) -> Program:
    """y[t] = act(parts[0, t] + parts[1, t] + ... + bias), in this order: the same sum in every run."""
    b = Builder("linear_sum", layout, "y[t] = act(parts[0, t] + parts[1, t] + ... + bias)")
    b.scalar("T")
    wide = p.blocks * p.rows
    b.grid("column", f"cdiv({wide}, {t.n})")
    b.grid("tile", f"cdiv(T, {t.m})")
    b.tensor("parts", "f32", split, "T", wide)
    _declare_end(b, p)
    b.tensor("y", p.out, "T", wide, role="output")
    b.let("row", f"tile * {t.m} + arange({t.m})")
    b.let("live", "row < T")
    b.let("place", f"column * {t.n} + arange({t.n})")
    b.let("n_live", f"place < {wide}")
    mask = "live[:, None] & n_live[None, :]"
    b.let("gate", f'full({t.m}, {t.n}, 0.0, "f32")', (t.m, t.n), "f32")
    with b.loop("i", 0, split, 1):
        b.load("part", "parts", ["i", "row[:, None]", "place[None, :]"], mask, shape=(t.m, t.n))
        b.let("gate", "gate + part", (t.m, t.n), "f32")
    store_rows(
        b, "y", p.out, _end_of_sums(b, p, {"gate": "gate"}), (t.m, t.n), wide, ("row", "place", f"column * {t.n}")
    )
    return b.program()


def _declare_end(b: Builder, p: Linear) -> None:
    if p.bias:
        b.tensor("bias", "f32", p.blocks * p.rows * (2 if p.act.gated else 1), role="weight")


def _weight_rows(b: Builder, p: Linear) -> tuple[str, ...]:
    """Add the index vectors of the weight's rows, one for each sum, and return the sums' names."""
    first = f"block * {p.rows * (2 if p.act.gated else 1)} + " if p.blocks > 1 and not p.weight.experts else ""
    if not p.act.gated:
        b.let("gate_row", f"{first}n")
        return ("gate",)
    b.let("gate_row", f"{first}n * 2" if p.act.interleaved else f"{first}n")
    b.let("value_row", f"{first}n * 2 + 1" if p.act.interleaved else f"{first}n + {p.rows}")
    return "gate", "value"


def part_of_depth(b: Builder, whole: int, step: int, split: int) -> tuple[str, str]:
    """Add the bounds of one part of a depth that is cut in `split` parts, multiples of `step`, and return them."""
    if split == 1:
        return "0", str(whole)
    span = -(-whole // (step * split)) * step
    b.let("start", f"part * {span}")
    b.let("stop", f"minimum(start + {span}, {whole})")
    return "start", "stop"


def _end_of_sums(b: Builder, p: Linear, value: dict[str, str]) -> str:
    """Return the expression of finished sums with bias and activation."""
    if p.bias:
        first = f"block * {2 * p.rows} + " if p.act.gated and p.blocks > 1 and p.weight.experts else ""
        for acc in value:
            at = f"{first}{acc}_row" if p.act.gated else "place"
            b.load(f"{acc}_bias", "bias", [at], "n_live")
            value[acc] = f"({value[acc]} + {acc}_bias[None, :])"
    return activation_text(p.act, value)
