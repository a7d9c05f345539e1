"""The kernels of hyper-connections: the streams' scores, their mix into a sublayer's input, and what goes back to them.

`stream_scores` is a matmul with few columns and a long row, cut along the row for few tokens; `streams_in` turns the
scores into weights, each tile of columns for itself, and mixes; `streams_out` is nn.hyper_connection_post.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tile.builder import Builder, Layout
from ..tile.tiles import Program
from .choices import RowTile, Tile
from .dense import part_of_depth
from .norm import power_of_two


@dataclass(frozen=True)
class Streams:
    """x [T, N, D], w f32 [M, N D]: nn.hyper_connection_pre, M = N (N + 2), or with `head` nn.hyper_connection_head, M = N."""

    streams: int
    width: int
    eps: float
    floor: float
    iterations: int = 1
    head: bool = False
    dtype: str = "bf16"  # of x, y and the streams; what mixes them is f32

    @property
    def scores(self) -> int:
        """Rows of w."""
        return self.streams if self.head else self.streams * (self.streams + 2)


def stream_scores(p: Streams, t: Tile, layout: Layout, split: int = 1) -> Program:
    """z [split, T, M] = x wᵀ and squares [split, T] = sum x², each over its part of the N D values of a token, f32."""
    b = Builder("stream_scores", layout, "z[i, t] = x[t, part i] w[:, part i]ᵀ, squares[i, t] = sum x[t, part i]²")
    b.scalar("T")
    whole, wide = p.streams * p.width, power_of_two(p.scores, 16)
    b.grid("part", split)
    b.grid("tile", f"cdiv(T, {t.m})")
    b.tensor("x", p.dtype, "T", whole)
    b.tensor("w", "f32", p.scores, whole, role="weight")
    b.tensor("z", "f32", split, "T", p.scores, role="output")
    b.tensor("squares", "f32", split, "T", role="output")
    b.let("row", f"tile * {t.m} + arange({t.m})")
    b.let("live", "row < T")
    b.let("n", f"arange({wide})")
    b.let("n_live", f"n < {p.scores}")
    b.let("total", f'full({t.m}, 0.0, "f32")')
    b.accumulator("acc", (t.m, wide))
    start, stop = part_of_depth(b, whole, t.k, split)
    with b.loop("k", start, stop, t.k, t.stages):
        b.let("column", f"k + arange({t.k})")
        inside = "" if whole % t.k == 0 else f" & (column < {whole})[None, :]"
        b.load("x_tile", "x", ["row[:, None]", "column[None, :]"], f"live[:, None]{inside}", shape=(t.m, t.k))
        b.let("a", 'cast(x_tile, "f32")', (t.m, t.k), "f32")
        b.let("total", "total + sum(a * a, 1)")
        second = b.operand(
            "w_tile", "w", ["n[:, None]", "column[None, :]"], f"n_live[:, None]{inside}", (wide, t.k), second=True
        )
        b.dot("acc", b.as_operand("a", second=False), second)
    b.store("z", ["part", "row[:, None]", "n[None, :]"], b.result("acc"), "live[:, None] & n_live[None, :]")
    b.store("squares", ["part", "row"], "total", "live")
    return b.program()


def streams_in(p: Streams, t: RowTile, layout: Layout, split: int = 1) -> Program:
    """y [T, D] = sum of the streams by their weights; without `head` also post f32 [T, N] and mix f32 [T, N, N].

    The weights come from the scores of `stream_scores`, base [M] and scale [3] ([1] for the head), as
    nn.hyper_connection_pre says.
    """
    n = power_of_two(p.streams)
    b = Builder("streams_in", layout, "y[t] = sum over streams of pre[t, n] x[t, n]; post and mix for the way back")
    b.scalar("T")
    b.grid("column", f"cdiv({p.width}, {t.n})")
    b.grid("tile", f"cdiv(T, {t.m})")
    b.tensor("x", p.dtype, "T", p.streams, p.width)
    b.tensor("z", "f32", split, "T", p.scores)
    b.tensor("squares", "f32", split, "T")
    b.tensor("base", "f32", p.scores, role="weight")
    b.tensor("scale", "f32", 1 if p.head else 3, role="weight")
    b.tensor("y", p.dtype, "T", p.width, role="output")
    b.let("row", f"tile * {t.m} + arange({t.m})")
    b.let("live", "row < T")
    b.let("total", f'full({t.m}, 0.0, "f32")')
    with b.loop("i", 0, split, 1):
        b.load("square", "squares", ["i", "row"], "live")
        b.let("total", "total + square")
    b.let("factor", f"rsqrt(total / {p.streams * p.width} + {p.eps})")
    b.let("stream", f"arange({n})")
    b.let("is_stream", f"stream < {p.streams}")
    _add_affine(b, "pre", "stream", "is_stream", (t.m, n), split, 0)
    b.let("pre", f"sigmoid(pre) + {p.floor}", (t.m, n), "f32")
    if not p.head:
        b.tensor("post", "f32", "T", p.streams, role="output")
        b.tensor("mix", "f32", "T", p.streams, p.streams, role="output")
        with b.when("column == 0"):
            _add_post_and_mix(b, p, t, split)
    _add_mixed_streams(b, p, t, n)
    return b.program()


def _add_affine(b: Builder, name: str, index: str, there: str, shape: tuple[int, int], split: int, number: int) -> None:
    """Add `name` = z factor scale + base for the scores of some index vector."""
    mask = f"live[:, None] & ({there})[None, :]"
    b.let(name, f'full({shape[0]}, {shape[1]}, 0.0, "f32")', shape, "f32")
    with b.loop(f"{name}_part", 0, split, 1):
        at = [f"{name}_part", "row[:, None]", f"({index})[None, :]"]
        b.load(f"{name}_z", "z", at, mask, shape=shape)
        b.let(name, f"{name} + {name}_z", shape, "f32")
    b.load(f"{name}_scale", "scale", [str(number)])
    b.load(f"{name}_base", "base", [index], there)
    b.let(name, f"{name} * factor[:, None] * {name}_scale + {name}_base[None, :]", shape, "f32")


def _add_post_and_mix(b: Builder, p: Streams, t: RowTile, split: int) -> None:
    """Add post and mix, made doubly stochastic by turns (Sinkhorn and Knopp 1967)."""
    count, n = p.streams, power_of_two(p.streams)
    _add_affine(b, "post_z", f"stream + {count}", "is_stream", (t.m, n), split, 1)
    b.let("post_tile", "2.0 * sigmoid(post_z)", (t.m, n), "f32")
    b.store("post", ["row[:, None]", "stream[None, :]"], "post_tile", "live[:, None] & is_stream[None, :]")
    b.let("cell", f"arange({n * n})")
    b.let("source", f"cell // {n}")
    b.let("target", f"cell % {n}")
    b.let("is_cell", f"(source < {count}) & (target < {count})")
    _add_affine(b, "mix_z", f"source * {count} + target + {2 * count}", "is_cell", (t.m, n * n), split, 2)
    shape = (t.m, n, n)
    b.let("logits", f"reshape(where(is_cell[None, :], mix_z, -inf), {t.m}, {n}, {n})", shape, "f32")
    b.let("largest", "max(logits, 2)", shape[:2], "f32")
    b.let("level", "where(largest == -inf, 0.0, largest)", shape[:2], "f32")
    b.let("powers", "exp(logits - level[:, :, None])", shape, "f32")
    b.let("inside", f"is_stream[None, :, None] & (arange({n}) < {count})[None, None, :]", (1, n, n), "bool")

    def divide(value: str, axis: int, more: str) -> str:
        b.let("sums", f"sum({value}, {axis}) + {more}", shape[:2], "f32")
        b.let("divisor", "where(sums == 0, 1.0, sums)", shape[:2], "f32")
        return f"{value} / divisor{'[:, :, None]' if axis == 2 else '[:, None, :]'}"

    b.let("mixed", f"where(inside, {divide('powers', 2, '0.0')} + {p.floor}, 0.0)", shape, "f32")
    b.let("mixed", divide("mixed", 1, str(p.floor)), shape, "f32")
    with b.loop("turn", 1, p.iterations, 1):
        b.let("mixed", divide("mixed", 2, str(p.floor)), shape, "f32")
        b.let("mixed", divide("mixed", 1, str(p.floor)), shape, "f32")
    b.let("flat", f"reshape(mixed, {t.m}, {n * n})", (t.m, n * n), "f32")
    at = ["row[:, None]", "source[None, :]", "target[None, :]"]
    b.store("mix", at, "flat", "live[:, None] & is_cell[None, :]")


def _add_mixed_streams(b: Builder, p: Streams, t: RowTile, n: int) -> None:
    """Add y, the streams by their weights."""
    shape = (t.m, t.n)
    b.let("c", f"column * {t.n} + arange({t.n})")
    b.let("there", f"live[:, None] & (c < {p.width})[None, :]", shape, "bool")
    b.let("sum_", f'full({t.m}, {t.n}, 0.0, "f32")', shape, "f32")
    with b.loop("s", 0, p.streams, 1):
        b.let("weight", "sum(where((stream == s)[None, :], pre, 0.0), 1)")
        b.load("x_tile", "x", ["row[:, None]", "s", "c[None, :]"], "there", shape=shape)
        b.let("sum_", 'sum_ + weight[:, None] * cast(x_tile, "f32")', shape, "f32")
    b.let("y_tile", f'cast(sum_, "{p.dtype}")', shape, p.dtype)
    b.store("y", ["row[:, None]", "c[None, :]"], "y_tile", "there")


def streams_out(p: Streams, t: RowTile, layout: Layout) -> Program:
    """y[t, n] = post[t, n] x[t] + sum over m of mix[t, m, n] streams[t, m]."""
    b = Builder("streams_out", layout, "y[t, n] = post[t, n] x[t] + sum_m mix[t, m, n] streams[t, m]")
    b.scalar("T")
    b.grid("column", f"cdiv({p.width}, {t.n})")
    b.grid("stream", p.streams)
    b.grid("tile", f"cdiv(T, {t.m})")
    b.tensor("x", p.dtype, "T", p.width)
    b.tensor("streams", p.dtype, "T", p.streams, p.width)
    b.tensor("post", "f32", "T", p.streams)
    b.tensor("mix", "f32", "T", p.streams, p.streams)
    b.tensor("y", p.dtype, "T", p.streams, p.width, role="output")
    shape = (t.m, t.n)
    b.let("row", f"tile * {t.m} + arange({t.m})")
    b.let("live", "row < T")
    b.let("c", f"column * {t.n} + arange({t.n})")
    b.let("there", f"live[:, None] & (c < {p.width})[None, :]", shape, "bool")
    b.load("x_tile", "x", ["row[:, None]", "c[None, :]"], "there", shape=shape)
    b.load("own", "post", ["row", "stream"], "live")
    b.let("sum_", 'own[:, None] * cast(x_tile, "f32")', shape, "f32")
    with b.loop("m", 0, p.streams, 1):
        b.load("weight", "mix", ["row", "m", "stream"], "live")
        b.load("from_tile", "streams", ["row[:, None]", "m", "c[None, :]"], "there", shape=shape)
        b.let("sum_", 'sum_ + weight[:, None] * cast(from_tile, "f32")', shape, "f32")
    b.let("y_tile", f'cast(sum_, "{p.dtype}")', shape, p.dtype)
    b.store("y", ["row[:, None]", "stream", "c[None, :]"], "y_tile", "there")
    return b.program()
