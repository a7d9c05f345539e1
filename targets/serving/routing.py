"""How often experts were chosen, as `moec run --record-routing` writes it, and what that asks of a placement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...compiler.errors import MoecError
from ...compiler.errors.json_files import Shape, find_misfit, read_json
from .experts import Loads, Placement, place_by_load, place_in_order
from .workload import Workload

SCHEMA = 1
SHAPE: Shape = {"schema": int, "model": str, "tokens": int, "counts": [[int]]}


@dataclass(frozen=True)
class Spread:
    """How the experts are spread over ranks: their placement (None: balanced, in order), and the fullest rank's load over the mean."""

    placement: Placement | None
    imbalance: float = 1.0
    unplaced: float = 1.0  # the imbalance in the order of numbers, without copies

    @property
    def copies(self) -> int:
        """Slots beyond one for each expert."""
        return self.placement.copies if self.placement else 0


EVEN = Spread(None)


def routing_text(model: str, tokens: int, counts: Sequence[Sequence[int]]) -> str:
    """Return the text of a file with how often each expert was chosen, a row for each layer with experts."""
    content: dict[str, Any] = {"schema": SCHEMA, "model": model, "tokens": tokens, "counts": [list(c) for c in counts]}
    return json.dumps(content) + "\n"


@lru_cache(maxsize=64)
def read_routing(path: str) -> tuple[tuple[int, ...], ...]:
    """Return the counts of a file; MoecError for one that has none."""
    found = read_json(Path(path))
    if (place := find_misfit(found, SHAPE)) is not None or not found["counts"]:
        raise MoecError(
            f"{Path(path).name} has no routing: {place or 'counts'} is missing", path,
            todo="make one: moec run DIR --prompt TEXT --record-routing FILE",
        )  # fmt: skip
    return tuple(tuple(row) for row in found["counts"])


def check_routing(loads: Loads, workload: Workload, where: str) -> None:
    """Raise MoecError for counts of another model."""
    shape = [len(row) for row in loads]
    wanted = [e.count for layer in workload.layers for e in layer.experts for _ in range(layer.calls)]
    if sorted(shape) != sorted(wanted):
        raise MoecError(
            f"the routing is of {len(shape)} layers with {max(shape)} experts, the model has {len(wanted)} with {max(wanted, default=0)}",
            where,
        )


@lru_cache(maxsize=256)
def spread_experts(loads: tuple[tuple[int, ...], ...], ranks: int, copies: int) -> Spread:
    """Return how experts that were chosen so often are spread over ranks; MoecError where slots do not divide."""
    placed = place_by_load(loads, ranks, copies)
    plain = place_in_order(len(loads), len(loads[0]), ranks)
    return Spread(placed, placed.imbalance(loads), plain.imbalance(loads))
