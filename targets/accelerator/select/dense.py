"""Selects the kernels of dense layers, norms and rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy

from ....compiler.formats.table import find_format
from ....compiler.ir.activation import IDENTITY
from ....compiler.ir.dims import evaluate
from ....compiler.ir.module import Op
from ..chip.chip import Profile
from ..kernels.dense import Linear, linear_kernel, linear_sum
from ..kernels.low_precision import Quantize
from ..kernels.norm import Norm, norm_kernel, power_of_two
from ..kernels.rope import Append, Rope, qk_rope_append, rope_kernel
from ..tile.packing import Packing
from .activations import bits_of
from .implementations import (
    Computation,
    Implementation,
    Selector,
    Tokens,
    given_in,
    only_implementation,
    operand_types,
    row_shapes,
    row_tile,
)  # fmt: skip
from .rounding import rounded_implementations
from .search import GROUPS, KernelTemplate, is_swappable, row_choices, tile_shapes

SPLITS = (4,)  # parts that the depth of a linear may be cut into
FEW = 64  # tokens up to which that is considered


# --- linear --------------------------------------------------------------------------------------------------------


def _select_linear(op: Op, weights: Mapping[str, Packing]) -> Computation | None:
    """Return a linear as kernels; one with an f32 weight is the framework's: routers and gates, which are small."""
    weight = weights["w" if "w" in weights else "up"]
    if weight.format == "f32":
        return None
    operands, a = operand_types(op), op.settings
    blocks = int(operands["x"].shape[2]) if op.name == "acc.block_linear" else 1
    gated = op.name == "acc.gated_up"
    rows = weight.rows // blocks // (2 if gated else 1)
    p = Linear(
        rows, weight.columns, weight, blocks, "bias" in operands, dtype=given_in(operands["x"]),
        out=(a.text("to", "") if gated else "") or a.text("out", "bf16"), act=a.activation("act") if gated else IDENTITY,
    )  # fmt: skip

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        return linear_implementations(replace(p, bits=bits_of(profile, p.out)), tokens)

    return Computation("gated_up" if gated else "linear", p, weights, implementations)


def linear_implementations(p: Linear, tokens: Tokens) -> tuple[Implementation, ...]:
    """Return a linear in one kernel, and for few tokens cut along its depth and followed by a sum.

    A gated one is not cut; its rows may be rounded where they are made, or behind it.
    """
    count = {"T": tokens.count}
    tiles = tile_shapes(row_choices(tokens.count), p.weight.step, given=p.dtype)

    def whole(out: str) -> KernelTemplate:
        made = replace(p, out=out)
        return KernelTemplate(
            "linear", lambda t, layout: linear_kernel(made, t, layout), count, tiles, groups=GROUPS,
            swaps=is_swappable(p.weight, p.dtype), renamed={"w": "up", "y": "h"} if p.act.gated else {},
        )  # fmt: skip

    if find_format(p.out):
        return rounded_implementations("whole", "y", whole, Quantize(p.rows, p.out, bits=p.bits), tokens.count)
    implementations = [Implementation("whole", (whole(p.out),))]
    if tokens.count <= FEW and not p.act.gated:
        implementations += [_split_linear(p, split, count, tiles) for split in SPLITS]
    return tuple(implementations)


def _split_linear(
    p: Linear, split: int, count: Mapping[str, int], tiles: tuple[tuple[int, int, int], ...]
) -> Implementation:
    part = KernelTemplate(
        "linear",
        lambda t, layout: linear_kernel(p, t, layout, split),
        count,
        tiles,
        swaps=is_swappable(p.weight, p.dtype),
    )
    total = KernelTemplate(
        "linear_sum", lambda t, layout: linear_sum(p, t, layout, split), count, row_shapes(p.rows * p.blocks),
        staged=False,
    )  # fmt: skip
    return Implementation(f"depth in {split} parts", (part, total))


# --- norms and heads -----------------------------------------------------------------------------------------------

_NORMS = ("nn.rms_norm", "nn.add_rms_norm", "nn.layer_norm", "acc.norm")


def _select_norm(op: Op, weights: Mapping[str, Packing]) -> Computation:
    operands, a = operand_types(op), op.settings
    rounds = op.name == "acc.norm"
    p = Norm(
        int(operands["x"].shape[-1]), a.number("eps"), "w" in operands, "b" in operands,
        a.flag("centred", False) if rounds else op.name == "nn.layer_norm", "residual" in operands,
        plain=a.flag("plain", True) if rounds else True, rounded=(a.text("to", "") or "bf16") if rounds else "",
    )  # fmt: skip
    lead = operands["x"].shape[:-1]

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        rows = evaluate(sympy.Mul(*lead), tokens.scalars)
        tiles = row_shapes(power_of_two(p.width))
        made = replace(p, bits=bits_of(profile, p.rounded))
        return only_implementation(
            KernelTemplate(op.name.rpartition(".")[2], lambda t, layout: norm_kernel(made, row_tile(t), layout),
                   {"T": rows}, tiles, staged=False)
        )  # fmt: skip

    return Computation("norm", p, {}, implementations)


def _select_rope(op: Op, weights: Mapping[str, Packing]) -> Computation:
    operands = operand_types(op)
    shape, angles = operands["x"].shape, operands["cos"].shape
    pairs = op.name == "nn.rope_pairs"
    p = Rope(
        int(shape[2 if pairs else 1]), int(shape[3]), int(angles[2]) * (2 if pairs else 1), pairs,
        op.settings.flag("inverse", False), own_angles=str(angles[0]) == "B", heads_first=not pairs,
    )  # fmt: skip

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        scalars = {"B": tokens.batch, "S": tokens.new}
        return only_implementation(_head_kernel("rope", lambda t, layout: rope_kernel(p, row_tile(t), layout), scalars))

    return Computation("rope", p, {}, implementations)


def _select_append(op: Op, weights: Mapping[str, Packing]) -> Computation:
    operands, a = operand_types(op), op.settings
    key = operands["past_key"].shape
    angles = operands.get("cos")
    p = Append(
        a.integer("heads"), int(key[1]), int(key[3]), int(angles.shape[2]) if angles else 0, "k" not in operands,
        "q_norm" in operands, "k_norm" in operands, a.number("eps"), angles is not None and str(angles.shape[0]) == "B",
        eight_bits=bool(a.text("cache", "")),
    )  # fmt: skip

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        scalars = {"B": tokens.batch, "S": tokens.new, "P": tokens.past, "C": tokens.past + tokens.new}
        own = replace(p, bits=bits_of(profile, "fp8_g128")) if p.eight_bits else p
        return only_implementation(
            _head_kernel(
                "qk_rope_append", lambda t, layout: qk_rope_append(own, row_tile(t), layout), scalars,
                renamed={"qkv": "q", "y": "q"},
                appended={"key": ("past_key", "key"), "value": ("past_value", "value")},
            )
        )  # fmt: skip

    return Computation("rope_append", p, {}, implementations)


def _head_kernel(name: str, make: Any, scalars: Mapping[str, int], **bound: Any) -> KernelTemplate:
    return KernelTemplate(name, make, scalars, tuple((m, 1, 1) for m in (1, 2, 4, 8, 16, 32)), staged=False, **bound)


IMPLEMENTATIONS: dict[str, Selector] = {
    **dict.fromkeys(("acc.linear", "acc.gated_up", "acc.block_linear"), _select_linear),
    **dict.fromkeys(_NORMS, _select_norm),
    **dict.fromkeys(("nn.rope", "nn.rope_pairs"), _select_rope),
    "acc.rope_append": _select_append,
}
