"""The kernels of nn.compressed_attention: a window of tokens and compressed entries, whose keys are their values.

All heads of a token share the keys, so a tile's rows are the heads of one token or of a few. With selected entries each
token has its own, and a tile has the heads of one token only: the entries are loaded by their numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..tile.builder import Builder, Layout
from ..tile.tiles import Program
from .attend import Attend, Blocks, column_parts, declare_portions, merge_portions
from .choices import AttentionTile, RowTile


@dataclass(frozen=True)
class Compressed:
    """q [B, S, H, D] on kv [B, S, D], the window [B, min(P, window - 1), D] before it and entries [B, C, D].

    `ratio` 0: there are no entries; else (P + S) // ratio of the C are there. `selected`: of these, for each token those
    of selected i32[B, S, J], -1 for no entry. The tokens' positions are P + i.
    """

    heads: int
    width: int
    window: int
    scale: float
    ratio: int = 0
    selected: bool = False
    dtype: str = "bf16"

    @property
    def kept(self) -> str:
        """The number of tokens that the window holds before this step."""
        return f"minimum(P, {self.window - 1})"

    @property
    def scalars(self) -> tuple[str, ...]:
        """The ints of a launch."""
        return ("B", "S", "P", *(["C"] if self.ratio else []), *(["J"] if self.selected else []))


def compressed_attention(p: Compressed, t: AttentionTile, layout: Layout) -> Program:
    """Attend: t.m rows (token, head) for each point of the grid, or with t.split their portions for `compressed_merge`."""
    b = Builder("compressed_attention", layout, "y = softmax(scale q k, sinks) k over the last tokens and the entries")
    b.scalar(*p.scalars)
    across = -(-p.heads // t.m)
    b.grid("tile", f"S * {across}" if p.selected else f"cdiv(S * {p.heads}, {t.m})")
    b.grid("batch", "B")
    if t.split > 1:
        b.grid("part", t.split)
    b.tensor("q", p.dtype, "B", "S", p.heads, p.width)
    b.tensor("kv", p.dtype, "B", "S", p.width)
    b.tensor("window", p.dtype, "B", p.kept, p.width)
    if p.ratio:
        b.tensor("entries", p.dtype, "B", "C", p.width)
    if p.selected:
        b.tensor("selected", "i32", "B", "S", "J")
    b.tensor("sinks", "f32", p.heads, role="weight")
    if t.split > 1:
        declare_portions(b, t.split, f"B * S * {p.heads}", p.width)
    else:
        b.tensor("y", p.dtype, "B", "S", p.heads, p.width, role="output")
    if p.selected:
        b.let("own", f"tile // {across}")
        b.let("head", f"tile % {across} * {t.m} + arange({t.m})")
        b.let("live", f"head < {p.heads}")
        b.let("token", "own + head * 0")
        b.let("first", "own")
        b.let("last", "own")
    else:
        b.let("row", f"tile * {t.m} + arange({t.m})")
        b.let("live", f"row < S * {p.heads}")
        b.let("token", f"row // {p.heads}")
        b.let("head", f"row % {p.heads}")
        b.let("first", f"tile * {t.m} // {p.heads}")
        b.let("last", f"minimum((tile * {t.m} + {t.m - 1}) // {p.heads}, S - 1)")
    run = Attend(t, column_parts(t.part, p.width), column_parts(t.part, p.width), p.scale, 0.0, p.dtype)
    run.queries(b, lambda part: ("q", ["batch", "token[:, None]", "head[:, None]", part.column]))
    run.begin(b, "sinks", "part == 0" if t.split > 1 else "")
    for blocks in _add_blocks(b, p):
        run.run(b, blocks)
    if t.split > 1:
        run.store_portion(b, f"(batch * S + token) * {p.heads} + head")
    else:
        run.finish(b, "y", lambda column: ["batch", "token[:, None]", "head[:, None]", column], p.dtype)
    return b.program()


def _add_blocks(b: Builder, p: Compressed) -> list[Blocks]:
    """Add what the loops need and return them: the window before this step, its own tokens, the entries."""
    b.let("kept", p.kept)
    found = [
        Blocks(
            "old", f"maximum(kept + first - {p.window - 1}, 0)", "kept",
            lambda part: ("window", ["batch", "j[:, None]", part.column]),
            f"((kept + token)[:, None] - j[None, :] < {p.window})",
        ),
        Blocks(
            "new", f"maximum(first - {p.window - 1}, 0)", "last + 1",
            lambda part: ("kv", ["batch", "j[:, None]", part.column]),
            f"(j[None, :] <= token[:, None]) & (token[:, None] - j[None, :] < {p.window})",
        ),
    ]  # fmt: skip
    if p.selected:

        def prepare(before: str) -> str:
            b.load("chosen", "selected", ["batch", "own", "j"], before, other=-1)
            return f"(chosen >= 0) & (chosen < (P + own + 1) // {p.ratio})"

        key = ["batch", "chosen[:, None]"]
        found.append(Blocks("entry", "0", "J", lambda part: ("entries", [*key, part.column]), "", prepare))
    elif p.ratio:
        ended = f"((P + token + 1) // {p.ratio})[:, None]"
        key = ["batch", "j[:, None]"]
        stop, visible = f"(P + last + 1) // {p.ratio}", f"(j[None, :] < {ended})"
        found.append(Blocks("entry", "0", stop, lambda part: ("entries", [*key, part.column]), visible))
    return found


def compressed_merge(p: Compressed, t: RowTile, layout: Layout, split: int) -> Program:
    """Put the portions of a split together: y [B S H, D]."""
    b = Builder("compressed_merge", layout, "y = sum of portions exp2(tops - top) / sum of totals exp2(tops - top)")
    b.scalar("B", "S")
    merge_portions(b, split, f"B * S * {p.heads}", p.width, p.dtype, (t.m, t.n))
    return b.program()


def slide_kernel(width: int, t: RowTile, layout: Layout, dtype: str = "bf16") -> Program:
    """kept[i] = [old, new][O + S - Y + i]: the last Y of O tokens and S new ones, as the state for the next step."""
    b = Builder("slide", layout, "kept [B, Y, N] = the last Y tokens of old [B, O, N] and new [B, S, N]")
    b.scalar("B", "O", "S", "Y")
    b.grid("tile", f"cdiv(Y, {t.m})")
    b.grid("column", f"cdiv({width}, {t.n})")
    b.grid("batch", "B")
    b.tensor("old", dtype, "B", "O", width)
    b.tensor("new", dtype, "B", "S", width)
    b.tensor("kept", dtype, "B", "Y", width, role="output")
    shape = (t.m, t.n)
    b.let("i", f"tile * {t.m} + arange({t.m})")
    b.let("n", f"column * {t.n} + arange({t.n})")
    b.let("live", f"(i < Y)[:, None] & (n < {width})[None, :]", shape, "bool")
    b.let("place", "i + (O + S - Y)")
    b.let("is_old", "live & (place < O)[:, None]", shape, "bool")
    b.let("is_new", "live & (place >= O)[:, None]", shape, "bool")
    b.load("before", "old", ["batch", "place[:, None]", "n[None, :]"], "is_old", shape=shape)
    b.load("after", "new", ["batch", "(place - O)[:, None]", "n[None, :]"], "is_new", shape=shape)
    b.let("both", "where(is_old, before, after)", shape, dtype)
    b.store("kept", ["batch", "i[:, None]", "n[None, :]"], "both", "live")
    return b.program()
