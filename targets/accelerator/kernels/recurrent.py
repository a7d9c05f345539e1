"""The kernels of recurrent layers: a convolution over the last tokens, and linear attention with a state a head.

Both have a state whose size does not grow. A point of the grid reads its part of the past state and writes the same part
of the new one; between them the state of linear attention stays where vectors are computed, in f32.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....compiler.ir.activation import Activation
from ..tile.builder import Builder, Layout
from ..tile.tiles import Program
from .choices import RowTile, Tile
from .experts import activation_text
from .norm import power_of_two


@dataclass(frozen=True)
class Window:
    """acc.window_conv: `channels` channels with `taps` weights each, and a state of the last `kept` tokens."""

    channels: int
    taps: int
    kept: int
    act: Activation
    bias: bool = False
    dtype: str = "bf16"  # of x and y; the state is f32


def window_conv(p: Window, t: RowTile, layout: Layout) -> Program:
    """y [B, S, C] = act(sum over j of taps[j] x[s - taps + 1 + j] + b) of t.m tokens and t.n channels; present = the last tokens."""
    b = Builder("window_conv", layout, "y[s] = act(sum_j w[j] x[s - taps + 1 + j] + b), the tokens before x from past")
    b.scalar("B", "S")
    b.grid("column", f"cdiv({p.channels}, {t.n})")
    b.grid("tile", f"cdiv(S, {t.m})")
    b.grid("batch", "B")
    b.tensor("x", p.dtype, "B", "S", p.channels)
    b.tensor("past", "f32", "B", p.channels, p.kept)
    b.tensor("taps", "f32", p.channels, p.taps, role="weight")
    if p.bias:
        b.tensor("b", "f32", p.channels, role="weight")
    b.tensor("y", p.dtype, "B", "S", p.channels, role="output")
    b.tensor("present", "f32", "B", p.channels, p.kept, role="output")
    shape = (t.m, t.n)
    b.let("s", f"tile * {t.m} + arange({t.m})")
    b.let("c", f"column * {t.n} + arange({t.n})")
    b.let("c_live", f"c < {p.channels}")
    b.let("live", "(s < S)[:, None] & c_live[None, :]", shape, "bool")
    b.let("total", f'full({t.m}, {t.n}, 0.0, "f32")', shape, "f32")
    for j in range(p.taps):
        _load_tokens(b, p, f"tap_{j}", f"(s + {j - p.taps + 1})[:, None]", "c[None, :]", "live", shape)
        b.load(f"w_{j}", "taps", ["c", str(j)], "c_live")
        b.let("total", f"total + tap_{j} * w_{j}[None, :]", shape, "f32")
    if p.bias:
        b.load("bias", "b", ["c"], "c_live")
        b.let("total", "total + bias[None, :]", shape, "f32")
    b.let("out", f'cast({activation_text(p.act, {"gate": "total"})}, "{p.dtype}")', shape, p.dtype)
    b.store("y", ["batch", "s[:, None]", "c[None, :]"], "out", "live")
    with b.when("tile == 0"):
        wide = power_of_two(p.kept)
        b.let("i", f"arange({wide})")
        b.let("is_kept", f"c_live[:, None] & (i < {p.kept})[None, :]", (t.n, wide), "bool")
        _load_tokens(b, p, "last", f"(i + (S - {p.kept}))[None, :]", "c[:, None]", "is_kept", (t.n, wide))
        b.store("present", ["batch", "c[:, None]", "i[None, :]"], "last", "is_kept")
    return b.program()


def _load_tokens(b: Builder, p: Window, name: str, place: str, channel: str, live: str, shape: tuple[int, int]) -> None:
    """Add the numbers of some tokens of this step, counted from its first; those before it come from the state."""
    b.let(f"{name}_is_new", f"{live} & ({place} >= 0)", shape, "bool")
    b.let(f"{name}_is_old", f"{live} & ({place} < 0) & ({place} >= {-p.kept})", shape, "bool")
    b.load(f"{name}_new", "x", ["batch", place, channel], f"{name}_is_new", shape=shape)
    b.load(f"{name}_old", "past", ["batch", channel, f"{place} + {p.kept}"], f"{name}_is_old", shape=shape)
    b.let(name, f'where({name}_is_new, cast({name}_new, "f32"), {name}_old)', shape, "f32")


@dataclass(frozen=True)
class Recurrence:
    """acc.linear_attention: `heads` states [width, value_width], whose q and k `groups` heads share.

    `decay`: the logarithms of it that a head is given, none, one or one a row of the state; `rate`: they are multiplied
    by weights [heads, width]. `delta`: there is a beta.
    """

    heads: int
    groups: int
    width: int
    value_width: int
    scale: float = 1.0
    decay: int = 0
    rate: bool = False
    delta: bool = False
    out: str = "bf16"  # of y; all else is f32: a GPU loads ahead by 32 bits a thread and more


def linear_attention(p: Recurrence, t: Tile, layout: Layout) -> Program:
    """Go through the tokens with the states of t.m heads, t.n columns of each: state = exp(decay) state + k uᵀ, y = qᵀ state."""
    b = Builder("linear_attention", layout, "for each token: state = exp(decay) state + k uᵀ, y = scale qᵀ state")
    b.scalar("B", "S")
    b.grid("column", f"cdiv({p.value_width}, {t.n})")
    b.grid("row", f"cdiv({p.heads}, {t.m})")
    b.grid("batch", "B")
    declare_recurrence(b, p)
    _add_axes_of_states(b, p, t)
    whole = (t.m, power_of_two(p.width), t.n)
    cell = ["batch", "head[:, None, None]", "i[None, :, None]", "n[None, None, :]"]
    b.load("state", "past", cell, "there", shape=whole)
    if p.rate:
        b.load("rates", "rate", ["head[:, None, None]", "i[None, :, None]"], "is_row", shape=(*whole[:2], 1))
    with b.loop("token", 0, "S", 1, t.stages):
        _add_token_update(b, p, t, whole)
    b.store("present", cell, "state", "there")
    return b.program()


def declare_recurrence(b: Builder, p: Recurrence) -> None:
    """Declare the tensors of linear attention."""
    for name in "qk":
        b.tensor(name, "f32", "B", "S", p.groups, p.width)
    b.tensor("v", "f32", "B", "S", p.heads, p.value_width)
    if p.decay:
        b.tensor("decay", "f32", "B", "S", p.heads, p.decay)
    if p.rate:
        b.tensor("rate", "f32", p.heads, p.width, role="weight")
    if p.delta:
        b.tensor("beta", "f32", "B", "S", p.heads)
    b.tensor("past", "f32", "B", p.heads, p.width, p.value_width)
    b.tensor("y", p.out, "B", "S", p.heads, p.value_width, role="output")
    b.tensor("present", "f32", "B", p.heads, p.width, p.value_width, role="output")


def _add_axes_of_states(b: Builder, p: Recurrence, t: Tile) -> None:
    """Add the heads, rows and columns of the states of a point, and which of them there are."""
    rows = power_of_two(p.width)
    b.let("head", f"row * {t.m} + arange({t.m})")
    b.let("i", f"arange({rows})")
    b.let("n", f"column * {t.n} + arange({t.n})")
    b.let("is_head", f"head < {p.heads}")
    b.let("group", f"minimum(head, {p.heads - 1}) // {p.heads // p.groups}")
    b.let("is_row", f"is_head[:, None, None] & (i < {p.width})[None, :, None]", (t.m, rows, 1), "bool")
    b.let("is_value", f"is_head[:, None] & (n < {p.value_width})[None, :]", (t.m, t.n), "bool")
    b.let("there", f"is_row & (n < {p.value_width})[None, None, :]", (t.m, rows, t.n), "bool")


def _add_token_update(b: Builder, p: Recurrence, t: Tile, whole: tuple[int, int, int]) -> None:
    """Add the update of the states by a token, and what it reads of them."""
    rows, values = (*whole[:2], 1), (t.m, t.n)
    value = ["batch", "token", "head[:, None]", "n[None, :]"]
    for name in "qk":
        at = ["batch", "token", "group[:, None, None]", "i[None, :, None]"]
        b.load(f"{name}_row", name, at, "is_row", shape=rows)
    b.load("v_row", "v", value, "is_value", shape=values)
    b.let("u", "v_row", values, "f32")
    if p.decay:
        each = "0" if p.decay == 1 else "i[None, :, None]"
        shape, mask = ((t.m, 1, 1), "is_head[:, None, None]") if p.decay == 1 else (rows, "is_row")
        b.load("log", "decay", ["batch", "token", "head[:, None, None]", each], mask, shape=shape)
        b.let("state", f"state * exp(log{' * rates' if p.rate else ''})", whole, "f32")
    if p.delta:
        b.load("strength", "beta", ["batch", "token", "head"], "is_head")
        b.let("u", "(u - sum(k_row * state, 1)) * strength[:, None]", values, "f32")
    b.let("state", "state + k_row * u[:, None, :]", whole, "f32")
    text = "sum(q_row * state, 1)" if p.scale == 1 else f"sum(q_row * state, 1) * {p.scale}"
    b.let("out", f'cast({text}, "{p.out}")', values, p.out)
    b.store("y", value, "out", "is_value")
