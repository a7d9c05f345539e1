"""The kernel of linear attention for prompts: chunks of tokens as matmuls, one after the other, with a state a head between them.

What a token of a chunk reads is what the state before the chunk gives, faded, and what earlier tokens of the chunk add:
y = exp(c) q state + (q kᵀ exp(c - c')) u, where c sums the logarithms of the decay up to a token (Dao and Gu 2024, arXiv
2405.21060). With the delta rule u solves a triangular system of a chunk's size (Yang et al. 2024, arXiv 2412.06464).
"""

from __future__ import annotations

from ..tile.builder import Builder, Layout
from ..tile.tiles import Program
from .choices import Tile
from .norm import power_of_two
from .recurrent import Recurrence, declare_recurrence

LEAST = 16  # rows and columns that matrix units multiply at least


def goes_by_chunks(p: Recurrence) -> bool:
    """Return whether a chunk's tokens fade alike in all rows of a state, so that the decay is a factor of their products."""
    return p.decay <= 1 and not p.rate


def chunked_attention(p: Recurrence, t: Tile, layout: Layout) -> Program:
    """Compute acc.linear_attention with t.m tokens at once, and t.n columns of the state of a head for a point of the grid."""
    b = Builder("chunked_attention", layout, "y = exp(c) q state + (q kᵀ exp(c - c')) u; state = exp(c) state + kᵀ u")
    b.scalar("B", "S")
    b.grid("column", f"cdiv({p.value_width}, {t.n})")
    b.grid("head", p.heads)
    b.grid("batch", "B")
    declare_recurrence(b, p)
    rows = power_of_two(p.width, LEAST)
    b.let("group", f"head // {p.heads // p.groups}")
    b.let("i", f"arange({rows})")
    b.let("n", f"column * {t.n} + arange({t.n})")
    b.let("is_row", f"i < {p.width}")
    b.let("is_value", f"n < {p.value_width}")
    b.let("there", "is_row[:, None] & is_value[None, :]", (rows, t.n), "bool")
    b.let("place", f"arange({t.m})")
    cell = ["batch", "head", "i[:, None]", "n[None, :]"]
    b.load("state", "past", cell, "there", shape=(rows, t.n))
    with b.loop("first", 0, "S", t.m, t.stages):
        _add_chunk(b, p, t, rows)
    b.store("present", cell, "state", "there")
    return b.program()


def _add_chunk(b: Builder, p: Recurrence, t: Tile, rows: int) -> None:
    """Add the loads of a chunk, its results and the state after it."""
    b.let("token", f"first + arange({t.m})")
    b.let("is_token", "token < S")
    _load_heads(b, t, "k", rows)
    value = ["batch", "token[:, None]", "head", "n[None, :]"]
    b.load("v_rows", "v", value, "is_token[:, None] & is_value[None, :]", shape=(t.m, t.n))
    if p.decay:  # past the end of the sequence nothing fades
        b.load("log", "decay", ["batch", "token", "head", "0"], "is_token")
        b.let("faded", "cumsum(log, 0)")
        b.let("fade", "exp(faded)[:, None]", (t.m, 1), "f32")
        b.let("left", "sum(log, 0)")
    b.let("state_cast", 'cast(state, "bf16")', (rows, t.n), "bf16")
    states = b.as_operand("state_cast", second=True)
    _add_values(b, p, t, states)
    b.let("u_cast", 'cast(u, "bf16")', (t.m, t.n), "bf16")
    added = b.as_operand("u_cast", second=True)
    _load_heads(b, t, "q", rows)  # after what takes most registers
    seen = _multiply(b, "seen", "q_cast", states, (t.m, t.n))
    b.let("near", _faded(b, p, t, "q_cast", "alike_q", ">="), (t.m, t.m), "f32")
    b.let("near_cast", 'cast(near, "bf16")', (t.m, t.m), "bf16")
    inside = _multiply(b, "inside", "near_cast", added, (t.m, t.n))
    text = f"{seen} * fade + {inside}" if p.decay else f"{seen} + {inside}"
    b.let("out", f'cast(({text}) * {p.scale}, "{p.out}")', (t.m, t.n), p.out)
    b.store("y", value, "out", "is_token[:, None] & is_value[None, :]")
    kept = 'cast(cast(k_cast, "f32") * exp(left - faded)[:, None], "bf16")' if p.decay else "k_cast"
    b.let("keys", f"trans({kept})", (rows, t.m), "bf16")
    gained = _multiply(b, "gained", "keys", added, (rows, t.n))
    b.let("state", f"state * exp(left) + {gained}" if p.decay else f"state + {gained}", (rows, t.n), "f32")


def _load_heads(b: Builder, t: Tile, name: str, rows: int) -> None:
    """Add the load of a chunk's heads of q or k, in bf16."""
    at = ["batch", "token[:, None]", "group", "i[None, :]"]
    b.load(f"{name}_rows", name, at, "is_token[:, None] & is_row[None, :]", shape=(t.m, rows))
    b.let(f"{name}_cast", f'cast({name}_rows, "bf16")', (t.m, rows), "bf16")


def _add_values(b: Builder, p: Recurrence, t: Tile, states: str) -> None:
    """Add `u`, what each token adds to the state by its key: its value, or with the delta rule what that lacks."""
    b.let("u", "v_rows", (t.m, t.n), "f32")
    if not p.delta:
        return
    b.load("strength", "beta", ["batch", "token", "head"], "is_token")
    known = _multiply(b, "known", "k_cast", states, (t.m, t.n))
    known = f"{known} * fade" if p.decay else known
    b.let("u", f"(u - {known}) * strength[:, None]", (t.m, t.n), "f32")
    b.let("lower", f"{_faded(b, p, t, 'k_cast', 'alike_k', '>')} * strength[:, None]", (t.m, t.m), "f32")
    with b.loop("solved", 1, t.m, 1):  # those before it are known
        b.let("own", "place == solved")
        b.let("weights", "sum(where(own[:, None], lower, 0.0), 0)")
        b.let("u", "where(own[:, None], u - sum(weights[:, None] * u, 0)[None, :], u)", (t.m, t.n), "f32")


def _faded(b: Builder, p: Recurrence, t: Tile, rows: str, name: str, order: str) -> str:
    """Add the products of a chunk's rows with its keys and return them faded, 0 where a key is not before its row."""
    keys = b.as_operand("k_cast", second=True)
    alike = b.accumulator(name, (t.m, t.m))
    b.dot(alike, b.as_operand(rows, second=False), keys)
    before = f"(place[:, None] {order} place[None, :])"
    product = b.result(alike)
    if p.decay:
        return f"where({before}, {product} * exp(where({before}, faded[:, None] - faded[None, :], 0.0)), 0.0)"
    return f"where({before}, {product}, 0.0)"


def _multiply(b: Builder, name: str, first: str, second: str, shape: tuple[int, int]) -> str:
    """Add the product of a tile with an operand [K, N] and return it."""
    acc = b.accumulator(name, shape)
    b.dot(acc, b.as_operand(first, second=False), second, transpose=False)
    return b.result(acc)
