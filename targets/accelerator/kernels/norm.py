"""The kernels of norms, over rows of any width: in one piece where a tile holds a row, in a loop over it elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from ..tile.builder import Builder, Layout
from ..tile.tiles import Program
from .choices import RowTile
from .low_precision import column_loop, declare_rows, store_rows


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis of x [T, width]: nn.rms_norm, nn.layer_norm (`centred`), nn.add_rms_norm (`add`)."""

    width: int
    eps: float
    weight: bool = True
    bias: bool = False
    centred: bool = False
    add: bool = False
    dtype: str = "bf16"  # of x, residual and sum
    out: str = "bf16"  # of y
    plain: bool = True  # whether y is stored
    rounded: str = ""  # the format, or the dtype, in which it is stored too
    bits: str = ""  # as in Packing


def power_of_two(n: int, least: int = 1) -> int:
    """Return the least power of two that holds n."""
    return max(least, 1 << (max(n, 1) - 1).bit_length())


def norm_kernel(p: Norm, t: RowTile, layout: Layout) -> Program:
    """Compute the norm that a problem is."""
    return (layer_norm if p.centred else add_rms_norm if p.add else rms_norm)(p, t, layout)


def rms_norm(p: Norm, t: RowTile, layout: Layout) -> Program:
    """y = x / sqrt(mean(x²) + eps) w."""
    return _norm_kernel(p, t, layout, "rms_norm", "y = x / sqrt(mean(x²) + eps) w")


def add_rms_norm(p: Norm, t: RowTile, layout: Layout) -> Program:
    """sum = x + residual, rounded to its dtype, and y = its rms_norm."""
    return _norm_kernel(p, t, layout, "add_rms_norm", "sum = x + residual; y = sum / sqrt(mean(sum²) + eps) w")


def layer_norm(p: Norm, t: RowTile, layout: Layout) -> Program:
    """y = (x - mean(x)) / sqrt(var(x) + eps) w + b."""
    return _norm_kernel(p, t, layout, "layer_norm", "y = (x - mean(x)) / sqrt(var(x) + eps) w + b")


def _norm_kernel(p: Norm, t: RowTile, layout: Layout, name: str, doc: str) -> Program:
    b = Builder(name, layout, doc)
    b.scalar("T")
    b.grid("tile", f"cdiv(T, {t.m})")
    b.tensor("x", p.dtype, "T", p.width)
    if p.add:
        b.tensor("residual", p.dtype, "T", p.width)
    for given, there in (("w", p.weight), ("b", p.bias)):
        if there:
            b.tensor(given, "f32", p.width, role="weight")
    if p.plain:
        b.tensor("y", p.out, "T", p.width, role="output")
    if p.rounded:
        declare_rows(b, "rounded", p.rounded, "T", p.width, role="output")
    if p.add:
        b.tensor("sum", p.dtype, "T", p.width, role="output")
    b.let("row", f"tile * {t.m} + arange({t.m})")
    b.let("live", "row < T")
    whole = t.n >= p.width
    b.let("total", f'full({t.m}, 0.0, "f32")')
    with column_loop(b, p.width, t.n, "c0"):
        _add_read(b, p, t, "c0")
        b.let("total", "total + sum(v, 1)" if p.centred else "total + sum(v * v, 1)")
    if p.centred:
        b.let("mean", f"total / {p.width}")
        b.let("total", f'full({t.m}, 0.0, "f32")')
        with column_loop(b, p.width, t.n, "c1"):
            if not whole:
                _add_read(b, p, t, "c1")
            centred = "where(there, v - mean[:, None], 0.0)"
            b.let("d", centred, (t.m, t.n), "f32")
            b.let("total", "total + sum(d * d, 1)")
    b.let("factor", f"rsqrt(total / {p.width} + {p.eps})")
    with column_loop(b, p.width, t.n, "c2") as first:
        if not whole:
            _add_read(b, p, t, "c2")
        column = "c0" if whole else "c2"
        text = "(v - mean[:, None]) * factor[:, None]" if p.centred else "v * factor[:, None]"
        for given, there, sign in (("w", p.weight, "*"), ("b", p.bias, "+")):
            if there:
                b.load(f"{given}_row", given, [column], f"{column} < {p.width}")
                text = f"{text} {sign} {given}_row[None, :]"
        b.let("normed", text, (t.m, t.n), "f32")
        for name, dtype in (("y", p.out if p.plain else ""), ("rounded", p.rounded)):
            if dtype:
                store_rows(b, name, dtype, "normed", (t.m, t.n), p.width, ("row", column, first), p.bits)
        if p.add:
            b.store("sum", ["row[:, None]", f"{column}[None, :]"], "both", "there")
    return b.program()


def _add_read(b: Builder, p: Norm, t: RowTile, column: str) -> None:
    """Add `v`, the values that are normed in f32, and `there`, which of the tile there are."""
    shape, at = (t.m, t.n), ["row[:, None]", f"{column}[None, :]"]
    b.let("there", f"live[:, None] & ({column} < {p.width})[None, :]", shape, "bool")
    b.load("x_tile", "x", at, "there", shape=shape)
    source = "x_tile"
    if p.add:
        b.load("residual_tile", "residual", at, "there", shape=shape)
        total = 'cast(x_tile, "f32") + cast(residual_tile, "f32")'
        source = b.let("both", f'cast({total}, "{p.dtype}")', shape, p.dtype)
    b.let("v", f'cast({source}, "f32")', shape, "f32")
