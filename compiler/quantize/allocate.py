"""Chooses a format for every unit so that all fit into a number of bytes and cost little: a knapsack.

Each unit starts at its smallest format; then the step that saves the most KL for a byte is taken, as long as one fits.
Only options on the lower convex hull of cost over bytes are looked at, so that a step never hides a better one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..errors import MoecError
from ..formats.table import find_format
from ..ir.recipes import Recipe
from .plan import Unit


@dataclass(frozen=True)
class Weight:
    """One weight of a unit: its bound recipe, and the format names that the target holds it in."""

    recipe: Recipe
    formats: frozenset[str]
    experts: tuple[int, ...] = ()  # those that it is about; none: all of it

    @property
    def key(self) -> tuple[Recipe, tuple[int, ...]]:
        """What names it: two units with the same weight store it once."""
        return self.recipe, self.experts

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        sizes = self.recipe.type.sizes
        return math.prod((len(self.experts) or sizes[0], *sizes[1:]))

    def bytes(self, format: str) -> Fraction:
        """The bytes that it takes in a format."""
        found = find_format(format)
        assert found
        return self.elements * found.bits_per_weight / 8


@dataclass(frozen=True)
class Option:
    """A choice for one or more units, with its bytes and its expected KL."""

    formats: tuple[tuple[Unit, str], ...]
    bytes: Fraction
    kl: float


def choose_formats(
    units: Mapping[Unit, list[Weight]], costs: Mapping[Unit, Mapping[str, float]], budget: int, fixed: int = 0
) -> dict[Unit, tuple[str, float]]:
    """Return a format and its KL for every unit, so that all fit in a number of bytes; MoecError says the least possible.

    `fixed` are bytes of other weights, which are in no format: messages count them in.
    """
    choices = [_lower_convex_hull(options) for options in _unit_options(units, costs)]
    now = [0] * len(choices)
    spent = sum(c[0].bytes for c in choices)
    if spent > budget:
        weights = sum({w.key: w.elements for u in units.values() for w in u}.values())
        raise MoecError(
            f"the budget of {(budget + fixed) / 1e6:.6g} MB cannot be met",
            todo=f"the least is {float(spent + fixed) / 1e6:.6g} MB, {float(spent * 8 / weights):.3f} bits per weight",
        )
    while True:
        steps = []
        for i, options in enumerate(choices):
            for j in range(now[i] + 1, len(options)):
                more = options[j].bytes - options[now[i]].bytes
                if spent + more <= budget:
                    steps.append(((options[now[i]].kl - options[j].kl) / float(more), -i, j, more))
        if not steps:
            break
        _, i, j, more = max(steps)
        now[-i] = j
        spent += more
    formats = [pair for options, at in zip(choices, now, strict=True) for pair in options[at].formats]
    return {unit: (format, costs[unit][format]) for unit, format in formats}


def _unit_options(units: Mapping[Unit, list[Weight]], costs: Mapping[Unit, Mapping[str, float]]) -> list[list[Option]]:
    """Return the options of each unit; units that store the same weight (a tied head) choose together, and share bytes."""
    owners: dict[tuple[Recipe, tuple[int, ...]], Unit] = {}
    groups: dict[Unit, list[Unit]] = {}
    for unit, weights in units.items():
        owner = next((owners[w.key] for w in weights if w.key in owners), unit)
        groups.setdefault(owner, []).append(unit)
        owners.update({w.key: owner for w in weights})
    found = []
    for members in groups.values():
        options = []
        for formats in itertools.product(*(costs[unit] for unit in members)):
            stored = {(w.key, f): w.bytes(f) for u, f in zip(members, formats, strict=True) for w in units[u]}
            kl = sum(costs[u][f] for u, f in zip(members, formats, strict=True))
            options.append(Option(tuple(zip(members, formats, strict=True)), sum(stored.values(), Fraction(0)), kl))
        found.append(options)
    return found


def _lower_convex_hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of KL over bytes, the smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.kl)):
        if kept and option.kl >= kept[-1].kl:
            continue
        while len(kept) > 1 and _kl_per_byte(kept[-2], option) <= _kl_per_byte(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


def _kl_per_byte(a: Option, b: Option) -> float:
    return (b.kl - a.kl) / float(b.bytes - a.bytes)
