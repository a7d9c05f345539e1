"""Counts what has to come from device memory again because the cache did not keep it until it was needed again.

A grid's axes run one after the other, the first the fastest. What a tensor's place does not depend on an axis is needed
again at each value of it. In between all that the faster axes touch passes the cache: as far as that is more than the
cache holds, it has to be read again. Values of an axis that run at the same time read it once together.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from ....compiler.ir.dtypes import DTYPES
from ..chip.chip import Profile
from ..tile.count import Axis, Counts
from ..tile.expr import evaluate_expr
from ..tile.tiles import Program

KEPT = 0.5  # share of the cache's capacity that serves what is needed again: its halves may both hold a line


def cache_capacity(profile: Profile) -> float | None:
    """Return the bytes of the largest cache before device memory; None where a chip has none, or of unknown size."""
    caches = [m.capacity.value for m in profile.memories[1:] if m.per == "device" and m.capacity]
    return max(caches, default=None)


def device_bytes(
    program: Program, counts: Counts, scalars: Mapping[str, int], touched: Mapping[str, float], cache: float | None,
    at_once: float, group: int = 1,
) -> float:  # fmt: skip
    """Return the bytes that have to pass device memory: each number that is used, as often as the cache loses it.

    `touched` is the share of a tensor that is needed, `at_once` the number of points that run at the same time. `group`
    asks for the order that `tile_axes` of kernels/order.py gives the program when it puts so many tiles side by side.
    """
    sizes: dict[str, float] = {}
    for argument in program.arguments:
        size = prod(int(evaluate_expr(n, scalars)) for n in argument.shape) * DTYPES[argument.dtype].bits / 8
        sizes[argument.name] = size * touched.get(argument.name, 1.0)
    once = {name: min(moved, sizes[name]) for name, moved in counts.loaded.items()}
    total = sum(once.values()) + sum(min(moved, sizes[name]) for name, moved in counts.stored.items())
    if cache is None or _touched_by(counts, sizes, counts.axes[:-1]) <= KEPT * cache:
        return total
    axes = side_by_side(counts.axes, group)
    reach = [_touched_by(counts, sizes, axes[:i]) for i in range(len(axes))]
    lost = [max(0.0, 1 - KEPT * cache / max(bytes_, 1.0)) for bytes_ in reach]
    return total + sum(
        bytes_ * (_read_count(counts, name, bytes_, axes, lost, at_once) - 1) for name, bytes_ in once.items()
    )


def side_by_side(axes: tuple[Axis, ...], group: int) -> tuple[Axis, ...]:
    """Return the axes column and tile in the order in which `group` tiles of rows run before the next column."""
    if group == 1:
        return axes
    column, tile, *rest = axes
    return (Axis(tile.name, min(group, tile.extent)), column, Axis(tile.name, max(tile.extent / group, 1.0)), *rest)


def _touched_by(counts: Counts, sizes: Mapping[str, float], axes: tuple[Axis, ...]) -> float:
    """Return the bytes that are touched while these axes go through all their values and the others stay."""
    total = 0.0
    for moved in (counts.loaded, counts.stored):
        for name, bytes_ in moved.items():
            depends = counts.depends[name].names
            each = bytes_ / counts.points * prod(axis.extent for axis in axes if axis.name in depends)
            total += min(each, sizes[name])
    return total


def _read_count(
    counts: Counts, name: str, once: float, axes: tuple[Axis, ...], lost: list[float], at_once: float
) -> float:  # fmt: skip
    """Return how often a tensor's bytes come from device memory.

    Along an axis that its place does not depend on it is needed at every value. What is needed more often than that is
    so by numbers that are loaded, as an expert's weight is by several tiles of rows: along the axes of those numbers.
    """
    depends = counts.depends[name]
    times, left = 1.0, counts.loaded[name] / max(once, 1.0)
    before = [prod(axis.extent for axis in axes[:i]) for i in range(len(axes))]
    order = [i for i, axis in enumerate(axes) if axis.name not in depends.names]
    order += [i for i, axis in enumerate(axes) if axis.name in depends.loaded - depends.computed]
    for i in order:
        uses = max(1.0, min(axes[i].extent, left))
        left /= uses
        together = min(uses, max(1.0, at_once / before[i]))
        times *= 1 + (uses / together - 1) * lost[i]
    return times
