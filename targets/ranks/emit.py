"""Writes the shards of a plan: a file for each device's experts, one for each part of the rest, and plan.json, which says who has what."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compiler.errors import MoecError, write_error
from ...compiler.ir.module import Module
from ...compiler.weights.memory import TILE_BYTES
from ...compiler.weights.sink import TiledFile, tile_threads
from ...compiler.weights.sources.source import WeightSource
from ..serving.experts import Placement
from ..target import Emitted
from .layout import Layout
from .weights import Held, Share, expert_ops, held_weights, write_shares

PLAN, FOLDER = "plan.json", "weights"
SCHEMA = 1


@dataclass(frozen=True)
class Divided:
    """A module's weights as a layout divides them: the shares of each file, and the files of each device of the instance."""

    placement: Placement | None
    files: dict[str, list[Share]]
    ranks: list[dict[str, Any]]


def divide_weights(module: Module, layout: Layout) -> Divided:
    """Return which file holds what, and which device reads which files. MoecError for a plan of another model."""
    ops = expert_ops(module)
    counts = {int(op["down"].type.shape[0]) for op in ops}
    if len(counts) > 1:
        raise MoecError(
            f"layers have {' and '.join(map(str, sorted(counts)))} experts, and a plan places one number", layout.where
        )
    placement = layout.place(len(ops), counts.pop()) if ops else None
    held = held_weights(module)
    blocks = 1 + max((w.block for w in held if w.block is not None), default=0)
    if layout.pp > blocks:
        raise MoecError(f"{blocks} layers do not make {layout.pp} pipeline stages", layout.where)
    files: dict[str, list[Share]] = {}
    ranks = []
    for stage in range(layout.pp):
        for device in range(layout.group):
            rank = stage * layout.group + device
            names = []
            for name, share in _shares_of(held, layout, placement, stage, device, blocks):
                own = files.setdefault(f"{FOLDER}/{name}", [])
                if share not in own:
                    own.append(share)
                names.append(f"{FOLDER}/{name}")
            ranks.append({"rank": rank, "stage": stage, "attention_dp": device // layout.tp, "tp": device % layout.tp,
                          "ep": device // layout.moe_tp, "files": sorted(set(names))})  # fmt: skip
    return Divided(placement, files, ranks)


def _shares_of(
    held: list[Held], layout: Layout, placement: Placement | None, stage: int, device: int, blocks: int
) -> Iterator[tuple[str, Share]]:
    """Yield the shares of one device with the names of their files."""
    for weight in held:
        if weight.block is not None and layout.stage_of(weight.block, blocks) != stage:
            continue
        if weight.layer is None or placement is None:
            part, parts = (device % layout.tp, layout.tp) if weight.divides(layout.tp) else (0, 1)
            name = "ends" if weight.block is None else f"stage-{stage}"
            suffix = f".tp-{part}" if parts > 1 else ""
            yield f"{name}{suffix}.safetensors", Share(weight, None, part, parts)
        else:
            matrix = len(weight.recipe.type.sizes) == 3
            if matrix and not weight.divides(layout.moe_tp):
                raise MoecError(
                    f"the rows of {weight.recipe.type} do not divide over {layout.moe_tp} devices",
                    layout.where, model=weight.name, todo="plan with a larger --ep",
                )  # fmt: skip
            part, parts = (device % layout.moe_tp, layout.moe_tp) if matrix else (0, 1)
            experts = placement.of_rank(weight.layer, device // layout.moe_tp)
            name = f"rank-{stage * layout.group + device}"
            yield f"{name}.safetensors", Share(weight, experts, part, parts)


def emit_ranks(
    module: Module, source: WeightSource, folder: Path, tile_bytes: int = TILE_BYTES,
    progress: Callable[[int], None] | None = None, *, layout: Layout,
) -> Emitted:  # fmt: skip
    """Write the shards and plan.json into a folder; return the sha256 of each file of weights."""
    divided = divide_weights(module, layout)
    hashes: dict[str, str] = {}
    sizes: dict[str, int] = {}
    done = 0
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(error, folder / FOLDER) from error
    for name, shares in divided.files.items():
        told = None if progress is None else _told_from(progress, done)
        with TiledFile(folder / name, told, tile_threads(source)) as file:
            write_shares(file, shares, source, tile_bytes)
            hashes[name], sizes[name] = file.sha256, file.size
            done += file.size
    degrees = {"tp": layout.tp, "attention_dp": layout.dp, "ep": layout.ep, "moe_tp": layout.moe_tp, "pp": layout.pp}
    content = {
        "schema": SCHEMA,
        "degrees": degrees,
        "experts": divided.placement.entry() if divided.placement else None,
        "ranks": [{**rank, "bytes": sum(sizes[name] for name in rank["files"])} for rank in divided.ranks],
    }
    try:
        (folder / PLAN).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise write_error(error, folder / PLAN) from error
    return Emitted(hashes)


def _told_from(progress: Callable[[int], None], before: int) -> Callable[[int], None]:
    return lambda done: progress(before + done)
