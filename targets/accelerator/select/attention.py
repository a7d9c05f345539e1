"""Selects the kernels of attention: over a cache of keys and values, and DeepSeek-V4's over a window and compressed entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product

from ....compiler.ir.dims import evaluate
from ....compiler.ir.module import Op
from ....compiler.ir.types import TensorType
from ..chip.chip import Profile
from ..kernels.attention import Attention, attention_kernel, attention_merge
from ..kernels.choices import AttentionTile, RowTile, Tile
from ..kernels.compressed import Compressed, compressed_attention, compressed_merge, slide_kernel
from ..kernels.norm import power_of_two
from ..tile.builder import Layout
from ..tile.packing import Packing
from ..tile.tiles import Program
from .implementations import Computation, Implementation, Selector, Tokens, operand_types, row_shapes, row_tile
from .search import KernelTemplate, row_choices

KEYS = (32, 64, 128)  # keys at once
PARTS = (64, 128, 256, 512)  # widest part of a head in one matmul
SPLITS = (1, 4, 16)  # runs that share the keys of a row of queries
FEW = 64  # tokens up to which a split is considered

Make = Callable[[AttentionTile, Layout], Program]
Merge = Callable[[RowTile, Layout, int], Program]


def _select_attention(op: Op, weights: Mapping[str, Packing]) -> Computation:
    operands, a = operand_types(op), op.settings
    q, key, value = (operands[name].shape for name in "qkv")
    p = Attention(
        int(q[1]), int(key[1]), int(q[3]), int(value[3]), a.number("scale"), a.integer("window"), a.integer("chunk", 0),
        a.number("softcap"),
        "sinks" in operands, mask_of(operands), heads_first=True, eight_bits=bool(a.get("cache", "")),
    )  # fmt: skip

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        scalars = {"B": tokens.batch, "S": tokens.new, "P": tokens.past, "C": tokens.past + tokens.new}
        rows = tokens.new * p.heads // p.groups
        return attention_implementations(
            "attention", lambda t, layout: attention_kernel(p, t, layout),
            lambda t, layout, split: attention_merge(p, t, layout, split), scalars, rows, p.width, p.value_width, tokens,
            {"key": "k", "value": "v"},
        )  # fmt: skip

    return Computation("attention", p, {}, implementations)


def mask_of(operands: Mapping[str, TensorType]) -> str:
    """Return what the mask of an attention is for, as Attention has it."""
    mask = operands.get("mask")
    return "" if mask is None else "keys" if len(mask.shape) == 2 else "tokens"


def _select_compressed_attention(op: Op, weights: Mapping[str, Packing]) -> Computation:
    operands, a = operand_types(op), op.settings
    q = operands["q"].shape
    p = Compressed(
        int(q[2]), int(q[3]), a.integer("window"), a.number("scale"), a.integer("ratio"), "selected" in operands
    )
    chosen = operands["selected"].shape[2] if p.selected else 0

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        batch, new, past = tokens.batch, tokens.new, tokens.past
        scalars = {"B": batch, "S": new, "P": past}
        if p.ratio:
            scalars["C"] = max((past + new) // p.ratio, 1)
        if p.selected:
            scalars["J"] = max(int(evaluate(chosen, tokens.scalars)), 1)
        rows = p.heads if p.selected else new * p.heads
        kept = {"O": min(past, p.window - 1), "Y": min(past + new, p.window - 1)}
        state = KernelTemplate(
            "slide", lambda t, layout: slide_kernel(p.width, row_tile(t), layout), {"B": batch, "S": new, **kept},
            row_shapes(power_of_two(p.width)), staged=False, renamed={"old": "window", "new": "kv"},
        )  # fmt: skip
        found = attention_implementations(
            "compressed_attention", lambda t, layout: compressed_attention(p, t, layout),
            lambda t, layout, split: compressed_merge(p, t, layout, split), scalars, rows, p.width, p.width, tokens, {},
        )  # fmt: skip
        return tuple(Implementation(i.name, (*i.kernels, state)) for i in found)

    return Computation("compressed_attention", p, {}, implementations)


def attention_implementations(
    name: str, make: Make, merge: Merge, scalars: Mapping[str, int], rows: int, width: int, value: int, tokens: Tokens,
    renamed: Mapping[str, str], touched: Mapping[str, float] | None = None,
) -> tuple[Implementation, ...]:  # fmt: skip
    """Return attention in one kernel, and for few tokens with the keys split and a kernel that merges.

    `touched` has the share of a tensor that is read, where that is not all of it.
    """
    widest = [part for part in PARTS if part < 2 * power_of_two(min(width, value))] or [PARTS[0]]
    tiles = tuple(product(row_choices(rows), KEYS, widest))
    implementations = []
    for split in SPLITS if tokens.count <= FEW else SPLITS[:1]:

        def one(t: Tile, layout: Layout, split: int = split) -> Program:
            return make(AttentionTile(t.m, t.n, t.k, t.stages, t.warps, split), layout)

        kernels = [KernelTemplate(name, one, scalars, tiles, renamed=renamed, touched=touched)]
        if split > 1:
            kernels.append(_merge_template(merge, split, scalars, value, renamed))
        implementations.append(
            Implementation("keys in one go" if split == 1 else f"keys in {split} parts", tuple(kernels))
        )
    return tuple(implementations)


def _merge_template(
    merge: Merge, split: int, scalars: Mapping[str, int], value: int, renamed: Mapping[str, str]
) -> KernelTemplate:
    few = {key: scalars[key] for key in "BS"}
    tiles = row_shapes(power_of_two(value), (1, 2, 4))
    return KernelTemplate(
        "merge", lambda t, layout: merge(row_tile(t), layout, split), few, tiles, staged=False, renamed=renamed
    )


IMPLEMENTATIONS: dict[str, Selector] = {
    **dict.fromkeys(("nn.attention", "acc.attention"), _select_attention),
    "nn.compressed_attention": _select_compressed_attention,
}
