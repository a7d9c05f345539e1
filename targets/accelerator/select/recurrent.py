"""Selects the kernels of recurrent layers: convolutions over the last tokens, and linear attention."""

from __future__ import annotations

from collections.abc import Mapping

from ....compiler.ir.module import Op
from ..chip.chip import Profile
from ..kernels.chunked import LEAST, chunked_attention, goes_by_chunks
from ..kernels.norm import power_of_two
from ..kernels.recurrent import Recurrence, Window, linear_attention, window_conv
from ..tile.packing import Packing
from .implementations import Computation, Implementation, Selector, Tokens, only_implementation, operand_types, row_tile
from .search import COLUMNS, KernelTemplate

HEADS, VALUES = (1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16, 32, 64, 128)
CHUNKS = (16, 32, 64, 128)  # tokens that become one matmul
CHUNKED = 32  # new tokens of a sequence from which they are taken in chunks
STATE = (256, 8192)  # least and most numbers of states that a point goes through the tokens with


def _window_conv(op: Op, weights: Mapping[str, Packing]) -> Computation:
    operands = operand_types(op)
    channels, taps = map(int, operands["taps"].shape)
    kept = int(operands["past"].shape[2])
    p = Window(channels, taps, kept, op.settings.activation("act"), "b" in operands)

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        widths = [n for n in (32, 64, 128, 256, 512) if n < 2 * power_of_two(channels)] or [32]
        rows = [m for m in (1, 4, 16, 64) if m < 2 * tokens.new]
        return only_implementation(
            KernelTemplate(
                "window_conv", lambda t, layout: window_conv(p, row_tile(t), layout), {"B": tokens.batch, "S": tokens.new},
                tuple((m, n, 1) for m in rows for n in widths), staged=False,
            )
        )  # fmt: skip

    return Computation("window_conv", p, {}, implementations)


def _linear_attention(op: Op, weights: Mapping[str, Packing]) -> Computation:
    operands, a = operand_types(op), op.settings
    groups, width = map(int, operands["k"].shape[2:])
    heads, values = map(int, operands["v"].shape[2:])
    decay = operands.get("decay")
    p = Recurrence(
        heads, groups, width, values, a.number("scale"), int(decay.shape[3]) if decay else 0, "rate" in operands,
        "beta" in operands,
    )  # fmt: skip
    changes_at = CHUNKED if goes_by_chunks(p) else None

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        scalars = {"B": tokens.batch, "S": tokens.new}
        if changes_at and tokens.new >= changes_at:
            return only_implementation(
                KernelTemplate(
                    "chunked_attention", lambda t, layout: chunked_attention(p, t, layout), scalars, _chunk_tiles(p)
                )
            )
        return only_implementation(
            KernelTemplate(
                "linear_attention", lambda t, layout: linear_attention(p, t, layout), scalars, _state_tiles(p)
            )
        )

    return Computation("linear_attention", p, {}, implementations, changes_at)


def _chunk_tiles(p: Recurrence) -> tuple[tuple[int, int, int], ...]:
    """Return the tiles (tokens of a chunk, columns of a state, its rows)."""
    rows, widest = power_of_two(p.width, LEAST), power_of_two(p.value_width, LEAST)
    narrow = (LEAST,) if p.delta else ()  # the delta rule keeps more tiles at once
    columns = [n for n in (*narrow, *COLUMNS) if n <= widest] or [widest]
    return tuple((m, n, rows) for m in CHUNKS for n in columns)


def _state_tiles(p: Recurrence) -> tuple[tuple[int, int, int], ...]:
    """Return the tiles (heads, columns of their states, 1) of a useful size; the least one where a state is large."""
    rows, widest = power_of_two(p.width), power_of_two(p.value_width)
    found = [
        (m, n, 1)
        for m in HEADS
        for n in VALUES
        if m <= power_of_two(p.heads)
        and n <= widest
        and (m == 1 or n == widest)
        and STATE[0] <= m * rows * n <= STATE[1]
    ]
    return tuple(found) or ((1, 1, 1) if rows > STATE[1] else (power_of_two(p.heads), widest, 1),)


IMPLEMENTATIONS: dict[str, Selector] = {
    "acc.window_conv": _window_conv,
    "acc.linear_attention": _linear_attention,
}
