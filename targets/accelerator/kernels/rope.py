"""The kernels that rotate heads by their positions' angles, with a norm of each head before, and append to the cache.

A head is read as three pieces that each lie evenly in it: the first and the second number of every pair that is rotated,
and the rest. Halves: pairs are (j, R/2 + j) of the first R values. Neighbours (`pairs`): (D - R + 2 j, D - R + 2 j + 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..tile.builder import Builder, Layout
from ..tile.tiles import Program
from .choices import RowTile
from .norm import power_of_two
from .stored_rows import CODES, add_row_scale, declare_cache, row_codes


@dataclass(frozen=True)
class Rope:
    """Heads of `width` values, `rotary` of them rotated, as nn.rope or with `pairs` as nn.rope_pairs has it.

    The angles are [C, S, rotary] (pairs: [C, S, rotary / 2]), f32, C the batch (`own_angles`) or 1. `norm`: each head
    is first divided by its root mean square and, if `weight`, scaled. `heads_first`: x is [B, H, S, D], not [B, S, H, D].
    """

    heads: int
    width: int
    rotary: int
    pairs: bool = False
    inverse: bool = False
    norm: bool = False
    weight: bool = False
    eps: float = 0.0
    own_angles: bool = False
    heads_first: bool = False
    dtype: str = "bf16"


def rope_kernel(p: Rope, t: RowTile, layout: Layout) -> Program:
    """y = x with each head normed and rotated; t.m tokens of one head for each point of the grid."""
    b = Builder("rope_pairs" if p.pairs else "rope", layout, "y = x, its heads turned by the angles of their positions")
    b.scalar("B", "S")
    b.grid("tile", f"cdiv(S, {t.m})")
    b.grid("head", p.heads)
    b.grid("batch", "B")
    shape = ("B", p.heads, "S", p.width) if p.heads_first else ("B", "S", p.heads, p.width)
    b.tensor("x", p.dtype, *shape)
    _declare_angles(b, p)
    if p.weight:
        b.tensor("w", "f32", p.width, role="weight")
    b.tensor("y", p.dtype, *shape, role="output")
    _add_tokens(b, p, t)

    def at(column: str) -> list[str]:
        order = ["head", "token[:, None]"] if p.heads_first else ["token[:, None]", "head"]
        return ["batch", *order, f"({column})[None, :]"]

    _add_rotation(b, p, t, "x", at, "w", "y", at)
    return b.program()


@dataclass(frozen=True)
class Append:
    """The part of nn.cached_attention before it attends: norm and rotate the heads of q and k, append k and v to the cache.

    `joined`: the heads of q, k and v are concatenated in one tensor qkv [B, S, H + 2 G, D]. `q_norm`, `k_norm`:
    weights of an rms_norm over each head, `rotary` 0: nothing is rotated. `eight_bits`: the cache is as stored_rows.py
    has it; `bits` as in Packing.
    """

    heads: int
    groups: int
    width: int
    rotary: int
    joined: bool = False
    q_norm: bool = False
    k_norm: bool = False
    eps: float = 0.0
    own_angles: bool = False
    dtype: str = "bf16"
    eight_bits: bool = False
    bits: str = ""


def qk_rope_append(p: Append, t: RowTile, layout: Layout) -> Program:
    """Write the rotated heads of q, and those of k and v to slots P .. P + S - 1 of the cache, which has C slots.

    y is [B, H, S, D], as `attention` reads queries with `heads_first`. The cache is changed in place, key and value [B, G, C, D]: its first P slots are not touched.
    """
    b = Builder(
        "qk_rope_append", layout, "y = q normed and turned; key[:, :, P:] = k normed and turned; value[:, :, P:] = v"
    )
    b.scalar("B", "S", "P", "C")
    b.grid("tile", f"cdiv(S, {t.m})")
    b.grid("head", p.heads + 2 * p.groups)
    b.grid("batch", "B")
    if p.joined:
        b.tensor("qkv", p.dtype, "B", "S", p.heads + 2 * p.groups, p.width)
    else:
        for name, heads in (("q", p.heads), ("k", p.groups), ("v", p.groups)):
            b.tensor(name, p.dtype, "B", "S", heads, p.width)
    rotation = Rope(p.heads, p.width, p.rotary, own_angles=p.own_angles, eps=p.eps, dtype=p.dtype)
    if p.rotary:
        _declare_angles(b, rotation)
    for name, there in (("q_norm", p.q_norm), ("k_norm", p.k_norm)):
        if there:
            b.tensor(name, "f32", p.width, role="weight")
    b.tensor("y", p.dtype, "B", p.heads, "S", p.width, role="output")
    for name in ("key", "value"):
        declare_cache(b, name, p.dtype, p.eight_bits, "B", p.groups, "C", p.width, role="output")
    _add_tokens(b, rotation, t)
    last = p.heads + p.groups

    def source(first: int) -> Callable[[str], list[str]]:
        head = "head" if p.joined or not first else f"head - {first}"
        return lambda column: ["batch", "token[:, None]", head, f"({column})[None, :]"]

    def slot(first: int) -> Callable[[str], list[str]]:
        return lambda column: ["batch", f"head - {first}", "(P + token)[:, None]", f"({column})[None, :]"]

    def rotated(column: str) -> list[str]:
        return ["batch", "head", "token[:, None]", f"({column})[None, :]"]

    def normed(there: bool) -> Rope:
        return Rope(p.heads, p.width, p.rotary, norm=there, weight=there, eps=p.eps, dtype=p.dtype)

    with b.when(f"head < {p.heads}"):
        _add_rotation(b, normed(p.q_norm), t, "qkv" if p.joined else "q", source(0), "q_norm", "y", rotated)
    with b.when(f"(head >= {p.heads}) & (head < {last})"):
        _add_rotation(
            b, normed(p.k_norm), t, "qkv" if p.joined else "k", source(p.heads), "k_norm", "key", slot(p.heads),
            p.bits if p.eight_bits else None,
        )  # fmt: skip
    with b.when(f"head >= {last}"):
        wide = power_of_two(p.width)
        b.let("column", f"arange({wide})")
        mask = "live[:, None]" + ("" if wide == p.width else f" & (column < {p.width})[None, :]")
        b.load("v_tile", "qkv" if p.joined else "v", source(last)("column"), mask, shape=(t.m, wide))
        if p.eight_bits:
            b.let("v_row", 'cast(v_tile, "f32")', (t.m, wide), "f32")
            add_row_scale(b, ("v_row",))
            b.let("v_codes", row_codes("v_row", p.bits), (t.m, wide), CODES)
            b.store("value_codes", slot(last)("column"), "v_codes", mask)
            b.store("value_scales", [*slot(last)("column")[:2], "P + token", "0"], "by", "live")
        else:
            b.store("value", slot(last)("column"), "v_tile", mask)
    return b.program()


def _declare_angles(b: Builder, p: Rope) -> None:
    wide = p.rotary // 2 if p.pairs else p.rotary
    for name in ("cos", "sin"):
        b.tensor(name, "f32", "B" if p.own_angles else 1, "S", wide)


def _add_tokens(b: Builder, p: Rope, t: RowTile) -> None:
    b.let("token", f"tile * {t.m} + arange({t.m})")
    b.let("live", "token < S")
    b.let("angles", "batch" if p.own_angles else "0")


def _add_rotation(
    b: Builder, p: Rope, t: RowTile, source: str, at: Callable[[str], list[str]], weight: str, target: str,
    to: Callable[[str], list[str]], bits: str | None = None,
) -> None:  # fmt: skip
    """Add the load of a head of t.m tokens, its norm and rotation, and the store; with `bits` as rows in 8 bits."""
    half = p.rotary // 2
    rest = p.width - p.rotary
    start = rest if p.pairs else 0
    pieces = {"one": half, "two": half, "rest": rest}
    place = {
        "one": f"{start} + one_j * 2" if p.pairs else "one_j",
        "two": f"{start + 1} + two_j * 2" if p.pairs else f"{half} + two_j",
        "rest": "rest_j" if p.pairs else f"{p.rotary} + rest_j",
    }
    pieces = {name: size for name, size in pieces.items() if size}
    masks = {}
    for name, size in pieces.items():
        wide = power_of_two(size)
        b.let(f"{name}_j", f"arange({wide})")
        masks[name] = "live[:, None]" + ("" if wide == size else f" & ({name}_j < {size})[None, :]")
        b.load(f"{name}_given", source, at(place[name]), masks[name], shape=(t.m, wide))
        b.let(name, f'cast({name}_given, "f32")', (t.m, wide), "f32")
    if p.norm:
        squares = " + ".join(f"sum({name} * {name}, 1)" for name in pieces)
        b.let("factor", f"rsqrt(({squares}) / {p.width} + {p.eps})")
        for name, size in pieces.items():
            text = f"{name} * factor[:, None]"
            if p.weight:
                b.load(f"{name}_w", weight, [place[name]], f"{name}_j < {size}")
                text += f" * {name}_w[None, :]"
            b.let(name, text, (t.m, power_of_two(size)), "f32")
    value = {"rest": "rest"}
    if half:
        wide = power_of_two(half)
        for name, first in (("one", 0), ("two", 0 if p.pairs else half)):
            for angle in ("cos", "sin"):
                column = f"({first} + {name}_j)[None, :]"
                b.load(f"{name}_{angle}", angle, ["angles", "token[:, None]", column], masks[name], shape=(t.m, wide))
        signs = ("+", "-") if p.inverse else ("-", "+")
        value["one"] = f"one * one_cos {signs[0]} two * one_sin"
        value["two"] = f"two * two_cos {signs[1]} one * two_sin"
    if bits is not None:
        for name, size in pieces.items():
            b.let(f"{name}_turned", value[name], (t.m, power_of_two(size)), "f32")
        add_row_scale(b, [f"{name}_turned" for name in pieces])
        b.store(f"{target}_scales", [*to("0")[:2], "P + token", "0"], "by", "live")
    for name, size in pieces.items():
        shape = (t.m, power_of_two(size))
        if bits is None:
            out = b.let(f"{name}_out", f'cast({value[name]}, "{p.dtype}")', shape, p.dtype)
        else:
            out = b.let(f"{name}_codes", row_codes(f"{name}_turned", bits), shape, CODES)
        b.store(target if bits is None else f"{target}_codes", to(place[name]), out, masks[name])
