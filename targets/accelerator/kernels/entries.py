"""The kernels of compressed entries: making them (nn.compress_tokens), their scores and the choice (nn.select_entries)."""

from __future__ import annotations

from dataclasses import dataclass

from ....compiler.errors import MoecError
from ..tile.builder import Builder, Layout
from ..tile.tiles import Program
from .attend import column_parts
from .choices import AttentionTile, RowTile
from .norm import power_of_two


@dataclass(frozen=True)
class Select:
    """nn.select_entries: `heads` index heads of `width` values, the k best of the entries that a token sees."""

    heads: int
    width: int
    k: int
    ratio: int
    dtype: str = "bf16"  # of q and keys


def entry_scores(p: Select, t: AttentionTile, layout: Layout) -> Program:
    """score[b, t, w] = sum over heads of weights relu(q keys[w]), f32 [B, S, E]; -inf for entries that t does not see.

    E = (P + S) // ratio of the C entries. A tile's rows are the heads of one token or of several, padded to a power of
    two; MoecError where t.m is less than the heads of one.
    """
    each = power_of_two(p.heads)
    if t.m < each:
        raise MoecError(f"a tile of {t.m} rows does not hold the {p.heads} heads of a token", todo=f"take {each} rows")
    tokens = t.m // each
    b = Builder("entry_scores", layout, "scores[b, t, w] = sum_h weights[b, t, h] relu(q[b, t, h] keys[b, w])")
    b.scalar("B", "S", "P", "C")
    entries = f"((P + S) // {p.ratio})"
    b.grid("column", f"cdiv({entries}, {t.n})")
    b.grid("tile", f"cdiv(S, {tokens})")
    b.grid("batch", "B")
    b.tensor("q", p.dtype, "B", "S", p.heads, p.width)
    b.tensor("keys", p.dtype, "B", "C", p.width)
    b.tensor("weights", "f32", "B", "S", p.heads)
    b.tensor("scores", "f32", "B", "S", entries, role="output")
    b.let("row", f"arange({t.m})")
    b.let("token", f"tile * {tokens} + row // {each}")
    b.let("head", f"row % {each}")
    b.let("live", f"(token < S) & (head < {p.heads})")
    b.let("j", f"column * {t.n} + arange({t.n})")
    b.let("key_live", f"j < {entries}")
    b.accumulator("s", (t.m, t.n))
    for part in column_parts(t.part, p.width):
        at = ["batch", "token[:, None]", "head[:, None]", part.column]
        b.far(f"q{part.number}", "q", at, part.mask("live"), (t.m, part.wide), second=False)
        at = ["batch", "j[:, None]", part.column]
        b.far(f"k{part.number}", "keys", at, part.mask("key_live"), (t.n, part.wide), second=True)
        with b.passing():
            b.dot("s", b.near(f"q{part.number}", second=False), b.near(f"k{part.number}", second=True))
    b.load("factor", "weights", ["batch", "token", "head"], "live")
    b.let("weighted", f"maximum({b.result('s')}, 0.0) * factor[:, None]", (t.m, t.n), "f32")
    b.let("summed", f"sum(reshape(weighted, {tokens}, {each}, {t.n}), 1)", (tokens, t.n), "f32")
    b.let("t", f"tile * {tokens} + arange({tokens})")
    seen = f"j[None, :] < ((P + t + 1) // {p.ratio})[:, None]"
    b.let("score", f"where({seen}, summed, -inf)", (tokens, t.n), "f32")
    b.store("scores", ["batch", "t[:, None]", "j[None, :]"], "score", "(t < S)[:, None] & key_live[None, :]")
    return b.program()


def choose_entries(p: Select, columns: int, layout: Layout) -> Program:
    """ids [B, S, J] = the J = min(k, E) entries with the largest scores in rising order of their numbers, -1 for -inf.

    Of equal scores the lower entry is chosen. The J-th largest score is found bit by bit: 32 times it is counted how many
    are as large, on integers in the order of the floats; so the cost does not grow with k.
    """
    b = Builder("choose_entries", layout, "ids[b, t] = the numbers of the k largest of scores[b, t], in rising order")
    b.scalar("B", "S", "E")
    b.grid("token", "S")
    b.grid("batch", "B")
    b.tensor("scores", "f32", "B", "S", "E")
    b.tensor("ids", "i32", "B", "S", f"minimum({p.k}, E)", role="output")
    b.let("wanted", f"minimum({p.k}, E)")
    b.let("level", 'cast(0, "i32")')
    _add_count(b, columns, "signs", "order >= 0")
    with b.when("count < wanted"):
        b.let("level", 'cast(-2147483648, "i32")')
    with b.loop("bit", 0, 31, 1):
        b.let("tried", 'level + (cast(1, "i32") << (30 - bit))')
        _add_count(b, columns, "turn", "order >= tried")
        b.let("level", "where(count >= wanted, tried, level)")
    _add_count(b, columns, "above", "order > level")
    b.let("spare", "wanted - count")  # how many of those at the level are chosen, the first ones
    b.let("equals", 'cast(0, "i32")')
    b.let("written", 'cast(0, "i32")')
    with b.loop("out", 0, "E", columns):
        _add_order_of_scores(b, columns, "out")
        b.let("same", "there & (order == level)")
        b.let("before", "equals + cumsum(same, 0)")
        b.let("chosen", "(there & (order > level)) | (same & (before <= spare))")
        b.let("equals", "equals + sum(same, 0)")
        b.let("id", "where(score == -inf, -1, j)")
        b.store("ids", ["batch", "token", "written + cumsum(chosen, 0) - 1"], "id", "chosen")
        b.let("written", "written + sum(chosen, 0)")
    return b.program()


def _add_order_of_scores(b: Builder, columns: int, loop: str) -> None:
    """Add the scores from `loop` on as integers in the same order."""
    b.let("j", f"{loop} + arange({columns})")
    b.let("there", "j < E")
    b.load("score", "scores", ["batch", "token", "j"], "there")
    b.let("bits", 'bitcast(where(score == 0, 0.0, score), "i32")')  # -0 is no less than 0
    b.let("order", "where(bits < 0, bits ^ 2147483647, bits)")


def _add_count(b: Builder, columns: int, loop: str, condition: str) -> None:
    b.let("count", 'cast(0, "i32")')
    with b.loop(loop, 0, "E", columns):
        _add_order_of_scores(b, columns, loop)
        b.let("count", f"count + sum(there & ({condition}), 0)")


@dataclass(frozen=True)
class Compress:
    """nn.compress_tokens: entries of `width` values from windows of `ratio` tokens, the last 2 `rotary` of them rotated.

    A token is x [B, S, 2 W], W = width, with `overlap` 2 width.
    """

    width: int
    ratio: int
    rotary: int
    overlap: bool
    eps: float
    dtype: str = "bf16"

    @property
    def pending(self) -> str:
        """The number of tokens kept from the steps before."""
        return f"(P % {self.ratio} + {self.ratio if self.overlap else 0})"


def compress_tokens(p: Compress, t: RowTile, layout: Layout) -> Program:
    """Append entries P // ratio .. (P + S) // ratio - 1 to the cache [B, C, width], t.m tokens of a window at once.

    The softmax over a window runs for each value by itself, so that the values that are rotated as pairs are kept as
    two rows from the start. What stays pending is `slide`'s to keep.
    """
    wide = p.width * (2 if p.overlap else 1)
    count = f"((P + S) // {p.ratio} - P // {p.ratio})"
    b = Builder("compress_tokens", layout, "entries[b, w] = turned(rms_norm(sum of softmax(logits + bias) values))")
    b.scalar("B", "S", "P", "C")
    b.grid("made", count)
    b.grid("batch", "B")
    b.tensor("x", p.dtype, "B", "S", 2 * wide)
    b.tensor("pending", p.dtype, "B", p.pending, 2 * wide)
    b.tensor("bias", "f32", p.ratio, wide, role="weight")
    b.tensor("norm", "f32", p.width, role="weight")
    for name in ("cos", "sin"):
        b.tensor(name, "f32", count, p.rotary)
    b.tensor("entries", p.dtype, "B", "C", p.width, role="output")
    b.let("held", p.pending)
    b.let("entry", f"P // {p.ratio} + made")
    start = p.width - 2 * p.rotary
    pieces = {"rest": (start, "rest_j"), "one": (p.rotary, f"{start} + one_j * 2"),
              "two": (p.rotary, f"{start + 1} + two_j * 2")}  # fmt: skip
    pieces = {name: piece for name, piece in pieces.items() if piece[0]}
    for name, (size, place) in pieces.items():
        columns = power_of_two(size)
        b.let(f"{name}_j", f"arange({columns})")
        b.let(f"{name}_there", f"{name}_j < {size}")
        b.let(f"{name}_at", place)
        b.let(f"{name}_top", f'full({columns}, -inf, "f32")')
        for kind in ("total", "sum"):
            b.let(f"{name}_{kind}", f'full({columns}, 0.0, "f32")')
        if p.overlap:  # the window before: none before the first
            with b.when("entry > 0"):
                _add_window(b, p, t, name, columns, wide, f"made * {p.ratio}", 0)
        own = f"(made + 1) * {p.ratio}" if p.overlap else f"made * {p.ratio}"
        _add_window(b, p, t, name, columns, wide, own, p.width if p.overlap else 0)
        b.let(f"{name}_mean", f"where({name}_there, {name}_sum / {name}_total, 0.0)")
    squares = " + ".join(f"sum({name}_mean * {name}_mean, 0)" for name in pieces)
    b.let("factor", f"rsqrt(({squares}) / {p.width} + {p.eps})")
    for name in pieces:
        b.load(f"{name}_norm", "norm", [f"{name}_at"], f"{name}_there")
        b.let(name, f"{name}_mean * factor * {name}_norm")
    value = {"rest": "rest"}
    if p.rotary:
        b.load("cos_row", "cos", ["made", "one_j"], "one_there")
        b.load("sin_row", "sin", ["made", "one_j"], "one_there")
        value |= {"one": "one * cos_row - two * sin_row", "two": "two * cos_row + one * sin_row"}
    for name in pieces:
        b.store("entries", ["batch", "entry", f"{name}_at"], f'cast({value[name]}, "{p.dtype}")', f"{name}_there")
    return b.program()


def _add_window(b: Builder, p: Compress, t: RowTile, name: str, columns: int, wide: int, first: str, half: int) -> None:
    """Add a window's tokens, from token `first` of the stream on, to the softmax of one piece of the values."""
    shape = (t.m, columns)
    with b.loop(f"{name}_token{half}", 0, p.ratio, t.m):
        b.let("i", f"{name}_token{half} + arange({t.m})")
        b.let("place", f"{first} + i")
        b.let("live", f"i < {p.ratio}")
        for source, rows in (("pending", "place"), ("x", "(place - held)")):
            there = "(place < held)" if source == "pending" else "(place >= held)"
            mask = f"(live & {there})[:, None] & {name}_there[None, :]"
            for kind, offset in (("value", half), ("logit", wide + half)):
                at = ["batch", f"{rows}[:, None]", f"({name}_at + {offset})[None, :]"]
                b.load(f"{name}_{source}_{kind}", source, at, mask, shape=shape)
        mask = f"live[:, None] & {name}_there[None, :]"
        b.load(f"{name}_bias", "bias", ["i[:, None]", f"({name}_at + {half})[None, :]"], mask, shape=shape)
        for kind in ("value", "logit"):  # one of the two is 0
            text = f'cast({name}_pending_{kind}, "f32") + cast({name}_x_{kind}, "f32")'
            text = text if kind == "value" else f"where(live[:, None], {text} + {name}_bias, -inf)"
            b.let(f"{name}_{kind}", text, shape, "f32")
        b.let("higher", f"maximum({name}_top, max({name}_logit, 0))")
        b.let("fade", f"exp({name}_top - higher)")
        b.let(f"{name}_weight", f"exp({name}_logit - higher[None, :])", shape, "f32")
        b.let(f"{name}_total", f"{name}_total * fade + sum({name}_weight, 0)")
        b.let(f"{name}_sum", f"{name}_sum * fade + sum({name}_weight * {name}_value, 0)")
        b.let(f"{name}_top", "higher")
