"""Which kernels compute which op: from an op of stage kernel to kernels that a tile can be searched for.

KINDS is the table of what an accelerator runs. Ops in FRAMEWORK are left to the framework (torch) between kernels:
shapes, tables, and arithmetic on numbers that are few beside the weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...compiler.ir import Op
from ...compiler.ops import OPS
from .chip import Profile
from .experts_touched import distinct_experts, expected_tiles
from .kernels_experts import Experts, combine, grouped_down, grouped_up, sort
from .packing import Packing
from .search import COLUMNS, ROWS, Kernel, shapes

SHARED = 1.1  # pairs for an expert that is touched, up to which each pair is taken by itself, without sorting


@dataclass(frozen=True)
class Tokens:
    """A step: `new` tokens of each of `batch` sequences behind `past` others."""

    batch: int
    new: int
    past: int

    @property
    def count(self) -> int:
        """All tokens of the step."""
        return self.batch * self.new

    @property
    def scalars(self) -> dict[str, int]:
        """The numbers that kernels are launched with."""
        return {"T": self.count, "B": self.batch, "S": self.new, "P": self.past}


@dataclass(frozen=True)
class Way:
    """One way to compute an op: kernels that run one after the other."""

    name: str
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Step:
    """An op as kernels. Equal problems of one kind share them; `ways` gives those for a number of tokens."""

    kind: str
    problem: Any
    weights: Mapping[str, Packing]
    ways: Callable[[Tokens, Profile], tuple[Way, ...]]


Kind = Callable[[Op, Mapping[str, Packing]], Step | None]  # None: the framework computes this one


def attributes(op: Op) -> dict[str, Any]:
    """Return an op's attributes with the defaults."""
    return OPS[op.name].complete(op.attributes)


def scalars_of(program_scalars: tuple[str, ...], tokens: Tokens) -> dict[str, int]:
    """Return the scalars that a program declares."""
    return {name: tokens.scalars[name] for name in program_scalars}


# --- routed experts ------------------------------------------------------------------------------------------------


def _experts(op: Op, weights: Mapping[str, Packing]) -> Experts:
    """Return the half of routed experts that an op is; the other half is filled in alike and does not matter."""
    a, ids = attributes(op), op.operands[1]
    assert ids
    chosen = int(ids.type.shape[1])
    weight = next(iter(weights.values()))
    names = [o.name for o in OPS[op.name].signature.operands]
    given = {name for name, v in zip(names, op.operands, strict=False) if v is not None}
    if op.name == "acc.grouped_up":
        inner = weight.rows // 2 if a["gated"] else weight.rows
        return Experts(
            weight.experts, chosen, weight.columns, inner, weight, weight, a["act"], a["gated"],
            a["layout"] == "interleaved", a["alpha"], a["beta"], a["limit"], "up_bias" in given,
        )  # fmt: skip
    return Experts(weight.experts, chosen, weight.rows, weight.columns, weight, weight, down_bias="down_bias" in given)


def _touched(e: Experts, weight: str, tokens: int) -> dict[str, float]:
    share = distinct_experts(e.experts, e.chosen, tokens) / e.experts
    return {f"{weight}{part}": share for part in ("", "_codes", "_scales", "_zeros", "_bias")}


def _is_direct(e: Experts, tokens: int) -> bool:
    """Return whether each pair is a tile of its own: few of them share an expert, so that none is read often."""
    return tokens * e.chosen <= SHARED * distinct_experts(e.experts, e.chosen, tokens)


def _grouped(kernel: Callable, name: str, e: Experts, packing: Packing, which: str) -> Callable:
    def ways(tokens: Tokens, profile: Profile) -> tuple[Way, ...]:
        count = tokens.count
        direct = _is_direct(e, count)
        matrix = Kernel(
            name, lambda t, layout: kernel(e, t, layout, direct), {"T": count},
            shapes(ROWS[:1] if direct else ROWS, packing.step),
            (lambda t: {}) if direct else (lambda t: {"tile": expected_tiles(e.experts, e.chosen, count, t.m)}),
            _touched(e, which, count),
        )  # fmt: skip
        after = (_combine(e, count),) if which == "down" else ()
        return (Way("pair by pair" if direct else "sorted", (matrix, *after)),)

    return ways


def _combine(e: Experts, count: int) -> Kernel:
    return Kernel(
        "combine", lambda t, layout: combine(e, t.n, layout, t.m), {"T": count}, row_shapes(e.hidden), staged=False
    )


def row_shapes(columns: int, rows: tuple[int, ...] = (1, 2, 4, 8)) -> tuple[tuple[int, int, int], ...]:
    """Return tiles of kernels that work on rows: (rows, columns, 1)."""
    widths = [n for n in (128, 256, 512, 1024) if n < 2 * columns] or [128]
    return tuple((m, n, 1) for m in rows for n in widths)


def _sort(op: Op, weights: Mapping[str, Packing]) -> Step:
    ids = op.operands[0]
    assert ids
    experts, chosen = attributes(op)["experts"], int(ids.type.shape[1])
    none = Packing("bf16", 1, 1)
    e = Experts(experts, chosen, 1, 1, none, none)

    def ways(tokens: Tokens, profile: Profile) -> tuple[Way, ...]:
        if _is_direct(e, tokens.count):
            return (Way("pair by pair", ()),)
        kernel = Kernel("sort", lambda t, layout: sort(e, layout), {"T": tokens.count}, ((1, 1, 1),), staged=False)
        return (Way("sort", (kernel,)),)

    return Step("sort", e, {}, ways)


def _grouped_up(op: Op, weights: Mapping[str, Packing]) -> Step:
    e = _experts(op, weights)
    return Step("experts_up", e, weights, _grouped(grouped_up, "grouped_up", e, e.up, "up"))


def _grouped_down(op: Op, weights: Mapping[str, Packing]) -> Step:
    e = _experts(op, weights)
    return Step("experts_down", e, weights, _grouped(grouped_down, "grouped_down", e, e.down, "down"))


KINDS: dict[str, Kind] = {"acc.sort": _sort, "acc.grouped_up": _grouped_up, "acc.grouped_down": _grouped_down}

FRAMEWORK = ("nn.embedding", "nn.cache_append")  # and core.*


def supported(op: Op) -> str | None:
    """Return None if an op has kernels or is left to the framework, else why not, with the ops that come near."""
    if op.callee or op.name in KINDS or op.name in FRAMEWORK or op.name.startswith("core."):
        return None
    near = difflib.get_close_matches(op.name, KINDS, n=3, cutoff=0.5) or sorted(KINDS)
    return f"no kernel computes {op.name}; there are those for {', '.join(near)}"


__all__ = ["COLUMNS", "FRAMEWORK", "KINDS", "Step", "Tokens", "Way", "supported"]
