"""The pairs (token, choice) of routed experts in torch, for the references of ops: those of an expert, the tiles they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ....compiler.ir.deferred import torch


def list_tiles(counts: Sequence[int], rows: int) -> torch.Tensor:
    """Return [3, pairs] for tiles of so many rows and experts of so many pairs: expert, first place and end, as acc.sort says."""
    pairs, experts, begin = sum(counts), len(counts), 0
    found = torch.zeros(3, pairs, dtype=torch.int64)
    found[0] = experts
    for expert, count in enumerate(counts):
        first = torch.arange(begin, begin + count, rows)
        few = pairs <= pairs // rows + experts
        number = first if few else begin // rows + expert + torch.arange(len(first))
        found[0, number], found[1, number], found[2, number] = expert, first, begin + count
        begin += count
    return found


def pairs_by_expert(ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the experts that are chosen, each with its pairs."""
    flat = ids.flatten()
    for expert in flat.unique().tolist():
        yield expert, (flat == expert).nonzero()[:, 0]
