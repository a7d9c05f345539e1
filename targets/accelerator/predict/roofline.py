"""How long a step of a whole module takes on a chip: a roofline for each op, from its declared cost and the profile.

time of an op = floor + the longest of what it moves and computes (Williams et al. 2009, one roof for each level):
  memory  bytes from and to device memory / its bandwidth; activations do not count where the cache holds them
  cache   all bytes / the bandwidth of the cache before device memory
  matrix  FLOPs of products / the peak of the matrix unit in bf16
  vector  other FLOPs / the peak of the vector units
  floor   a launch and twice the latency of device memory
Formulas stay formulas in B, S and P until numbers are put in (`Roofline.at`). predict.py predicts single kernels from
their tile programs; here no tiles are known, so this is what a good kernel for each op would take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy

from ....compiler.errors import MoecError
from ....compiler.ir.dims import Size, dim
from ....compiler.ir.module import Module
from ..chip.chip import Profile
from ..tile.machine import device_memory
from .assumed import ASSUMED, MEANING, cache_bandwidth, launch_time, matrix_rate, memory_rate, vector_rate
from .experts_touched import zipf_experts, zipf_number
from .work import MATRIX, VECTOR, Spread, Work, module_work, weight_bytes

_KINDS = ("weights", "activations", "states")  # what bytes are
USED = ("launch", "latency", "memory_reached", "matrix_reached", "vector_reached", "cache_times")  # of ASSUMED


@dataclass(frozen=True)
class Overlap:
    """What overlaps in time, a field for each."""

    levels: bool = True  # what one kernel moves and what it computes
    launches: bool = False  # the floor of a kernel and the work of the one before

    def lines(self) -> list[str]:
        """Return it in words."""
        return [
            "kernels run one after the other" + (", their floors hidden" if self.launches else ", each with its floor"),
            f"moving and computing of one kernel {'overlap' if self.levels else 'follow each other'}",
        ]


@dataclass(frozen=True)
class Rates:
    """The rates of a chip that predictions use; `cache_bytes` is what the cache before device memory holds."""

    memory: float
    cache: float
    matrix: float
    vector: float | None
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

    @cached_property
    def total(self) -> Row:
        """All rows together."""
        return _sum("", "", self.rows)

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
            _sum(**{"function": "", "op": "", **dict(zip(keys, k, strict=True))}, rows=r) for k, r in groups.items()
        ]


def _sum(function: str, op: str, rows: Sequence[Row]) -> Row:
    numbers = ("kernels", "weights", "activations", "states", "device_bytes", "time")
    sums: dict[str, Any] = {name: sum(getattr(row, name) for row in rows) for name in numbers}
    flops, parts = _added([row.flops for row in rows]), _added([row.parts for row in rows])
    return Row(function, op, **sums, flops=flops, parts=parts)


def _added(maps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in maps for name in each)
    return {name: sum(each.get(name, 0.0) for each in maps) for name in names}


@dataclass(frozen=True)
class Roofline:
    """The formulas of a module's ops and a chip's rates."""

    module: Module
    profile: Profile
    spread: Spread
    overlap: Overlap
    rates: Rates
    works: tuple[Work, ...]

    @property
    def bytes(self) -> dict[str, Size]:
        """The bytes of a step as formulas in B, S and P, by what they are: weights, activations, states."""
        return {name: sympy.Add(*(getattr(w, name) * w.calls for w in self.works)) for name in _KINDS}

    @property
    def flops(self) -> dict[str, Size]:
        """The FLOPs of a step as formulas, by what computes them."""
        return {u: sympy.Add(*(w.flops * w.calls for w in self.works if w.unit == u)) for u in (MATRIX, VECTOR)}

    @cached_property
    def weights(self) -> int:
        """The bytes of weights that one device holds."""
        return weight_bytes(self.module, self.spread)

    @cached_property
    def _numbers(self) -> Callable[..., list[float]]:
        """All formulas as one function of the dims; equal ones are computed once."""
        symbols = [dim(d.name) for d in self.module.dims]
        formulas = [getattr(w, name) for w in self.works for name in (*_KINDS, "flops")]
        different = list(dict.fromkeys(formulas))
        place = {formula: i for i, formula in enumerate(different)}
        compute = sympy.lambdify(symbols, different, modules=[{zipf_experts.__name__: zipf_number}, "math"])
        order = [place[formula] for formula in formulas]

        def numbers(*values: int) -> list[float]:
            found = compute(*values)
            return [float(found[i]) for i in order]

        return numbers

    def at(self, *, batch: int = 1, new: int = 1, past: int = 0) -> StepPrediction:
        """Return a step in numbers. MoecError for sizes that the program does not take; other dims are at their least."""
        values = {d.name: max(1, d.low) for d in self.module.dims} | {"B": batch, "S": new, "P": past}
        for d in self.module.dims:
            if not d.low <= values[d.name] <= d.high:
                raise MoecError(f"{d.name} = {values[d.name]} is outside the program's {d.low}..{d.high}")
        numbers = self._numbers(*(values[d.name] for d in self.module.dims))
        each = len(_KINDS) + 1
        rows = [self._row(work, *numbers[i * each : (i + 1) * each]) for i, work in enumerate(self.works)]
        return StepPrediction(batch, new, past, tuple(rows), self.rates.peak_memory)

    def _row(self, work: Work, weights: float, activations: float, states: float, flops: float) -> Row:
        """Return an op in numbers: one call, times the calls."""
        rates = self.rates
        all_bytes = weights + activations + states
        kept = activations if activations <= rates.cache_bytes else 0.0
        rate = rates.matrix if work.unit == MATRIX else rates.vector
        parts = {
            "memory": (all_bytes - kept) / rates.memory,
            "cache": all_bytes / rates.cache,
            "matrix" if work.unit == MATRIX else "vector": flops / rate if rate else 0.0,
        }
        busy = max(parts.values()) if self.overlap.levels else sum(parts.values())
        time = max(rates.floor, busy) if self.overlap.launches else rates.floor + busy
        n = work.calls
        parts = {name: seconds * n for name, seconds in (*parts.items(), ("launch", rates.floor))}
        return Row(
            work.function, work.op, n, weights * n, activations * n, states * n, {work.unit: flops * n},
            (all_bytes - kept) * n, time * n, parts,
        )  # fmt: skip

    def assumptions(self) -> list[str]:
        """Return what the prediction takes as given beside the profile, in words."""
        taken = {name: ASSUMED[name] for name in USED if name != "launch" or self.profile.launch is None}
        lines = [f"{name} = {value:g} ({MEANING[name]})" for name, value in taken.items()]
        lines += [
            *self.overlap.lines(),
            f"products are in {MATRIX}, states and activations are {MATRIX} between kernels",
        ]
        if self.rates.cache_bytes:
            lines.append("activations of an op that fit the cache do not pass device memory")
        if self.rates.vector is None:
            lines.append(f"vector_peak of {self.profile.name} is unknown: what is no product computes in no time")
        routing = f"skewed (Zipf, exponent {self.spread.skew:g})" if self.spread.skew else "balanced"
        lines.append(f"routing is {routing}")
        if self.spread.devices > 1:
            lines.append(
                f"experts are spread over {self.spread.devices} devices, the rest is on each of them; what they exchange is not counted"
            )
        return lines


def module_roofline(
    module: Module, profile: Profile, skew: float = 0.0, *, devices: int = 1, overlap: Overlap = Overlap()
) -> Roofline:
    """Return the roofline of a module of any stage on a chip; `skew` and `devices` are those of `Spread`.

    MoecError names a figure of the profile that is needed and unknown, and an op that is not declared.
    """
    if devices < 1 or not math.isfinite(skew) or skew < 0:
        raise MoecError(f"devices = {devices} and skew = {skew}: at least 1 and at least 0 are possible")
    spread = Spread(devices, skew)
    return Roofline(module, profile, spread, overlap, Rates.of(profile), tuple(module_work(module, spread)))
