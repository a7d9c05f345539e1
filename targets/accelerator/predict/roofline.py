"""How long an op without a kernel takes on a chip, and what a predicted step is made of.

An op that the framework computes is one kernel whose program is not known, so it takes what a good one would: a roofline
(Williams et al. 2009, one roof for each level) of the op's declared cost.

time = floor + the longest of what it moves and computes:
  memory  bytes from and to device memory / its bandwidth; activations do not count where the cache holds them
  cache   all bytes / the bandwidth of the cache before device memory
  matrix  FLOPs of products / the peak of the matrix unit in bf16
  vector  other FLOPs / the peak of the vector units
  floor   a launch and twice the latency of device memory
Ops with kernels take what predict.py says of their tile programs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..chip.chip import Profile
from ..tile.machine import device_memory
from .assumed import ASSUMED, cache_bandwidth, launch_time, matrix_rate, memory_rate, vector_rate
from .predict import Prediction
from .work import KINDS, MATRIX, Amounts, Work, WorkTable

PARTS = ("memory", "cache", "matrix", "vector", "launch")  # of a prediction


@dataclass(frozen=True)
class Rates:
    """The rates of a chip that predictions use; `cache_bytes` is what the cache before device memory holds."""

    memory: float
    cache: float
    matrix: float
    vector: float
    launch: float
    latency: float
    peak_memory: float  # the bandwidth without the share that copies reach
    cache_bytes: float

    @staticmethod
    def of(profile: Profile) -> Rates:
        """Return a chip's rates; MoecError names a bandwidth or peak that is not known."""
        memory = memory_rate(profile)
        shared = [m.capacity.value for m in profile.memories[1:] if m.per == "device" and m.capacity]
        return Rates(
            memory, cache_bandwidth(profile, memory), matrix_rate(profile, MATRIX), vector_rate(profile),
            launch_time(profile), ASSUMED["latency"], profile.need(f"memory.{device_memory(profile)}.bandwidth"),
            max(shared, default=0.0),
        )  # fmt: skip

    @property
    def floor(self) -> float:
        """Seconds that a kernel takes that does nothing."""
        return self.launch + 2 * self.latency


@dataclass(frozen=True)
class Row:
    """Ops of a step, of one call or of several: bytes, FLOPs and seconds. `bound` says what takes longest of them."""

    function: str
    op: str
    kernels: int
    weights: float
    activations: float
    states: float
    flops: Mapping[str, float]  # by what computes them: MATRIX, VECTOR
    device_bytes: float  # of all bytes those that pass device memory
    time: float
    parts: Mapping[str, float]  # seconds of memory, cache, matrix, vector, and of floors as launch

    @property
    def bytes(self) -> float:
        """All bytes that kernels read and write."""
        return self.weights + self.activations + self.states

    @property
    def bound(self) -> str:
        """The resource that takes longest: memory, cache, matrix, vector or launch."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class StepPrediction:
    """A step of `new` tokens of each of `batch` sequences behind `past` others, on one device: its ops and their sum."""

    batch: int
    new: int
    past: int
    rows: tuple[Row, ...]
    peak_memory: float
    table: WorkTable

    @cached_property
    def total(self) -> Row:
        """All rows together."""
        return _sum_rows("", "", self.rows)

    @property
    def time(self) -> float:
        """Predicted seconds."""
        return self.total.time

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second of one device."""
        return self.batch * self.new / self.time

    @property
    def bandwidth_share(self) -> float:
        """The time that the bytes take at the full bandwidth of device memory, as a share of the predicted time."""
        return self.total.device_bytes / self.peak_memory / self.time

    def grouped(self, *keys: str) -> list[Row]:
        """Return rows added up over equal `keys` (function, op), in the order of the program."""
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(tuple(getattr(row, key) for key in keys), []).append(row)
        return [
            _sum_rows(**{"function": "", "op": "", **dict(zip(keys, k, strict=True))}, rows=r)
            for k, r in groups.items()
        ]


def _sum_rows(function: str, op: str, rows: Sequence[Row]) -> Row:
    numbers = ("kernels", *KINDS, "device_bytes", "time")
    sums: dict[str, Any] = {name: sum(getattr(row, name) for row in rows) for name in numbers}
    flops, parts = _sum_maps([row.flops for row in rows]), _sum_maps([row.parts for row in rows])
    return Row(function, op, **sums, flops=flops, parts=parts)


def _sum_maps(maps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in maps for name in each)
    return {name: sum(each.get(name, 0.0) for each in maps) for name in names}


def framework_row(work: Work, amounts: Amounts, rates: Rates) -> Row:
    """Return an op that the framework computes in one kernel: all of its calls."""
    all_bytes = amounts.weights + amounts.activations + amounts.states
    kept = amounts.activations if amounts.activations <= rates.cache_bytes else 0.0
    rate = rates.matrix if work.unit == MATRIX else rates.vector
    parts = {
        "memory": (all_bytes - kept) / rates.memory,
        "cache": all_bytes / rates.cache,
        "matrix" if work.unit == MATRIX else "vector": amounts.flops / rate,
    }
    time = rates.floor + max(parts.values())
    return _row_of_op(work, amounts, 1, all_bytes - kept, time, {**parts, "launch": rates.floor})


def kernel_row(work: Work, amounts: Amounts, found: Sequence[Prediction]) -> Row:
    """Return an op that kernels compute one after the other: all of its calls. For few tokens it may need none."""
    parts = {name: sum(getattr(p, name) for p in found) for name in PARTS}
    return _row_of_op(work, amounts, len(found), sum(p.device_bytes for p in found), sum(p.time for p in found), parts)


def _row_of_op(
    work: Work, amounts: Amounts, kernels: int, device_bytes: float, time: float, parts: Mapping[str, float]
) -> Row:
    n = work.calls
    kinds = {kind: getattr(amounts, kind) * n for kind in KINDS}
    return Row(
        work.function, work.op, kernels * n, **kinds, flops={work.unit: amounts.flops * n},
        device_bytes=device_bytes * n, time=time * n, parts={name: seconds * n for name, seconds in parts.items()},
    )  # fmt: skip
