"""The weights of a program as a page shows them: formats by layer, sensitivities, and what is known of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.table import format_of
from ..ir.module import Const, Function, Module, walk_calls
from ..ir.recipes import Recipe, Step, steps_of, written_tensors
from ..quantize.plan import KEEP, PLAN, Plan, read_plan

Table = dict[str, Any]


@dataclass(frozen=True)
class StoredWeight:
    """A weight of a function as it is stored, its codes, scales and zero points together."""

    name: str
    function: Function
    first: str  # the name of the first value that holds it
    format: str
    bits: float  # of one number, scales included
    parameters: int  # in all layers, as are the bytes
    bytes: int


def stored_weights(module: Module) -> list[StoredWeight]:
    """Return the weights of all functions; numbers that are written into the program are none."""
    calls = [function.name for function, _ in walk_calls(module)]
    return [
        _stored_weight(function, consts, calls.count(function.name))
        for function in module.functions
        for consts in _parts_of_weights(function)
    ]


def _parts_of_weights(function: Function) -> Iterator[list[Const]]:
    groups: dict[Recipe, list[Const]] = {}
    for const in function.consts:
        if any(written_tensors(const.recipe)):
            groups.setdefault(_whole_weight(const.recipe), []).append(const)
    yield from groups.values()


def _whole_weight(recipe: Recipe) -> Recipe:
    """Return the step of a recipe that makes the quantized weight of which it may be a part; else the recipe."""
    return next((s for s in steps_of(recipe) if s.name in ("quantize", "packed")), recipe)


def _stored_weight(function: Function, consts: Sequence[Const], calls: int) -> StoredWeight:
    names = [c.value.name for c in consts]
    whole = _whole_weight(consts[0].recipe)
    quantized = isinstance(whole, Step) and whole is not consts[0].recipe
    elements = int((whole if quantized else consts[0].value).type.elements)
    size = sum(float(c.value.type.bytes) for c in consts)
    stored = str(whole.attributes["to"]) if isinstance(whole, Step) and quantized else consts[0].value.type.dtype
    name = names[0].rpartition(".")[0] if len(names) > 1 else names[0]  # of `w.codes`, `w.scales` it is `w`
    return StoredWeight(
        name or names[0], function, names[0], stored, 8 * size / elements, elements * calls, round(size * calls)
    )


def weight_table(module: Module, weights: Sequence[StoredWeight]) -> Table:
    """Return the bits of each weight by name and layer; what stands outside of the layers has a column before them."""
    layers: dict[str, list[int]] = {}
    for function, bound in walk_calls(module):
        number = bound.get("layer", "")
        layers.setdefault(function.name, []).append(int(number) if number.isdigit() else -1)
    last = max((n for numbers in layers.values() for n in numbers), default=-1)
    rows = list(dict.fromkeys(w.name for w in weights))
    cells: list[list[float | None]] = [[None] * (last + 2) for _ in rows]
    for weight in weights:
        for layer in layers.get(weight.function.name, ()):
            cells[rows.index(weight.name)][layer + 1] = weight.bits
    return {"rows": rows, "cells": cells, "label": "bits", "across": "layer", "first": -1}


def sensitivity_table(folder: Path) -> Table | None:
    """Return what the formats of an artifact's plan are expected to cost, by role and layer; None where that is unknown."""
    plan = _plan_of(folder)
    known = [e for e in plan.entries if e.kl is not None] if plan else []
    if not known:
        return None
    rows = list(dict.fromkeys(e.unit.role for e in known))
    last = max((e.unit.layer if e.unit.layer is not None else -1 for e in known), default=-1)
    cells: list[list[float | None]] = [[None] * (last + 2) for _ in rows]
    for entry in known:
        row, column = rows.index(entry.unit.role), 0 if entry.unit.layer is None else entry.unit.layer + 1
        cells[row][column] = (cells[row][column] or 0.0) + (entry.kl or 0.0)
    return {"rows": rows, "cells": cells, "label": "KL in nats", "across": "layer", "first": -1}


def expert_tables(
    folder: Path, manifest: Mapping[str, Any], loads: Sequence[Sequence[int]]
) -> Iterator[tuple[str, Table, str]]:
    """Yield the tables of experts that are known, each with a name and a caption: formats, and how many tokens they had."""
    shape = {"rows": None, "across": "expert", "down": "layer with experts", "first": 0}
    if (plan := _plan_of(folder)) and any(e.unit.experts for e in plan.entries):
        formats = {**shape, "cells": _expert_bits(plan), "label": "bits"}
        yield "expert-formats", formats, "Bits of each expert's weights, as the plan of formats has it."
    seen = manifest.get("figures", {}).get("calibration", {}).get("layers", [])
    counts = [list(row) for row in loads] or [list(layer["tokens"]) for layer in seen]
    if counts:
        source = "in the recorded routing" if loads else "of the calibration text"
        yield "load", {**shape, "cells": counts, "label": "tokens"}, f"How many tokens {source} each expert was given."


def _expert_bits(plan: Plan) -> list[list[float | None]]:
    """Return the bits of each expert, layer by layer; a layer whose experts have one format has it for all."""
    entries = [e for e in plan.entries if e.unit.role == "experts"]
    count = 1 + max(n for e in entries for n in e.unit.experts)
    layers = sorted({e.unit.layer if e.unit.layer is not None else -1 for e in entries})
    cells: list[list[float | None]] = [[None] * count for _ in layers]
    for entry in entries:
        row = layers.index(entry.unit.layer if entry.unit.layer is not None else -1)
        bits = 32.0 if entry.format == KEEP else float(format_of(entry.format).bits_per_weight)
        for expert in entry.unit.experts or range(count):
            cells[row][expert] = bits
    return cells


def _plan_of(folder: Path) -> Plan | None:
    return read_plan(folder / PLAN) if (folder / PLAN).is_file() else None
