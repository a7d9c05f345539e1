"""What the driver knows about a target: its name, its pipeline, what it runs, and how it lowers, writes and runs a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..compiler.formats import Format
    from ..compiler.ir import Module, Op
    from ..compiler.weights.sources import WeightSource


class Lower(Protocol):
    """Turns a module of stage moe into one of stage kernel; appends to `why` what it left unfused, and the reason."""

    def __call__(self, module: Module, why: list[str] | None = None, accuracy: str = "fast") -> Module: ...


class Emit(Protocol):
    """Writes a module of stage kernel into a folder and returns the sha256 of each file by its name.

    Weights are worked on in tiles of `tile_bytes` of f32. `progress` is told the bytes of weights written so far.
    """

    def __call__(
        self,
        module: Module,
        source: WeightSource,
        folder: Path,
        tile_bytes: int,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, str]: ...


@dataclass(frozen=True)
class Target:
    """A target.

    `supported` returns None for an op that the target runs, else the reason why it does not; `holds` likewise for an
    op of stage moe with its weights in a quantized format.
    """

    name: str
    doc: str
    pipeline: str
    supported: Callable[[Op], str | None]
    holds: Callable[[Op, Format], str | None]
    lower: Lower
    emit: Emit
    load: Callable[..., Any]  # (folder, **options) -> a runner; see the target's session module
