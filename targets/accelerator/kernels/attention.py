"""The kernels of nn.attention and nn.cached_attention: any heads on groups of keys, window, chunk, softcap, sinks, masks.

A row of a tile is (new token, head of the group), so that all heads that share a group's keys share the loaded tiles:
with one new token and eight heads on a group, eight rows. Blocks of keys after the last token of a tile, before its
window or its chunk are not looked at. With chosen keys each token has its own, and a tile has the heads of one token:
keys are loaded by their numbers, and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ....compiler.errors import MoecError
from ..tile.builder import Builder, Layout
from ..tile.tiles import Program
from .attend import Attend, Blocks, Part, column_parts, declare_portions, merge_portions
from .choices import AttentionTile, RowTile
from .stored_rows import declare_cache

LOOK = 1024  # slots of the mask that are looked at in one step


@dataclass(frozen=True)
class Attention:
    """q [B, S, H, D] (`heads_first`: [B, H, S, D]) on a cache key [B, G, C, D], value [B, G, C, E]: y [B, S, H, E].

    The slots are 0 .. P + S - 1 of C, new token i is slot P + i. `mask`: "keys" for bool [B, P + S], "tokens" for bool
    [B, S, P + S]. `shared`: there is no value tensor, the first E values of a key are its value (the latent of MLA).
    `rope`: so many numbers of each head lie apart, in q_rope [B, H, S, rope] and key_rope [B, 1, C, rope], which all
    heads share. `row`: the numbers of a head of q in memory, of which the first D are read (0: D). `dense`: key and
    value have P + S slots. `selected`: of these slots a token reads those of selected i32[B, S, J] only, distinct numbers
    of which ones above its own slot are none. `best_first`: those that it reads are in front. `eight_bits`: key and value are as stored_rows.py has them.
    """

    heads: int
    groups: int
    width: int
    value_width: int
    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    mask: str = ""
    shared: bool = False
    heads_first: bool = False
    rope: int = 0
    row: int = 0
    dense: bool = False
    selected: bool = False
    best_first: bool = False
    eight_bits: bool = False
    dtype: str = "bf16"

    @property
    def scalars(self) -> tuple[str, ...]:
        """The ints of a launch."""
        return ("B", "S", "P", *(["C"] if self.rope or not self.dense else []), *(["J"] if self.selected else []))

    @property
    def shared_by(self) -> int:
        """The heads that share a group's keys."""
        return self.heads // self.groups

    @property
    def rows(self) -> str:
        """The number of rows of a group."""
        return f"S * {self.shared_by}"

    def tiles(self, rows: int) -> str:
        """Return the number of tiles of so many rows that a group has."""
        return f"S * {-(-self.shared_by // rows)}" if self.selected else f"cdiv({self.rows}, {rows})"


def attention_kernel(p: Attention, t: AttentionTile, layout: Layout) -> Program:
    """Attend: t.m rows of one group for each point of the grid, or with t.split their portions for `attention_merge`.

    MoecError where the heads do not divide into groups, values are to be shared that are wider than the keys,
    or chunks come with a mask for each token or with chosen slots.
    """
    _check_attention(p)
    b = Builder("attention", layout, "y = softmax(scale q keyᵀ) value over the slots that a token may read")
    b.scalar(*p.scalars)
    b.grid("tile", p.tiles(t.m))
    b.grid("pair", f"B * {p.groups}")
    if t.split > 1:
        b.grid("part", t.split)
    slots = "P + S" if p.dense else "C"
    b.tensor("q", p.dtype, "B", *((p.heads, "S") if p.heads_first else ("S", p.heads)), p.row or p.width)
    if p.rope:
        b.tensor("q_rope", p.dtype, "B", p.heads, "S", p.rope)
    declare_cache(b, "key", p.dtype, p.eight_bits, "B", p.groups, slots, p.width)
    if p.rope:
        b.tensor("key_rope", p.dtype, "B", 1, "C", p.rope)
    if not p.shared:
        declare_cache(b, "value", p.dtype, p.eight_bits, "B", p.groups, slots, p.value_width)
    if p.mask:
        b.tensor("mask", "bool", "B", *(["S"] if p.mask == "tokens" else []), "P + S")
    if p.selected:
        b.tensor("selected", "i32", "B", "S", "J")
    if p.sinks:
        b.tensor("sinks", "f32", p.heads, role="weight")
    if t.split > 1:
        declare_portions(b, t.split, f"B * S * {p.heads}", p.value_width)
    else:
        b.tensor("y", p.dtype, "B", "S", p.heads, p.value_width, role="output")
    _add_rows(b, p, t)
    run = _attend_of_tile(p, t)
    run.queries(b, lambda part: _query_indices(p, part))
    run.begin(b, "sinks" if p.sinks else "", "part == 0" if t.split > 1 else "")
    run.run(b, _add_key_blocks(b, p, t))
    if t.split > 1:
        run.store_portion(b, f"(batch * S + token) * {p.heads} + head")
    else:
        run.finish(b, "y", lambda column: ["batch", "token[:, None]", "head[:, None]", column], p.dtype)
    return b.program()


def _query_indices(p: Attention, part: Part) -> tuple[str, list[str]]:
    """Return the tensor of a part of the queries, and its indices."""
    first = ["head[:, None]", "token[:, None]"]
    order = first if p.heads_first or part.apart else first[::-1]
    return "q_rope" if part.apart else "q", ["batch", *order, part.column]


def _key_indices(p: Attention, part: Part, slot: str = "j") -> tuple[str, list[str]]:
    """Return the tensor of a part of the keys, and its indices."""
    key = "key_codes" if p.eight_bits else "key"
    return "key_rope" if part.apart else key, [
        "batch",
        "0" if part.apart else "group",
        f"{slot}[:, None]",
        part.column,
    ]


def attention_merge(p: Attention, t: RowTile, layout: Layout, split: int) -> Program:
    """Put the portions of a split together: y [B S H, E], the sum of the portions at one common maximum."""
    b = Builder("attention_merge", layout, "y = sum of portions exp2(tops - top) / sum of totals exp2(tops - top)")
    b.scalar("B", "S")
    merge_portions(b, split, f"B * S * {p.heads}", p.value_width, p.dtype, (t.m, t.n))
    return b.program()


def _check_attention(p: Attention) -> None:
    if p.heads % p.groups:
        raise MoecError(f"{p.heads} heads do not divide into {p.groups} groups")
    if p.shared and p.value_width > p.width:
        raise MoecError(f"values of {p.value_width} numbers are not a part of keys of {p.width}")
    if p.mask not in ("", "keys", "tokens"):
        raise MoecError(f"a mask of {p.mask}", todo='it is "", "keys" or "tokens"')
    if p.chunk and (p.mask == "tokens" or p.selected):
        raise MoecError(
            "chunks are counted from the first slot that is not masked; masks for each token and chosen slots have no such slot"
        )


def _attend_of_tile(p: Attention, t: AttentionTile) -> Attend:
    if p.shared:
        keys = column_parts(t.part, p.value_width, p.width - p.value_width)
        values = column_parts(t.part, p.value_width)
    else:
        keys, values = column_parts(t.part, p.width), column_parts(t.part, p.value_width)
    apart = (replace(x, number=len(keys) + x.number, apart=True) for x in column_parts(t.part, p.rope))
    keys = (*keys, *apart)
    return Attend(t, keys, values, p.scale, p.softcap, p.dtype)


def _add_rows(b: Builder, p: Attention, t: AttentionTile) -> None:
    """Add the rows of a tile: `token`, `head` and `live`, `slot` of the token, `first` and `last` of the slots."""
    each = p.shared_by
    b.let("batch", f"pair // {p.groups}")
    b.let("group", f"pair % {p.groups}")
    if p.selected:
        across = -(-each // t.m)
        b.let("own", f"tile // {across}")
        b.let("row", f"tile % {across} * {t.m} + arange({t.m})")
        b.let("live", f"row < {each}")
        b.let("token", "own + row * 0")
        b.let("head", f"group * {each} + row")
        return
    b.let("row", f"tile * {t.m} + arange({t.m})")
    b.let("live", f"row < {p.rows}")
    b.let("token", f"row // {each}")
    b.let("head", f"group * {each} + row % {each}")
    b.let("slot", "P + token")
    b.let("first", f"P + tile * {t.m} // {each}")
    b.let("last", f"P + minimum((tile * {t.m} + {t.m - 1}) // {each}, S - 1)")


def _add_key_blocks(b: Builder, p: Attention, t: AttentionTile) -> Blocks:
    """Add the slots that any row of the tile may read, and return the loop over them."""
    if p.selected:
        return _chosen_keys(b, p)
    start, visible = "0", ["j[None, :] <= slot[:, None]"]
    if p.window:
        start = f"maximum(first - {p.window - 1}, 0)"
        visible.append(f"slot[:, None] - j[None, :] < {p.window}")
    if p.chunk:
        begin = _chunks_begin(b, p)
        b.let("chunk_start", f"{begin} + maximum(first - {begin}, 0) // {p.chunk} * {p.chunk}")
        start = f"maximum({start}, chunk_start)" if p.window else "chunk_start"
        number = f"maximum(slot - {begin}, 0) // {p.chunk}"
        visible.append(f"({number})[:, None] == (maximum(j - {begin}, 0) // {p.chunk})[None, :]")
    if p.mask == "tokens":
        visible.append("seen")

    def prepare(before: str) -> str:
        if p.mask == "keys":
            b.load("unmasked", "mask", ["batch", "j"], before)
            return f"({before}) & unmasked"
        if p.mask == "tokens":
            there = f"live[:, None] & ({before})[None, :]"
            b.load("seen", "mask", ["batch", "token[:, None]", "j[None, :]"], there, shape=(t.m, t.n))
        return before

    whole = "" if p.window or p.chunk or p.mask else "first + 1"
    return _blocks(p, "j", start, "last + 1", " & ".join(f"({v})" for v in visible), prepare, whole)


def _chosen_keys(b: Builder, p: Attention) -> Blocks:
    """Return the loop over the slots that the tile's token has chosen."""

    def prepare(before: str) -> str:
        b.load("chosen", "selected", ["batch", "own", "j"], before, other=-1)
        there = f"({before}) & (chosen >= 0) & (chosen <= P + own)"
        if p.window:
            there += f" & (P + own - chosen < {p.window})"
        if p.mask:
            b.load("unmasked", "mask", ["batch", *(["own"] if p.mask == "tokens" else []), "chosen"], there)
            there += " & unmasked"
        return there

    stop = "minimum(J, P + own + 1)" if p.best_first else "J"
    return _blocks(p, "chosen", "0", stop, "", prepare)


def _blocks(
    p: Attention, slot: str, start: str, stop: str, visible: str, prepare: Callable[[str], str], whole: str = ""
) -> Blocks:
    """Return a loop over keys and values whose slots an index vector has."""
    value = None if p.shared else lambda column: ["batch", "group", f"{slot}[:, None]", column]
    scales = [(f"{name}_scales", ["batch", "group", slot, "0"]) if p.eight_bits else None for name in ("key", "value")]
    return Blocks(
        "key", start, stop, lambda part: _key_indices(p, part, slot), visible, prepare, "value_codes" if p.eight_bits else "value",
        value, whole, *scales,
    )  # fmt: skip


def _chunks_begin(b: Builder, p: Attention) -> str:
    """Add the first slot that is not masked, from which chunks are counted, and return its name."""
    if not p.mask:
        return "0"
    b.let("begin", 'cast(P + S, "i32")')
    with b.loop("look", 0, "P + S", LOOK):
        b.let("place", f"look + arange({LOOK})")
        b.load("is_there", "mask", ["batch", "place"], "place < P + S")
        b.let("begin", "minimum(begin, min(where(is_there, place, P + S), 0))")
    return "begin"
