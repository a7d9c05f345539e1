"""Predicts how long a kernel takes on a chip: a roofline for each level, what a program moves and computes on it.

time = launch + fill + max(memory, cores), where
  memory = bytes that have to come from and go to device memory / the bandwidth that enough bytes under way can use
  cores  = rounds x (the slowest of loading, matrix unit and vector units of one point of the grid; their sum where
           nothing is loaded ahead); rounds = points / cores, rounded up
Bytes from device memory count once for each number that is used, and again as far as the cache loses them before they
are needed again (rereads.py); the rest comes from the cache. A figure without a source is an assumption, and is listed in ASSUMED.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from ..chip.chip import Profile
from ..tile.count import Counts
from ..tile.machine import core_count
from ..tile.tiles import Program
from .assumed import ASSUMED, cache_bandwidth, launch_time, matrix_rate, memory_rate, vector_rate
from .rereads import cache_capacity, device_bytes


@dataclass(frozen=True)
class Prediction:
    """Seconds and what they are made of. `bound` names the largest part: memory, cache, matrix, vector or launch."""

    time: float
    launch: float
    memory: float
    cores: float  # rounds of points, all that happens on the cores
    cache: float
    matrix: float
    vector: float
    bound: str
    device_bytes: float
    cache_bytes: float
    flops: float
    points: float
    rounds: int
    resident: int  # points on one core at once


def predict_kernel(
    program: Program, counts: Counts, scalars: Mapping[str, int], profile: Profile, *, warps: int, stages: int,
    use: Mapping[str, int], touched: Mapping[str, float], share: float = 1.0, group: int = 1,
) -> Prediction:  # fmt: skip
    """Return the prediction for one kernel.

    `use` has the bytes of each memory that a point takes, `touched` the share of a tensor that is needed (experts that
    are chosen), `share` the part of the matrix peak that tiles of this shape can reach. `group` predicts the order in which
    so many tiles of rows run side by side, of a program that has one.
    """
    cores = core_count(profile)
    resident = _resident_points(profile, use, warps)
    rounds = ceil(counts.points / cores)
    at_once = min(cores * min(resident, rounds), counts.points)
    needed = device_bytes(program, counts, scalars, touched, cache_capacity(profile), at_once, group)
    active = min(cores, counts.points)
    bandwidth = memory_rate(profile)
    step = counts.traffic / max(counts.points * max(counts.steps, 1), 1)
    waiting = active * min(resident, rounds) * step * max(stages - 1, 0.5)
    memory = needed / min(bandwidth, max(waiting, 1) / ASSUMED["latency"])
    cache = _seconds_of_core(counts.traffic / counts.points, cache_bandwidth(profile, bandwidth), cores)
    matrix = sum(
        _seconds_of_core(flops / counts.points, matrix_rate(profile, dtype) * share, cores)
        for dtype, flops in counts.dots.items()
    )
    inner = [_seconds_of_core(n / counts.points, profile.rate(*path), cores) for path, n in counts.moved.items()]
    matrix = max(matrix, *inner) if inner else matrix  # the unit waits for its operands
    vector = _seconds_of_core(counts.computed / counts.points, vector_rate(profile), cores)
    together = min(resident, rounds)  # points that wait at the same time, each for itself
    steps = counts.steps * ASSUMED["step"] / together
    one = max(cache, matrix, vector, steps) if stages > 1 or resident > 1 else cache + matrix + vector + steps
    one += ASSUMED["point"] / together
    launch = launch_time(profile)
    parts = {"memory": memory, "cache": rounds * cache, "matrix": rounds * matrix, "vector": rounds * vector}
    busy = max(memory, rounds * one)
    total = launch + 2 * ASSUMED["latency"] + busy
    bound = max(parts, key=lambda name: parts[name]) if busy > launch else "launch"
    flops = sum(counts.dots.values())
    return Prediction(
        total, launch, memory, rounds * one, parts["cache"], parts["matrix"], parts["vector"], bound, needed, counts.traffic, flops,
        counts.points, rounds, resident,
    )  # fmt: skip


def _seconds_of_core(amount: float, rate: float | None, cores: int) -> float:
    """Return the time of one core with its share of a rate of the whole device; 0 for a path that the profile has no rate of."""
    return amount * cores / rate if rate else 0.0


def matrix_share(profile: Profile, rows: int, columns: int) -> float:
    """Return the share of the matrix peak that tiles of this shape reach on a chip."""
    unit = profile.unit("bf16")
    share = min(1.0, rows * columns / (rows + columns) / ASSUMED["intensity"])
    if unit and unit.m and min(unit.m) > rows:
        return min(share, ASSUMED["warp_matrix"])
    return share


def _resident_points(profile: Profile, use: Mapping[str, int], warps: int) -> int:
    """Return how many points of a grid one core holds at once."""
    family = profile.family
    fits = [family.resident, family.resident_threads // (warps * profile.threads)]
    for name, size in use.items():
        memory = next((m for m in profile.memories if m.name == name and m.per == "core"), None)
        if memory and memory.capacity and size:
            fits.append(int(memory.capacity.value) // size)
    return max(min(fits), 1)
