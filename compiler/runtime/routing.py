"""How often tokens choose each expert: the source's program reads token ids once more and counts, since kernels do not tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..check.tiled import TiledInterpreter
from ..errors import MoecError
from ..ir.dims import evaluate
from ..ir.dtypes import DTYPES
from ..ir.module import Module, Op
from ..weights.sources.source import WeightSource

INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass
class _RoutingCounter(TiledInterpreter):
    """An interpreter that keeps how many rows each expert of each layer is given."""

    counts: list[list[int]] = field(default_factory=list)

    def observe_routing(self, op: Op, bound: Mapping[str, str], counts: Sequence[int]) -> None:
        """Keep the counts of the next layer."""
        self.counts.append(list(counts))


def count_routing(module: Module, source: WeightSource, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return how often each expert is chosen for rows of token ids, layer by layer; MoecError for a model without experts.

    `module` is at stage moe. Each row is read by itself, from its first token on.
    """
    total: list[list[int]] = []
    for row in rows:
        counter = _RoutingCounter(module, source, (1, len(row)))
        ids = torch.tensor([list(row)])
        given = dict(zip(INPUTS, (ids, torch.ones_like(ids), torch.arange(len(row))[None]), strict=True))
        inputs = [
            given[p.name] if p.name in given
            else torch.zeros([evaluate(s, counter.dims) for s in p.type.shape], dtype=DTYPES[p.type.dtype].torch)
            for p in module.main.params
        ]  # fmt: skip
        counter.run(module.main, inputs, {})
        total = (
            [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(total, counter.counts, strict=True)]
            if total
            else counter.counts
        )
    if not total:
        raise MoecError("the model has no routed experts, or reads no tokens: there is no routing to record")
    return total
