"""What `moec bench` measures and what it found, as data: points, times with their spread, where the time of a step goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from ..ir.notes import Note

SCHEMA = 1


@dataclass(frozen=True)
class Point:
    """What is measured: the prefill of a prompt of so many tokens, or a decode step behind so many past ones."""

    kind: Literal["prefill", "decode"]
    tokens: int
    batch: int


@dataclass(frozen=True)
class Plan:
    """What is measured of an artifact, and how often. `steps` are the decode steps of one repeat."""

    prompts: tuple[int, ...]
    pasts: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    repeats: int

    @property
    def points(self) -> tuple[Point, ...]:
        """All that is measured, in its order."""
        prefill = (Point("prefill", tokens, batch) for batch in self.batches for tokens in self.prompts)
        return (*prefill, *(Point("decode", tokens, batch) for batch in self.batches for tokens in self.pasts))

    @property
    def profiled(self) -> tuple[Point, ...]:
        """The points whose time is taken apart: of the first batch, the longest prompt, the shortest and the longest past."""
        chosen = [Point("prefill", n, self.batches[0]) for n in sorted(self.prompts)[-1:]]
        pasts = sorted(self.pasts)
        return (*chosen, *dict.fromkeys(Point("decode", n, self.batches[0]) for n in (*pasts[:1], *pasts[-1:])))


DEFAULT = Plan((16, 512), (16, 1024, 4096), (1,), steps=32, repeats=5)
SLOW = Plan((16,), (16,), (1,), steps=1, repeats=1)  # where a token takes a second


@dataclass(frozen=True)
class Spread:
    """The median of what was measured again and again, and how far it lay apart."""

    median: float
    min: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return the spread of some values."""
        return Spread(median(values), min(values), max(values))


@dataclass(frozen=True)
class Measured:
    """The time of one point: seconds of a prefill, or of one decode step.

    `weights` and `states` are the bytes that a decode step reads. `share` is what part of the streaming read they are,
    `predicted` the seconds that a step takes on the chip by its figures.
    """

    point: Point
    seconds: Spread
    rate: Spread  # tokens a second, all sequences together
    weights: int | None = None
    states: int | None = None
    share: float | None = None
    predicted: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        found = {
            "prompt" if self.point.kind == "prefill" else "past": self.point.tokens, "batch": self.point.batch,
            "seconds": asdict(self.seconds), "tokens_per_second": asdict(self.rate), "predicted_seconds": self.predicted,
        }  # fmt: skip
        if self.point.kind == "decode":
            read = None if self.weights is None or self.states is None else self.weights + self.states
            found |= {
                "bytes": {"weights": self.weights, "states": self.states},
                "bytes_per_token": None if read is None else read / self.point.batch, "bandwidth_share": self.share,
            }  # fmt: skip
        return found


@dataclass(frozen=True)
class OpShare:
    """What runs of one op took of a step: the part of the model that it is of, its seconds, how often it ran."""

    part: str
    name: str
    seconds: float
    runs: float
    predicted: float | None


@dataclass(frozen=True)
class Profile:
    """Where the time of a point goes; what is not in `ops` passes between them."""

    point: Point
    seconds: float
    ops: tuple[OpShare, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self.point), "seconds": self.seconds, "ops": [asdict(op) for op in self.ops]}


@dataclass(frozen=True)
class Bench:
    """What was measured of an artifact. `chip` says whether the times are those of what the artifact is for.

    `stream` is bytes a second of the streaming read; None where the weights are not in this machine's memory.
    """

    folder: str
    target: str
    runs: str
    chip: bool
    threads: int
    plan: Plan
    stream: Spread | None
    measured: tuple[Measured, ...]
    profiles: tuple[Profile, ...]
    notes: tuple[Note, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "schema": SCHEMA, "artifact": self.folder, "target": self.target, "runs_on": self.runs,
            "times_are_speed": self.chip, "threads": self.threads, "repeats": self.plan.repeats, "steps": self.plan.steps,
            "stream_bytes_per_second": None if self.stream is None else asdict(self.stream),
            "prefill": [m.to_dict() for m in self.measured if m.point.kind == "prefill"],
            "decode": [m.to_dict() for m in self.measured if m.point.kind == "decode"],
            "profiles": [p.to_dict() for p in self.profiles], "notes": [str(note) for note in self.notes],
        }  # fmt: skip
