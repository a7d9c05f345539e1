"""The kernels of routed experts: sort, gate and up with the gather fused in, down with the weighting, combine.

Pairs are (token, choice), numbered token * K + choice; what the experts give is kept by pair. `sort` lists the pairs
by expert and the tiles of each; with few pairs (`direct`) none is needed, each pair is a tile of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....compiler.formats.table import find_format
from ....compiler.ir.activation import SILU, Activation
from ..tile.builder import Builder, Layout
from ..tile.packing import Packing
from ..tile.tiles import Program
from .choices import TILE_ROWS, Tile
from .low_precision import begin_sums, declare_rows, multiply_codes, scaled_sums, store_rows
from .order import tile_axes

LOOK = 1024  # pairs that sort looks at in one step
LISTED = 128  # tiles that it lists in one step


@dataclass(frozen=True)
class Experts:
    """Routed experts, as moe.experts has them: sizes, activation, the packings of `up` [E, N, D] and `down` [E, D, I].

    `added` are tensors [T, D] that are added to the sums of a token.
    """

    experts: int
    chosen: int
    hidden: int
    inner: int
    up: Packing
    down: Packing
    up_bias: bool = False
    down_bias: bool = False
    act: Activation = SILU
    dtype: str = "bf16"  # of what a kernel hands on
    rounded: str = ""  # the format in which `up` hands on its rows instead
    bits: str = ""  # as in Packing, of these
    given: str = "bf16"  # of the rows that are multiplied, or the format that they are in
    added: tuple[str, ...] = ()


def sort_kernel(e: Experts, layout: Layout) -> Program:
    """List the pairs by expert, those of an expert in rising order, in `order` [T K], and the tiles in `tiles` [L, 3, T K].

    Each expert counts the pairs before its own and lists its own, without waiting for another. tiles[l, :, i] are tile
    i's expert, the place of its first pair in `order` and the end of the expert's pairs, for tiles of TILE_ROWS[l] pairs;
    the expert is E where there is no tile i.
    """
    b = Builder(
        "sort", layout, "order are the pairs (token * K + choice) by expert; tiles[l, :, i] = expert, begin, end."
    )
    b.scalar("T")
    expert = b.grid("expert", e.experts)
    pairs = f"T * {e.chosen}"
    b.tensor("ids", "i32", pairs)
    b.tensor("order", "i32", pairs, role="output")
    b.tensor("tiles", "i32", len(TILE_ROWS), 3, pairs, role="output")
    b.let("start", 'cast(0, "i32")')
    with b.loop("p", 0, pairs, LOOK):
        b.let("pair", f"p + arange({LOOK})")
        b.load("id", "ids", ["pair"], f"pair < {pairs}", other=e.experts)
        b.let("start", f"start + sum(id < {expert}, 0)")
    b.let("next", "start")
    with b.loop("q", 0, pairs, LOOK):
        b.let("pair", f"q + arange({LOOK})")
        b.load("id", "ids", ["pair"], f"pair < {pairs}", other=e.experts)
        b.let("own", f"id == {expert}")
        b.store("order", ["next + cumsum(own, 0) - 1"], "pair", "own")
        b.let("next", "next + sum(own, 0)")
    with b.loop("level", 0, len(TILE_ROWS), 1):
        _list_tiles(b, e, pairs)
    return b.program()


def _list_tiles(b: Builder, e: Experts, pairs: str) -> None:
    """Add the list of the tiles of `expert`, whose pairs are `start` to `next`, for tiles of one number of rows.

    Each expert has numbers of tiles for itself, so that it need not know how many the others have: with few pairs those
    of its places, else from place // rows + expert on, which leaves some without a tile.
    """
    b.let("shift", f"level + {TILE_ROWS[0].bit_length() - 1}")
    b.let("few", f"{pairs} <= ({pairs} >> shift) + {e.experts}")
    b.let("from_tile", "where(few, start, (start >> shift) + expert)")
    b.let("to_tile", "where(few, next, (next >> shift) + expert + 1)")
    with b.loop("i", "from_tile", "to_tile", LISTED):
        b.let("number", f"i + arange({LISTED})")
        b.let("begin", "start + where(few, number - from_tile, (number - from_tile) << shift)")
        b.let("is_tile", "(begin < next) & ((begin - start & (1 << shift) - 1) == 0)")
        for row, (value, none) in enumerate((('cast(expert, "i32")', e.experts), ("begin", 0), ("next", 0))):
            b.store("tiles", ["level", f"{row}", "number"], f"where(is_tile, {value}, {none})", "number < to_tile")


def _find_tile(b: Builder, e: Experts, t: Tile, direct: bool) -> None:
    """Add `expert`, `pair` and `live` of this tile of rows, inside a condition that there is one.

    A tile is t.m pairs of one expert, as `sort` listed them.
    """
    if direct:
        b.let("pair", f"tile + arange({t.m})")
        b.let("live", f"arange({t.m}) == 0")
        b.load("expert", "ids", ["tile"])
        return
    listed = "" if t.group == 1 else f"tile < {row_tiles_extent(e, t, direct)}"  # in groups the last may have fewer
    for row, (name, other) in enumerate((("expert", e.experts), ("begin", 0), ("end", 0))):
        b.load(name, "tiles", [f"{TILE_ROWS.index(t.m)}", f"{row}", "tile"], listed, other=other)
    b.let("there", f"expert < {e.experts}")
    b.let("place", f"begin + arange({t.m})")
    b.let("live", "(place < end) & there")
    b.load("pair", "order", ["place"], "live", other=0)


def row_tiles_extent(e: Experts, t: Tile, direct: bool) -> str:
    """Return the extent of the grid's axis of row tiles: at most one begun tile for each expert beside the full ones."""
    pairs = f"T * {e.chosen}"
    return pairs if direct else f"minimum({pairs} // {t.m} + {e.experts}, {pairs})"


def grouped_up(e: Experts, t: Tile, layout: Layout, direct: bool = False) -> Program:
    """h[pair] = act(gate) (up + beta) of the pair's token and expert: gather, both matmuls and activation in one."""
    b = Builder("grouped_up", layout, "h[pair] = act(x[token] gateᵀ) (x[token] upᵀ + beta), rows gathered by expert.")
    b.scalar("T")
    tile_axes(b, f"cdiv({e.inner}, {t.n})", row_tiles_extent(e, t, direct), t.group)
    declare_rows(b, "x", e.given, "T", e.hidden)
    _declare_order(b, e, direct)
    e.up.declare(b, "up")
    if e.up_bias:
        b.tensor("up_bias", "f32", e.experts, e.up.rows, role="weight")
    declare_rows(b, "h", e.rounded or e.dtype, f"T * {e.chosen}", e.inner, role="output")
    _find_tile(b, e, t, direct)
    with b.when("1" if direct else "there"):
        b.let("token", f"pair // {e.chosen}")
        b.let("n", f"column * {t.n} + arange({t.n})")
        b.let("n_live", f"n < {e.inner}")
        rows = (
            {"gate": "n * 2", "value": "n * 2 + 1"} if e.act.interleaved else {"gate": "n", "value": f"n + {e.inner}"}
        )
        rows = rows if e.act.gated else {"gate": "n"}
        for name, text in rows.items():
            b.let(f"{name}_row", text)
        apart = None if e.act.interleaved else e.inner if e.act.gated else 0
        begin_sums(b, e.up, e.given, t, {n: f"{n}_row" for n in rows}, apart)
        with b.loop("k", 0, e.hidden, t.k, t.stages):
            add_multiply(b, e.up, "up", "x", "token", e.hidden, t, {n: f"{n}_row" for n in rows}, dtype=e.given)
        value = {name: summed(b, name, t) for name in rows}
        value = scaled_sums(b, e.up, "up", "x", e.given, "token", value, "expert")
        if e.up_bias:
            for name in rows:
                b.load(f"{name}_bias", "up_bias", ["expert", f"{name}_row"], "n_live")
                value[name] = f"({value[name]} + {name}_bias[None, :])"
        act = activation_text(e.act, value)
        store_rows(b, "h", e.rounded or e.dtype, act, (t.m, t.n), e.inner, ("pair", "n", f"column * {t.n}"), e.bits)
    return b.program()


def grouped_down(e: Experts, t: Tile, layout: Layout, direct: bool = False) -> Program:
    """Multiply h by the expert's down and the pair's gate, and keep it by pair for `combine`.

    Adding to y at once would take f32 sums and another order of them in every run; rows of bf16 are fewer bytes.
    """
    b = Builder("grouped_down", layout, "rows[pair] = gates[pair] h[pair] downᵀ")
    b.scalar("T")
    tile_axes(b, f"cdiv({e.hidden}, {t.n})", row_tiles_extent(e, t, direct), t.group)
    declare_rows(b, "h", e.given, f"T * {e.chosen}", e.inner)
    b.tensor("gates", "f32", f"T * {e.chosen}")
    _declare_order(b, e, direct)
    e.down.declare(b, "down")
    if e.down_bias:
        b.tensor("down_bias", "f32", e.experts, e.hidden, role="weight")
    b.tensor("rows", e.dtype, f"T * {e.chosen}", e.hidden, role="output")
    _find_tile(b, e, t, direct)
    with b.when("1" if direct else "there"):
        b.let("n", f"column * {t.n} + arange({t.n})")
        b.let("n_live", f"n < {e.hidden}")
        begin_sums(b, e.down, e.given, t, {"acc": "n"}, 0)
        with b.loop("k", 0, e.inner, t.k, t.stages):
            add_multiply(b, e.down, "down", "h", "pair", e.inner, t, {"acc": "n"}, dtype=e.given)
        value = scaled_sums(b, e.down, "down", "h", e.given, "pair", {"acc": summed(b, "acc", t)}, "expert")["acc"]
        if e.down_bias:
            b.load("bias", "down_bias", ["expert", "n"], "n_live")
            value = f"({value} + bias[None, :])"
        b.load("gate", "gates", ["pair"], "live")
        b.let("weighted", f'cast({value} * gate[:, None], "{e.dtype}")', (t.m, t.n), e.dtype)
        b.store("rows", ["pair[:, None]", "n[None, :]"], "weighted", "live[:, None] & n_live[None, :]")
    return b.program()


def combine_kernel(e: Experts, columns: int, layout: Layout, rows: int = 1) -> Program:
    """y[token] = sum of its pairs' rows, in the order of the choices, and of what is added: the same sum in every run."""
    b = Builder("combine", layout, "y[token] = rows[token K] + rows[token K + 1] + ...")
    b.scalar("T")
    b.grid("part", f"cdiv({e.hidden}, {columns})")
    b.grid("block", f"cdiv(T, {rows})")
    b.tensor("rows", e.dtype, f"T * {e.chosen}", e.hidden)
    for name in e.added:
        b.tensor(name, e.dtype, "T", e.hidden)
    b.tensor("y", e.dtype, "T", e.hidden, role="output")
    b.let("t", f"block * {rows} + arange({rows})")
    b.let("n", f"part * {columns} + arange({columns})")
    b.let("live", f"(t < T)[:, None] & (n < {e.hidden})[None, :]", (rows, columns), "bool")
    b.let("total", f'full({rows}, {columns}, 0.0, "f32")', (rows, columns), "f32")
    with b.loop("j", 0, e.chosen, 1):
        b.load("row", "rows", [f"(t * {e.chosen} + j)[:, None]", "n[None, :]"], "live", shape=(rows, columns))
        b.let("total", 'total + cast(row, "f32")', (rows, columns), "f32")
    for name in e.added:
        b.load(f"{name}_tile", name, ["t[:, None]", "n[None, :]"], "live", shape=(rows, columns))
        b.let("total", f'total + cast({name}_tile, "f32")', (rows, columns), "f32")
    b.let("sum_", f'cast(total, "{e.dtype}")', (rows, columns), e.dtype)
    b.store("y", ["t[:, None]", "n[None, :]"], "sum_", "live")
    return b.program()


def _declare_order(b: Builder, e: Experts, direct: bool) -> None:
    if direct:
        b.tensor("ids", "i32", f"T * {e.chosen}")
    else:
        b.tensor("order", "i32", f"T * {e.chosen}")
        b.tensor("tiles", "i32", len(TILE_ROWS), 3, f"T * {e.chosen}")


def add_multiply(
    b: Builder, weight: Packing, tensor: str, x: str, row: str, depth: int, t: Tile, sums: dict[str, str],
    expert: str = "expert", middle: Sequence[str] = (), lead: Sequence[str] = (), *, dtype: str,
) -> None:  # fmt: skip
    """Add one step of K: sums[acc] gets x[row, ..., k:] times the weight's rows, each weight tile split as its packing wants.

    `live` says which rows of x there are and `n_live` which of the weight, `lead` are indices before row and `middle`
    those between row and k. Rows of another dtype than the weight's tiles are cast to theirs; those in a format,
    `dtype`, are multiplied as codes.
    """
    if form := find_format(dtype):
        multiply_codes(b, weight, tensor, x, form, row, depth, t, sums, expert, middle)
        return
    loaded: dict[tuple[str, int], str] = {}
    for acc, rows in sums.items():
        label = f"w_{acc}"
        for tile, first, width in weight.operands(b, label, tensor, expert, rows, "n_live", "k", (t.n, t.k)):
            if (first, width) not in loaded:
                k = f"(k + {first} + arange({width}))[None, :]"
                mask = "live[:, None]" + ("" if depth % t.k == 0 else f" & ({k} < {depth})")
                name = "a" if first == "0" else f"a_{first}"
                at = [*lead, f"{row}[:, None]", *middle, k]
                if b.dtype(x) == weight.operand:
                    loaded[first, width] = b.operand(name, x, at, mask, (t.m, width), second=False)
                else:
                    b.load(f"{name}_given", x, at, mask, shape=(t.m, width))
                    b.let(name, f'cast({name}_given, "{weight.operand}")', (t.m, width), weight.operand)
                    loaded[first, width] = b.as_operand(name, second=False)
            b.dot(acc, *((tile, loaded[first, width]) if t.swapped else (loaded[first, width], tile)))


def summed(b: Builder, acc: str, t: Tile) -> str:
    """Return the expression of a finished sum [t.m, t.n]."""
    return f"trans({b.result(acc)})" if t.swapped else b.result(acc)


def activation_text(act: Activation, value: dict[str, str]) -> str:
    """Return the expression of an activation of `gate`, and where it is gated of `value`; rows of `act` in the kernel's sums."""
    g = value["gate"]
    if act.clamped and not act.clamp_after:
        g = f"minimum({g}, {act.limit})"
    match act.kind:
        case "silu":
            text = f"{g} * sigmoid({act.alpha} * {g})" if act.alpha != 1 else f"{g} * sigmoid({g})"
        case "gelu":
            text = f"0.5 * {g} * (1.0 + erf({g} * 0.7071067811865476))"
        case "gelu_tanh":
            text = f"0.5 * {g} * (1.0 + tanh(0.7978845608028654 * ({g} + 0.044715 * {g} * {g} * {g})))"
        case "relu":
            text = f"maximum({g}, 0.0)"
        case "relu2":
            text = f"maximum({g}, 0.0) * maximum({g}, 0.0)"
        case _:
            text = g
    if not act.gated:
        return text
    u = value["value"]
    if act.clamped:
        u = f"minimum(maximum({u}, {-act.limit}), {act.limit})"
    if act.clamp_after:
        text = f"minimum({text}, {act.limit})"
    return f"{text} * ({u} + {act.beta})" if act.beta else f"{text} * {u}"
