"""Selects the kernels that round activations to a format: one of its own, or the one that makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import sympy

from ....compiler.formats.table import format_of
from ....compiler.ir.dims import evaluate
from ....compiler.ir.module import Op
from ..chip.chip import Profile
from ..kernels.low_precision import Quantize, quantize_kernel
from ..tile.packing import Packing
from .activations import bits_of
from .implementations import (
    Computation,
    Implementation,
    Selector,
    Tokens,
    only_implementation,
    operand_types,
    row_tile,
)
from .search import KernelTemplate

ROUNDED, UNROUNDED = "h", "unrounded"  # result of an op that rounds what it makes, and the scratch before that


def quantize_template(p: Quantize, rows: int) -> KernelTemplate:
    """Return the kernel that rounds so many rows."""
    widths = tuple(n for n in (128, 256, 512, 1024) if n < 2 * p.width) or (128,)
    tiles = tuple((m, n, 1) for m in (1, 2, 4, 8) for n in widths)
    return KernelTemplate(
        "quantize", lambda t, layout: quantize_kernel(p, row_tile(t), layout), {"T": rows}, tiles, staged=False
    )


def rounded_implementations(
    name: str, own: str, matrix: Callable[[str], KernelTemplate], p: Quantize, rows: int
) -> tuple[Implementation, ...]:
    """Return a product whose rows are rounded before they are stored, and one whose rows a second kernel rounds.

    Both give the same numbers. The second has the choice of tiles narrower than a group: more cores share few rows, and
    many rows are read less often. `matrix` gives the product for a dtype or format of its result, the argument `own`.
    """
    group, parts = format_of(p.format).group, ("codes", "scales")
    whole, apart = matrix(p.format), matrix("bf16")
    whole = replace(
        whole, shapes=tuple(s for s in whole.shapes if s[1] % group == 0),
        renamed={**whole.renamed, **{f"{own}_{part}": f"{ROUNDED}_{part}" for part in parts}},
    )  # fmt: skip
    apart = replace(apart, renamed={**apart.renamed, own: UNROUNDED})
    after = replace(
        quantize_template(p, rows),
        renamed={"x": UNROUNDED, **{f"y_{part}": f"{ROUNDED}_{part}" for part in parts}},
    )
    return Implementation(f"{name}, rounded", (whole,)), Implementation(f"{name}, then rounded", (apart, after))


def _select_quantize(op: Op, weights: Mapping[str, Packing]) -> Computation:
    x = operand_types(op)["x"]
    p = Quantize(int(x.shape[-1]), op.settings.text("to"))

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        rows = evaluate(sympy.Mul(*x.shape[:-1]), tokens.scalars)
        return only_implementation(quantize_template(replace(p, bits=bits_of(profile, p.format)), rows))

    return Computation("quantize", p, {}, implementations)


IMPLEMENTATIONS: dict[str, Selector] = {"acc.quantize": _select_quantize}
