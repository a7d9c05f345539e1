"""Selects the kernels of routed experts: sort, the two grouped matmuls, combine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ....compiler.errors import MoecError
from ....compiler.ir.module import Op
from ..chip.chip import Profile
from ..kernels.experts import Experts, combine_kernel, grouped_down, grouped_up, sort_kernel
from ..kernels.low_precision import Quantize
from ..kernels.order import axis_of_tiles
from ..predict.experts_touched import distinct_experts, expected_tiles
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
)  # fmt: skip
from .rounding import rounded_implementations
from .search import GROUPS, ROWS, KernelTemplate, is_swappable, row_choices, tile_shapes

SHARED = 1.1  # pairs for an expert that is touched, up to which each pair is taken by itself, without sorting


def _experts_half(op: Op, weights: Mapping[str, Packing]) -> Experts:
    """Return the half of routed experts that an op is; the other half is filled in alike and does not matter."""
    return experts_of(op, next(iter(weights.values())))


def experts_of(op: Op, weight: Packing) -> Experts:
    """Return the routed experts whose first or second matmul an op is, with its packed weight."""
    a, chosen = op.settings, int(op["ids"].type.shape[1])
    operands = operand_types(op)
    if op.name == "acc.grouped_up":
        inner = weight.rows // 2 if a.activation("act").gated else weight.rows
        return Experts(
            weight.experts, chosen, weight.columns, inner, weight, weight, "up_bias" in operands, act=a.activation("act"),
            rounded=a.text("to", ""), given=given_in(operands["x"]),
        )  # fmt: skip
    return Experts(
        weight.experts,
        chosen,
        weight.rows,
        weight.columns,
        weight,
        weight,
        down_bias="down_bias" in operands,
        given=given_in(operands["h"]),
        added=tuple(name for name in ("shared", "residual") if name in operands),
    )


def touched_shares(e: Experts, weight: str, tokens: int) -> dict[str, float]:
    """Return the share of each part of a weight that so many tokens need, with balanced routing."""
    share = distinct_experts(e.experts, e.chosen, tokens) / e.experts
    return {f"{weight}{part}": share for part in ("", "_codes", "_scales", "_zeros", "_bias")}


def _is_direct(e: Experts, tokens: int) -> bool:
    """Return whether each pair is a tile of its own: few of them share an expert, so that none is read often."""
    return tokens * e.chosen <= SHARED * distinct_experts(e.experts, e.chosen, tokens)


def _gathered_bytes(packing: Packing, profile: Profile) -> int:
    """Return the bytes of a row in bf16 that a chip gathers fastest; 0 where a weight's codes are not read as deep.

    Those of 4 bits are read 128 columns at once, others without a mask: their stored rows have to be whole tiles.
    """
    count, f = int(profile.rule("gather_bytes") or 0), packing.quantized
    if not count or f is None:
        return count
    return count if f.bits == 8 and packing.parts["codes"][1][-1] % (count // 2) == 0 else 0


def _grouped_implementations(kernel: Callable, name: str, e: Experts, packing: Packing, which: str) -> Callable:
    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        count = tokens.count
        direct = _is_direct(e, count)
        gathered = _gathered_bytes(packing, profile)
        bits, how = bits_of(profile, e.rounded), "pair by pair" if direct else "sorted"

        def matrix(out: str) -> KernelTemplate:
            made = replace(e, bits=bits) if out == e.rounded else replace(e, rounded="", dtype=out)
            return KernelTemplate(
                name, lambda t, layout: kernel(made, t, layout, direct), {"T": count},
                tile_shapes(ROWS[:1] if direct else row_choices(count * e.chosen / e.experts), packing.step, e.given, gathered),
                (lambda t: {}) if direct
                else (lambda t: axis_of_tiles(t.group, expected_tiles(e.experts, e.chosen, count, t.m))),
                touched_shares(e, which, count), GROUPS[:1] if direct else GROUPS, swaps=is_swappable(packing, e.given),
            )  # fmt: skip

        if e.rounded:
            return rounded_implementations(how, "h", matrix, Quantize(e.inner, e.rounded, bits=bits), count * e.chosen)
        after = (_combine_template(e, count),) if which == "down" else ()
        return (Implementation(how, (matrix(e.dtype), *after)),)

    return implementations


def _combine_template(e: Experts, count: int) -> KernelTemplate:
    return KernelTemplate(
        "combine",
        lambda t, layout: combine_kernel(e, t.n, layout, t.m),
        {"T": count},
        row_shapes(e.hidden),
        staged=False,
    )


def _select_sort(op: Op, weights: Mapping[str, Packing]) -> Computation:
    experts, chosen = op.settings.integer("experts"), int(op["ids"].type.shape[1])
    none = Packing("bf16", 1, 1)
    return _sort_of(Experts(experts, chosen, 1, 1, none, none))


def _sort_of(e: Experts) -> Computation:
    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        if _is_direct(e, tokens.count):
            return (Implementation("pair by pair", ()),)
        kernel = KernelTemplate(
            "sort", lambda t, layout: sort_kernel(e, layout), {"T": tokens.count}, ((1, 1, 1),), staged=False
        )
        return only_implementation(kernel)

    return Computation("sort", e, {}, implementations)


def _grouped_up(op: Op, weights: Mapping[str, Packing]) -> Computation:
    return _experts_up(_experts_half(op, weights), weights)


def _experts_up(e: Experts, weights: Mapping[str, Packing]) -> Computation:
    return Computation("experts_up", e, weights, _grouped_implementations(grouped_up, "grouped_up", e, e.up, "up"))


def _grouped_down(op: Op, weights: Mapping[str, Packing]) -> Computation:
    return _experts_down(_experts_half(op, weights), weights)


def _experts_down(e: Experts, weights: Mapping[str, Packing]) -> Computation:
    return Computation(
        "experts_down", e, weights, _grouped_implementations(grouped_down, "grouped_down", e, e.down, "down")
    )


def part_of_experts(computation: Computation, devices: int) -> Computation:
    """Return what one of `devices` devices computes of routed experts that are spread over them; others as they are.

    It has its part of the experts, and of the pairs of all devices on average as many as its own tokens make: each comes
    as a row of its own, with one choice. MoecError where the experts do not divide.
    """
    e = computation.problem
    if devices == 1 or not isinstance(e, Experts):
        return computation
    if e.experts % devices:
        raise MoecError(f"{e.experts} experts on {devices} devices", todo="give a number that divides them")
    up, down = (replace(p, experts=p.experts // devices) for p in (e.up, e.down))
    # what is added to a token's sum is added where the token is
    part = replace(e, experts=e.experts // devices, chosen=1, up=up, down=down, added=())
    whole = _PARTS[computation.kind](part, computation.weights)

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        return whole.implementations(replace(tokens, batch=tokens.batch * e.chosen), profile)

    return replace(whole, implementations=implementations)


_PARTS: dict[str, Callable[[Experts, Mapping[str, Packing]], Computation]] = {
    "sort": lambda e, weights: _sort_of(e),
    "experts_up": _experts_up,
    "experts_down": _experts_down,
}


IMPLEMENTATIONS: dict[str, Selector] = {
    "acc.sort": _select_sort,
    "acc.grouped_up": _grouped_up,
    "acc.grouped_down": _grouped_down,
}
