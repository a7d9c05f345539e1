"""The inner part of every attention kernel: rows of queries against blocks of keys, with the softmax taken in one go.

The row maximum `top`, the sum of the weights `total` and the weighted sums of the values are kept while blocks pass, and
rescaled when the maximum grows (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).
Scores count in powers of two, which chips compute: log2(e) is multiplied into their scale.
Heads of any width are cut into parts whose widths are powers of two, 576 into 512 and 64 or into 128, 128, 128, 128, 64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import e, log2

from ..tile.builder import Builder
from .choices import AttentionTile
from .norm import power_of_two

LEAST = 16  # columns of the narrowest tile of a matmul
LOG2_E = log2(e)  # times a score: exp(x) = exp2(x log2(e))


@dataclass(frozen=True)
class Part:
    """Columns first .. first + live - 1 of a head, in a tile of `wide` columns.

    `apart`: of the part with positions, which lies in a tensor of its own.
    """

    number: int
    first: int
    wide: int
    live: int
    apart: bool = False

    @property
    def column(self) -> str:
        """The index vector of its columns."""
        return f"({self.first} + arange({self.wide}))[None, :]"

    def mask(self, rows: str) -> str:
        """Return the mask of a load or store of these columns for the rows that there are; no rows: all of them."""
        masks = [f"{rows}[:, None]"] if rows else []
        if self.wide != self.live:
            masks.append(f"({self.column} < {self.first + self.live})")
        return " & ".join(masks)


def column_parts(most: int, *widths: int) -> tuple[Part, ...]:
    """Cut columns into parts of at most `most`, powers of two; none reaches over the border between two of the widths."""
    found: list[Part] = []
    first = 0
    for width in widths:
        end = first + width
        while first < end:
            left = end - first
            wide = max(min(most, power_of_two(left + 1) // 2), LEAST)
            if power_of_two(left, LEAST) <= most and power_of_two(left, LEAST) - left < LEAST:
                wide = power_of_two(left, LEAST)
            found.append(Part(len(found), first, wide, min(wide, left)))
            first += min(wide, left)
    return tuple(found)


@dataclass(frozen=True)
class Blocks:
    """Keys that one loop goes through: `start` to `stop` in steps of a tile, `j` is the index vector in it.

    `key` gives the tensor and the indices of a part of the keys, `value` the indices of a column vector in
    `value_tensor`; None for a value: the keys are the values.
    `scale` and `value_scale` are the tensor and the indices of the scales of keys and values in 8 bits.
    `prepare` gets which keys are before `stop`, adds what the indices and `visible` need and returns which keys there
    are. `visible` is a bool [M, N] expression, or "". `whole`: every row may read all keys before it, so that blocks of
    them need no mask ("": of none is that known).
    """

    name: str
    start: str
    stop: str
    key: Callable[[Part], tuple[str, list[str]]]
    visible: str
    prepare: Callable[[str], str] = lambda before: before
    value_tensor: str = ""
    value: Callable[[str], list[str]] | None = None
    whole: str = ""
    scale: tuple[str, list[str]] | None = None
    value_scale: tuple[str, list[str]] | None = None


@dataclass(frozen=True)
class Attend:
    """One run's attention: the parts of a head of q and k and those of the values, and how scores become weights."""

    tile: AttentionTile
    keys: tuple[Part, ...]
    values: tuple[Part, ...]
    scale: float
    softcap: float
    dtype: str

    def queries(self, b: Builder, source: Callable[[Part], tuple[str, list[str]]]) -> None:
        """Add the loads of the queries, which stay, and what is kept while the keys pass.

        `source` gives the tensor and the indices of a part.
        """
        for part in self.keys:
            shape, (tensor, at) = (self.tile.m, part.wide), source(part)
            b.far(f"q{part.number}", tensor, at, part.mask("live"), shape, second=False)
        for part in self.values:
            shape = (self.tile.m, part.wide)
            b.let(f"o{part.number}", f'full({shape[0]}, {shape[1]}, 0.0, "f32")', shape, "f32")

    def begin(self, b: Builder, sinks: str, first: str = "") -> None:
        """Add `top` and `total` before any key: nothing, or a sink, which is a score that has no value.

        `first` is true in the one run of a split that counts the sink.
        """
        b.let("top", f'full({self.tile.m}, -inf, "f32")')
        b.let("total", f'full({self.tile.m}, 0.0, "f32")')
        if sinks:
            b.load("sink", sinks, ["head"], "live")
            with b.when(first or "1"):
                b.let("top", f'cast(sink, "f32") * {LOG2_E}')
                b.let("total", f'full({self.tile.m}, 1.0, "f32")')

    def portion(self, b: Builder, blocks: Blocks) -> tuple[str, str]:
        """Add the bounds of this run's keys and return their names."""
        start, stop = b.let(f"{blocks.name}_start", blocks.start), b.let(f"{blocks.name}_stop", blocks.stop)
        if self.tile.split > 1:
            n = self.tile.n
            own = b.let(f"{blocks.name}_own", f"cdiv(cdiv(maximum({stop} - {start}, 0), {n}), {self.tile.split}) * {n}")
            start = b.let(f"{blocks.name}_from", f"{start} + part * {own}")
            stop = b.let(f"{blocks.name}_to", f"minimum({stop}, {start} + {own})")
        return start, stop

    def run(self, b: Builder, blocks: Blocks) -> None:
        """Add the loop over blocks of keys, after one over those that every row reads whole, if that is known of some."""
        start, stop = self.portion(b, blocks)
        if blocks.whole:
            n = self.tile.n
            middle = b.let(
                f"{blocks.name}_middle", f"{start} + maximum(minimum({blocks.whole}, {stop}) - {start}, 0) // {n} * {n}"
            )
            self._loop(b, blocks, start, middle, whole=True)
            start = middle
        self._loop(b, blocks, start, stop)

    def _loop(self, b: Builder, blocks: Blocks, start: str, stop: str, whole: bool = False) -> None:
        with b.loop(f"{blocks.name}_first", start, stop, self.tile.n, self.tile.stages):
            b.let("j", f"{blocks.name}_first + arange({self.tile.n})")
            live = "" if whole else b.let("key_live", blocks.prepare(f"j < {stop}"))
            keys = self._scores(b, blocks, live)
            self._weights(b, blocks, live)
            self._values(b, blocks, live, keys)

    def _scores(self, b: Builder, blocks: Blocks, live: str) -> dict[int, str]:
        """Add the products of queries and keys, and return the names that parts of keys have as operands."""
        sums = {False: b.accumulator("s", (self.tile.m, self.tile.n))}
        if blocks.scale and any(part.apart for part in self.keys):
            sums[True] = b.accumulator("s_apart", (self.tile.m, self.tile.n))
        operands = dict[int, str]()
        for part in self.keys:
            tensor, at = blocks.key(part)
            wide = blocks.scale is not None and not part.apart
            name = self._far(b, f"k{part.number}", tensor, at, part.mask(live), part.wide, wide)
            with b.passing():
                operands[part.number] = self._near(b, name, wide)
                b.dot(sums.get(part.apart, "s"), b.near(f"q{part.number}", second=False), operands[part.number])
        return operands

    def _far(self, b: Builder, name: str, tensor: str, at: list[str], mask: str, columns: int, wide: bool) -> str:
        """Load a part of keys or values; `wide`: from codes, which become as wide as the queries."""
        shape = (self.tile.n, columns)
        if not wide:
            return b.far(name, tensor, at, mask, shape, second=True)
        codes = b.load(f"{name}_codes", tensor, at, mask, shape=shape)
        return b.let(name, f'cast(cast({codes}, "f32"), "{self.dtype}")', shape, self.dtype)

    def _near(self, b: Builder, name: str, wide: bool) -> str:
        return b.as_operand(name, second=True) if wide else b.near(name, second=True)

    def _weights(self, b: Builder, blocks: Blocks, live: str) -> None:
        shape = (self.tile.m, self.tile.n)
        s = b.result("s")
        if blocks.scale:
            tensor, at = blocks.scale
            b.load("key_scale", tensor, at, live)
            apart = f" + {b.result('s_apart')}" if any(part.apart for part in self.keys) else ""
            b.let("scored", f"{s} * key_scale[None, :]{apart}", shape, "f32")
            s = "scored"
        text = f"{s} * {self.scale * LOG2_E}"
        if self.softcap:
            text = f"{self.softcap * LOG2_E} * tanh({s} * {self.scale / self.softcap})"
        if live:
            visible = f"{live}[None, :]" + (f" & {blocks.visible}" if blocks.visible else "")
            text = f"where({visible}, {text}, -inf)"
        b.let("score", text, shape, "f32")
        b.let("higher", "maximum(top, max(score, 1))")
        b.let("level", "where(higher == -inf, 0.0, higher)" if live else "higher")  # rows that have seen nothing yet
        b.let("fade", "exp2(top - level)")
        b.let("weight", "exp2(score - level[:, None])", shape, "f32")
        b.let("total", "total * fade + sum(weight, 1)")
        b.let("top", "higher")
        weight = "weight"
        if blocks.value_scale:
            tensor, at = blocks.value_scale
            weight = f"weight * {'key_scale' if not blocks.value else b.load('value_scale', tensor, at, live)}[None, :]"
        b.let("p", f'cast({weight}, "{self.dtype}")', shape, self.dtype)

    def _values(self, b: Builder, blocks: Blocks, live: str, keys: dict[int, str]) -> None:
        weights = b.as_operand("p", second=False)
        wide = blocks.value_scale is not None
        for part in self.values:
            name = f"k{part.number}"
            if blocks.value:
                at = blocks.value(part.column)
                name = self._far(b, f"v{part.number}", blocks.value_tensor, at, part.mask(live), part.wide, wide)
            with b.passing():
                shape = (self.tile.m, part.wide)
                operand = keys[part.number] if wide and not blocks.value else self._near(b, name, wide)
                b.rescale_dot(f"o{part.number}", "fade[:, None]", weights, operand, shape)

    def finish(self, b: Builder, tensor: str, at: Callable[[str], list[str]], dtype: str) -> None:
        """Add the stores of the results; rows that have seen nothing are zeros."""
        b.let("divisor", "where(total == 0, 1.0, total)")
        for part in self.values:
            name, shape = f"y{part.number}", (self.tile.m, part.wide)
            b.let(name, f'cast(o{part.number} / divisor[:, None], "{dtype}")', shape, dtype)
            b.store(tensor, at(part.column), name, part.mask("live"))

    def store_portion(self, b: Builder, row: str) -> None:
        """Add the stores of a run that has seen a part of the keys: the sums as they are, with `top` and `total`."""
        for part in self.values:
            at = ["part", f"({row})[:, None]", part.column]
            b.store("portions", at, f"o{part.number}", part.mask("live"))
        b.store("tops", ["part", row], "top", "live")
        b.store("totals", ["part", row], "total", "live")


def declare_portions(b: Builder, split: int, rows: str, width: int, role: str = "output") -> None:
    """Declare what the runs of a split hand on: f32 [split, rows, width], [split, rows] and [split, rows]."""
    b.tensor("portions", "f32", split, rows, width, role=role)
    b.tensor("tops", "f32", split, rows, role=role)
    b.tensor("totals", "f32", split, rows, role=role)


def merge_portions(b: Builder, split: int, rows: str, width: int, dtype: str, shape: Sequence[int]) -> None:
    """Add the body of a merge: y [rows, width] from the portions of a split, tiles of `shape`."""
    b.grid("tile", f"cdiv({rows}, {shape[0]})")
    b.grid("column", f"cdiv({width}, {shape[1]})")
    declare_portions(b, split, rows, width, role="input")
    b.tensor("y", dtype, rows, width, role="output")
    b.let("row", f"tile * {shape[0]} + arange({shape[0]})")
    b.let("n", f"column * {shape[1]} + arange({shape[1]})")
    b.let("live", f"row < {rows}")
    b.let("there", f"live[:, None] & (n < {width})[None, :]", shape, "bool")
    b.let("best", f'full({shape[0]}, -inf, "f32")')
    with b.loop("i", 0, split, 1):
        b.load("top", "tops", ["i", "row"], "live")
        b.let("best", "maximum(best, top)")
    b.let("level", "where(best == -inf, 0.0, best)")
    b.let("sum_", f'full({shape[0]}, 0.0, "f32")')
    b.let("o", f'full({shape[0]}, {shape[1]}, 0.0, "f32")', shape, "f32")
    with b.loop("h", 0, split, 1):
        b.load("part_top", "tops", ["h", "row"], "live")
        b.load("part_total", "totals", ["h", "row"], "live")
        b.load("portion", "portions", ["h", "row[:, None]", "n[None, :]"], "there", shape=shape)
        b.let("factor", "exp2(part_top - level)")
        b.let("sum_", "sum_ + part_total * factor")
        b.let("o", "o + portion * factor[:, None]", shape, "f32")
    b.let("divisor", "where(sum_ == 0, 1.0, sum_)")
    b.let("y_tile", f'cast(o / divisor[:, None], "{dtype}")', shape, dtype)
    b.store("y", ["row[:, None]", "n[None, :]"], "y_tile", "there")
