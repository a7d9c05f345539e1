"""Which experts each device holds: in the order of their numbers, or balanced by how often they were chosen, hot ones copied.

A slot is room for one expert of a layer on one device. Devices have equally many slots; where there are more slots than
experts, some experts have copies, and tokens are spread evenly over the copies of an expert.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...compiler.errors import MoecError

Loads = Sequence[Sequence[float]]  # how often each expert was chosen, layer by layer


@dataclass(frozen=True)
class Placement:
    """The expert in each slot, layer by layer; device r of `ranks` has the slots r n to (r + 1) n of each layer."""

    experts: int
    ranks: int
    slots: tuple[tuple[int, ...], ...]

    @property
    def copies(self) -> int:
        """Slots beyond one for each expert."""
        return (len(self.slots[0]) if self.slots else self.experts) - self.experts

    def of_rank(self, layer: int, rank: int) -> tuple[int, ...]:
        """Return the experts of a layer that a device holds."""
        each = len(self.slots[layer]) // self.ranks
        return self.slots[layer][rank * each : (rank + 1) * each]

    def holders(self, layer: int) -> list[list[int]]:
        """Return for each expert of a layer the slots that hold it."""
        found: list[list[int]] = [[] for _ in range(self.experts)]
        for slot, expert in enumerate(self.slots[layer]):
            found[expert].append(slot)
        return found

    def imbalance(self, loads: Loads) -> float:
        """Return the load of the fullest device over that of the mean one, added up over layers: 1 is even."""
        fullest = sum(max(self.rank_loads(layer, row)) for layer, row in enumerate(loads))
        total = sum(map(sum, loads))
        return fullest * self.ranks / total if total else 1.0

    def rank_loads(self, layer: int, loads: Sequence[float]) -> list[float]:
        """Return the load of each device in a layer."""
        holders = self.holders(layer)
        share = [load / len(slots) for load, slots in zip(loads, holders, strict=True)]
        return [sum(share[e] for e in self.of_rank(layer, rank)) for rank in range(self.ranks)]

    def entry(self) -> dict[str, Any]:
        """Return the placement as plain data; engines know the list of lists as the physical-to-logical map."""
        return {"experts": self.experts, "ranks": self.ranks, "copies": self.copies,
                "physical_to_logical": [list(row) for row in self.slots]}  # fmt: skip


def place_in_order(layers: int, experts: int, ranks: int) -> Placement:
    """Return the placement in the order of the experts' numbers, without copies."""
    return Placement(experts, ranks, (tuple(range(experts)),) * layers)


def place_by_load(loads: Loads, ranks: int, copies: int = 0) -> Placement:
    """Return a placement that evens out the devices' loads; `copies` slots more than experts hold hot ones again.

    In each layer the expert with the largest load of one copy gets the next copy, then slots go to the emptiest device
    that has room, largest first. MoecError where slots do not divide over the devices.
    """
    experts = len(loads[0])
    if (experts + copies) % ranks:
        raise MoecError(
            f"{experts} experts and {copies} copies do not divide over {ranks} devices",
            todo=f"--copies {copies - (experts + copies) % -ranks}",
        )
    if copies > experts * (ranks - 1):
        raise MoecError(f"{copies} copies are more than one of each expert for each other device")
    return Placement(experts, ranks, tuple(_place_layer(row, ranks, copies) for row in loads))


def _place_layer(loads: Sequence[float], ranks: int, copies: int) -> tuple[int, ...]:
    count = [1] * len(loads)
    heap = [(-load, e) for e, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(copies):
        while count[heap[0][1]] >= ranks:  # a second copy on one device helps nobody
            heapq.heappop(heap)
        _, e = heapq.heappop(heap)
        count[e] += 1
        heapq.heappush(heap, (-loads[e] / count[e], e))
    each = (len(loads) + copies) // ranks
    # experts with most copies first: each copy needs a device of its own
    slots = sorted((-loads[e] / count[e], e) for e in range(len(loads)) for _ in range(count[e]))
    held: list[list[int]] = [[] for _ in range(ranks)]
    weight = [0.0] * ranks
    for load, e in slots:
        room = [r for r in range(ranks) if len(held[r]) < each]
        rank = min(room, key=lambda r: (e in held[r], weight[r], r))
        held[rank].append(e)
        weight[rank] -= load
    return tuple(e for row in held for e in sorted(row))


def check_placement(entry: Any, layers: int, experts: int, ranks: int, where: str) -> Placement:
    """Return a placement from plain data; MoecError where it is not one of so many layers, experts and devices."""
    rows = entry["physical_to_logical"]
    placed = Placement(experts, ranks, tuple(tuple(row) for row in rows))
    if len(rows) != layers:
        raise MoecError(f"the plan places the experts of {len(rows)} layers, the model has {layers}", where=where)
    for layer, row in enumerate(placed.slots):
        if len(row) != len(placed.slots[0]) or len(row) % ranks:
            raise MoecError(f"the {len(row)} slots of layer {layer} do not divide over {ranks} devices", where=where)
        if set(row) != set(range(experts)):
            raise MoecError(f"the slots of layer {layer} do not hold the experts 0 to {experts - 1}", where=where)
    return placed
