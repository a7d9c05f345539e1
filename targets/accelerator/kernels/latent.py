"""Kernels of latent attention: rotate queries and append to both caches; make keys or values of cached latents."""

from __future__ import annotations

from dataclasses import dataclass

from ..tile.builder import Builder, Layout
from ..tile.packing import Packing
from ..tile.tiles import Program
from .choices import RowTile, Tile
from .experts import add_multiply
from .norm import power_of_two
from .stored_rows import CODES, add_row_scale, declare_cache, row_codes


@dataclass(frozen=True)
class LatentAppend:
    """What is done with new tokens: queries q [B, S, heads, row], of which the last `rope` numbers are rotated, and

    kv [B, S, width + rope], the latents, which are normed, and the part of the keys with positions, which is rotated.
    The angles are [C, S, rope], C the batch (`own_angles`) or 1. `pairs`: neighbours are rotated together, and come
    apart into two halves.
    """

    heads: int
    row: int
    width: int
    rope: int
    eps: float
    pairs: bool = False
    own_angles: bool = False
    dtype: str = "bf16"
    eight_bits: bool = False
    bits: str = ""


def latent_append(p: LatentAppend, t: RowTile, layout: Layout) -> Program:
    """Write q_rope [B, heads, S, rope], and slots P .. P + S - 1 of the caches, which have C slots; t.m rows a point."""
    b = Builder(
        "latent_append", layout, "q_rope = q rotated; latent[:, :, P:] = kv normed; key_rope[:, :, P:] = kv rotated"
    )
    b.scalar("B", "S", "P", "C")
    queries = f"cdiv(S * {p.heads}, {t.m})"
    b.grid("tile", f"{queries} + cdiv(S, {t.m})")  # rows (token, head) of the queries, then tokens of the keys
    b.grid("batch", "B")
    b.tensor("q", p.dtype, "B", "S", p.heads, p.row)
    b.tensor("kv", p.dtype, "B", "S", p.width + p.rope)
    b.tensor("norm", "f32", p.width, role="weight")
    for name in ("cos", "sin"):
        b.tensor(name, "f32", "B" if p.own_angles else 1, "S", p.rope)
    b.tensor("q_rope", p.dtype, "B", p.heads, "S", p.rope, role="output")
    declare_cache(b, "latent", p.dtype, p.eight_bits, "B", 1, "C", p.width, role="output")
    b.tensor("key_rope", p.dtype, "B", 1, "C", p.rope, role="output")
    b.let("angles", "batch" if p.own_angles else "0")
    with b.when(f"tile < {queries}"):
        b.let("row", f"tile * {t.m} + arange({t.m})")
        b.let("token", f"row // {p.heads}")
        b.let("head", f"row % {p.heads}")
        b.let("live", "token < S")
        at = ["batch", "token[:, None]", "head[:, None]"]
        _rotate(b, p, t, "q", at, p.row - p.rope, "q_rope", ["batch", "head[:, None]", "token[:, None]"])
    with b.when(f"tile >= {queries}"):
        b.let("token", f"(tile - {queries}) * {t.m} + arange({t.m})")
        b.let("live", "token < S")
        slot = ["batch", "0", "(P + token)[:, None]"]
        wide = power_of_two(p.width)
        b.let("j", f"arange({wide})")
        b.let("there", f"live[:, None] & (j < {p.width})[None, :]", (t.m, wide), "bool")
        b.load("given", "kv", ["batch", "token[:, None]", "j[None, :]"], "there", shape=(t.m, wide))
        b.let("v", 'cast(given, "f32")', (t.m, wide), "f32")
        b.let("factor", f"rsqrt(sum(v * v, 1) / {p.width} + {p.eps})")
        b.load("weight", "norm", ["j"], f"j < {p.width}")
        if p.eight_bits:
            b.let("latent_row", "v * factor[:, None] * weight[None, :]", (t.m, wide), "f32")
            add_row_scale(b, ("latent_row",))
            b.let("normed_codes", row_codes("latent_row", p.bits), (t.m, wide), CODES)
            b.store("latent_codes", [*slot, "j[None, :]"], "normed_codes", "there")
            b.store("latent_scales", ["batch", "0", "P + token", "0"], "by", "live")
        else:
            b.let("normed", f'cast(v * factor[:, None] * weight[None, :], "{p.dtype}")', (t.m, wide), p.dtype)
            b.store("latent", [*slot, "j[None, :]"], "normed", "there")
        _rotate(b, p, t, "kv", ["batch", "token[:, None]"], p.width, "key_rope", slot)
    return b.program()


def _rotate(
    b: Builder, p: LatentAppend, t: RowTile, source: str, at: list[str], first: int, target: str, to: list[str]
) -> None:
    """Add the rotation of `rope` numbers of a tensor from `first` on, and the store of its halves."""
    half = p.rope // 2
    wide = power_of_two(half)
    shape = (t.m, wide)
    b.let("i", f"arange({wide})")
    mask = "live[:, None]" + ("" if wide == half else f" & (i < {half})[None, :]")
    columns = (
        (f"({first} + i * 2)", f"({first + 1} + i * 2)") if p.pairs else (f"({first} + i)", f"({first + half} + i)")
    )
    for name, column, start in zip(("one", "two"), columns, (0, half), strict=True):
        b.load(f"{name}_given", source, [*at, f"{column}[None, :]"], mask, shape=shape)
        b.let(name, f'cast({name}_given, "f32")', shape, "f32")
        for angle in ("cos", "sin"):
            place = ["angles", "token[:, None]", f"({start} + i)[None, :]"]
            b.load(f"{name}_{angle}", angle, place, mask, shape=shape)
    for name, value, start in (
        ("one", "one * one_cos - two * one_sin", 0), ("two", "two * two_cos + one * two_sin", half),
    ):  # fmt: skip
        b.let(f"{name}_out", f'cast({value}, "{p.dtype}")', shape, p.dtype)
        b.store(target, [*to, f"({start} + i)[None, :]"], f"{name}_out", mask)


def widen_kernel(width: int, t: RowTile, layout: Layout, dtype: str = "bf16") -> Program:
    """wide [B, 1, P + S, width] = the latents of P + S tokens, which lie in 8 bits."""
    b = Builder("widen", layout, "wide[b, token] = codes[b, token] scale[b, token]")
    b.scalar("B", "S", "P", "C")
    b.grid("tile", f"cdiv(P + S, {t.m})")
    b.grid("column", f"cdiv({width}, {t.n})")
    b.grid("batch", "B")
    declare_cache(b, "latent", dtype, True, "B", 1, "C", width)
    b.tensor("wide", dtype, "B", 1, "P + S", width, role="output")
    b.let("token", f"tile * {t.m} + arange({t.m})")
    b.let("n", f"column * {t.n} + arange({t.n})")
    b.let("live", "token < P + S")
    b.let("there", f"live[:, None] & (n < {width})[None, :]", (t.m, t.n), "bool")
    at = ["batch", "0", "token[:, None]", "n[None, :]"]
    b.load("codes", "latent_codes", at, "there", shape=(t.m, t.n))
    b.load("scale", "latent_scales", ["batch", "0", "token", "0"], "live")
    b.let("widened", f'cast(cast(codes, "f32") * scale[:, None], "{dtype}")', (t.m, t.n), dtype)
    b.store("wide", at, "widened", "there")
    return b.program()


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


def expand_kernel(p: Expand, t: Tile, layout: Layout) -> Program:
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
    sums = _add_sums_by_columns(b, p, t) if p.turned else _add_sums_by_rows(b, p, t)
    for acc, (first, width) in sums.items():
        column = f"(column * {t.n} + {first} + arange({width}))[None, :]"
        b.let(f"y_{acc}", f'cast({b.result(acc)}, "{p.dtype}")', (t.m, width), p.dtype)
        mask = f"live[:, None] & ({column} < {p.rows})"
        b.store("y", ["batch", "head", "row[:, None]", column], f"y_{acc}", mask)
    return b.program()


def _add_sums_by_rows(b: Builder, p: Expand, t: Tile) -> dict[str, tuple[int, int]]:
    """Add the sums over a weight whose rows are the results, and return the columns of each."""
    b.let("w_row", f"head * {p.rows} + n")
    b.accumulator("acc", (t.m, t.n))
    with b.loop("k", 0, p.depth, t.k, t.stages):
        add_multiply(
            b, p.weight, "w", "latent", "row", p.depth, t, {"acc": "w_row"}, "", lead=["batch", "0"], dtype=p.dtype
        )
    return {"acc": (0, t.n)}


def _add_sums_by_columns(b: Builder, p: Expand, t: Tile) -> dict[str, tuple[int, int]]:
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
