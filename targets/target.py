"""What the driver knows about a target: its name, its pipeline, what it runs, and how it lowers, writes and runs a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..compiler.errors import MoecError
from ..compiler.formats.caches import BITS, nearest_type
from ..compiler.ir.pipelines import PassCall, Pipeline, with_caches

if TYPE_CHECKING:
    from ..compiler.formats.format import Format
    from ..compiler.ir.module import Module, Op
    from ..compiler.ir.notes import Note, Rewritten
    from ..compiler.weights.sources.source import WeightSource

# what every target does before its own lowering: the ops of stage moe, fused
FUSED = tuple(
    PassCall(name)
    for name in (
        "cleanup", "raise-experts", "raise-norm", "raise-rope", "lift-moe", "cleanup", "fuse-router", "cleanup", "fuse-dispatch",
        "fuse-shared-experts", "absorb-mla", "fuse-attention", "fuse-norm", "cleanup",
    )
)  # fmt: skip


class Emitted(NamedTuple):
    """The sha256 of each file that was written, by its name, and what a user should know of what was left out.

    `kernels` is what moec.json says of libraries of moec's own that the runtime calls.
    """

    files: dict[str, str]
    notes: tuple[Note, ...] = ()
    kernels: Mapping[str, Any] = MappingProxyType({})


class Emit(Protocol):
    """Writes a module of stage kernel into a folder.

    Weights are worked on in tiles of `tile_bytes` of f32. `progress` is told the bytes of weights written so far.
    """

    def __call__(
        self,
        module: Module,
        source: WeightSource,
        folder: Path,
        tile_bytes: int,
        progress: Callable[[int], None] | None = None,
    ) -> Emitted: ...


@dataclass(frozen=True)
class Probed:
    """The result of probing a runtime: a row of plain data for each variant, and the same as the text of a record.

    `differences` says where it is not what the target's record says; `lost` that something right is so no more.
    """

    made_with: str  # the runtime and the machine
    rows: list[dict[str, Any]]
    text: str
    differences: tuple[str, ...] = ()
    lost: bool = False


class Probe(Protocol):
    """Tries the installed runtime; `quick` leaves out speeds. `progress` is told the variants done and those in all."""

    def __call__(self, quick: bool = False, progress: Callable[[int, int], None] | None = None) -> Probed: ...


class Predict(Protocol):
    """Predicts how long a step of a module of stage kernel takes, as plain data; see the target for what is in it.

    A step is `new` tokens of each of `batch` sequences behind `past` others, on one of `devices` that share the experts.
    """

    def __call__(self, module: Module, *, batch: int, new: int, past: int, devices: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Ops:
    """What a target runs: `declare` declares the ops of its own, `supported` returns why it does not run an op (None: it does)."""

    declare: Callable[[], object]
    supported: Callable[[Op], str | None]


@dataclass(frozen=True)
class Formats:
    """The stored formats of a target: `holds` returns why an op of stage moe cannot have its weights in one, `slow` why it should not."""

    holds: Callable[[Op, Format], str | None]
    slow: Callable[[Op, Format], str | None]


@dataclass(frozen=True)
class Target:
    """A target: what it runs and holds, and how it lowers a module, writes an artifact and opens one.

    `lower` is its own pass from stage moe to stage kernel: a function `(module, target, *, options)`. `load` opens an
    artifact: a function `(folder, **options)` that returns a session. `options` returns the target with options (-D), and
    raises MoecError for those that it does not have.
    """

    name: str
    doc: str
    pipeline: Pipeline
    ops: Ops
    formats: Formats
    lower: Callable[..., Rewritten]
    emit: Emit
    load: Callable[..., Any]
    options: Callable[[Mapping[str, str]], Target] | None = None
    recorded: Callable[[], Probed] | None = None  # what the lowering goes by, for a target that has such a record
    probe: Probe | None = None
    processor: Callable[[], dict[str, Any]] | None = (
        None  # what kernels of its own find of the machine that this runs on
    )
    caches: Mapping[str, PassCall | None] = field(
        default_factory=dict
    )  # what --kv can be -> the pass that stores them so
    narrow_caches: Callable[[], bool] | None = None  # whether its kernels read caches of fewer bits than f32 fast
    predict: Predict | None = None  # for a target that is known by its figures
    keeps_experts: bool = False  # moe.experts is an op of its own, and none that its lowering left over
    checkpoint: bool = False  # what it writes is read as a checkpoint, not as an artifact's program
    packages: tuple[str, ...] = ()  # what it makes artifacts with; moec.json records the versions

    def store_caches(self, pipeline: Pipeline, kv: str | None) -> Pipeline:
        """Return a pipeline that stores keys and values as asked: None and `auto` are what it does by itself.

        MoecError, with what is nearest, where the target cannot.
        """
        if kv is None or kv == "auto":
            return pipeline
        where, known = f"--kv {kv}", tuple(self.caches)
        if kv not in BITS:
            raise MoecError(f"caches are not stored as {kv}", where, todo=f"there are auto, {', '.join(BITS)}")
        if not known:
            raise MoecError(f"target {self.name} has no caches whose type can be chosen", where, todo="leave it out")
        if kv not in known:
            near = nearest_type(kv, known)
            has = f"--kv {near} is the nearest of {', '.join(known)}" if len(known) > 1 else f"it has {near} only"
            raise MoecError(f"target {self.name} does not store caches as {kv}", where, todo=has)
        return with_caches(pipeline, {call.name for call in self.caches.values() if call}, self.caches[kv])

    def keep_caches(self, pipeline: Pipeline, stored: str | None) -> Pipeline:
        """Return a pipeline that stores keys and values as the source does, where a pass of its own would choose what as."""
        choosing = {call.name for call in self.caches.values() if call}
        chooses = any(call.name in choosing and not call.options for call in pipeline)
        return self.store_caches(pipeline, stored) if chooses and stored in self.caches else pipeline
