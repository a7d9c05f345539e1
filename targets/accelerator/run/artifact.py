"""Reads an artifact for an accelerator: its program, its kernels with their bindings, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ....compiler.artifact.manifest import read_json
from ....compiler.errors import MoecError
from ....compiler.ir.module import Module, Op
from ....compiler.text.parser import parse_module
from ....compiler.weights.sources.checkpoint import read_tensors
from ..artifact.bindings import Binding
from ..artifact.emit import KERNELS, PLAN
from ..artifact.spec import ANY, SCHEMA, Limits, is_for_step
from ..target import declare_ops
from ..tile.serialize import program_from_json
from ..tile.simulate import Chip
from ..tile.tiles import Program

PROGRAM = "program.moir"
AGAIN = "compile it again: moec compile SOURCE --target {}"


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel of an artifact: its program, what its arguments are, and how it is launched.

    `group` names the kernels of the same ops, `low` and `high` are the tokens of a step that it is for, `new` those of a
    sequence, `slots` all tokens of one.
    `operands` are the memories of the matrix unit. `objects` says what a compiler made of it, by architecture, `predicted`
    how many seconds it was expected to take in a step of as many tokens as it is for.
    """

    name: str
    group: str
    program: Program
    binding: Binding
    low: int
    high: int
    warps: int
    operands: tuple[str, str, str]
    objects: Mapping[str, Any]
    new: Limits = ANY
    slots: Limits = ANY
    predicted: float | None = None


@dataclass(frozen=True, eq=False)
class StoredKernels:
    """What kernels.json says. `steps` are those of each function, one an op of the program."""

    target: str
    chip: Mapping[str, Any]
    memories: Mapping[str, Any]
    launches: tuple[Launch, ...]
    steps: Mapping[str, tuple[Mapping[str, Any], ...]]

    @cached_property
    def _groups(self) -> Mapping[str, tuple[Launch, ...]]:
        """The kernels of each group of ops, in the order in which they run."""
        found: dict[str, list[Launch]] = {}
        for launch in self.launches:
            found.setdefault(launch.group, []).append(launch)
        return {name: tuple(launches) for name, launches in found.items()}

    @cached_property
    def slots_at(self) -> frozenset[int]:
        """From how many tokens of a sequence on other kernels are taken."""
        return frozenset(launch.slots[0] for launch in self.launches)

    @cached_property
    def last(self) -> int:
        """The most tokens that a bucket is tuned for."""
        return max((launch.high for launch in self.launches), default=1)

    def of(self, group: str, batch: int, new: int, past: int) -> tuple[Launch, ...]:
        """Return the kernels that compute an op in a step of `new` tokens of each of `batch` sequences after `past`."""
        bucket, kernels = min(batch * new, self.last), self._groups.get(group, ())
        limit = min(new, self.last)
        return tuple(k for k in kernels if k.low <= bucket <= k.high and is_for_step(k, limit, past + new - limit))

    def chip_for(self, launch: Launch) -> Chip:
        """Return what the simulator checks of the chip."""
        room = self.memories["room"]
        return Chip(
            {name: m["bytes"] for name, m in room.items()}, {name: m["align"] for name, m in room.items()},
            frozenset((a, b) for a, b in self.memories["paths"]), launch.operands,
        )  # fmt: skip


def read_kernels(folder: Path) -> StoredKernels:
    """Read kernels.json; MoecError for one of another schema, and for one that is damaged."""
    path = folder / KERNELS
    data = read_json(path)
    schema, target = data.get("schema"), data.get("target", "TARGET")
    if schema != SCHEMA:
        age = "an older" if isinstance(schema, int) and schema < SCHEMA else "another"
        raise MoecError(
            f"{KERNELS} has schema {schema}, which {age} moec wrote; kernels are run from schema {SCHEMA}",
            where=str(path),
            todo=AGAIN.format(target),
        )
    try:
        launches = tuple(_read_launch(entry) for entry in data["kernels"])
        steps = {f["name"]: tuple(f["steps"]) for f in data["functions"]}
        return StoredKernels(data["target"], data["chip"], data["memories"], launches, steps)
    except (KeyError, TypeError, ValueError) as error:
        raise MoecError(f"{KERNELS} is damaged", where=str(path), todo=AGAIN.format(target)) from error


def _read_launch(entry: Mapping[str, Any]) -> Launch:
    program = program_from_json(entry["program"])
    names = [program.name, *program.scalars, *(a.name for a in program.arguments), *program.buffers]
    if not all(name.isidentifier() for name in names):
        raise ValueError(entry["name"])  # names become those of a printed source
    first, second, result = entry["operands"]
    low, high = entry["tokens"]
    return Launch(
        entry["name"], entry["group"], program, Binding.from_json(entry["binding"]), low, high, int(entry["pipeline"]["warps"]),
        (first, second, result), entry.get("objects", {}), _read_limits(entry["new"]),
        _read_limits(entry["slots"]), entry["predicted"]["time"],
    )  # fmt: skip


def _read_limits(data: Any) -> Limits:
    low, high = data
    return int(low), None if high is None else int(high)


def read_program(folder: Path, kernels: StoredKernels) -> Module:
    """Read the program; MoecError if it is not the one that the kernels were made for."""
    path = folder / PROGRAM
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MoecError(f"{PROGRAM} cannot be read: {error.strerror}", where=str(path)) from error
    declare_ops()  # the program is made of them
    try:
        module = parse_module(text, str(path))
    except MoecError as error:  # damaged, or of a moec whose ops had other attributes
        raise replace(error, todo=AGAIN.format(kernels.target)) from None
    for function in module.functions:
        steps = kernels.steps.get(function.name, ())
        if len(steps) != len(function.ops) or not all(map(_matches_step, function.ops, steps)):
            raise MoecError(
                f"{KERNELS} was not made from @{function.name} of {PROGRAM}", where=str(folder),
                todo=AGAIN.format(kernels.target),
            )  # fmt: skip
    return module


def _matches_step(op: Op, step: Mapping[str, Any]) -> bool:
    results = step["results"]
    names = list(results.values()) if isinstance(results, Mapping) else list(results)
    called = step.get("callee", "") == (op.callee or "") and (bool(op.callee) or step["op"] == op.name)
    return called and names == [v.name for v in op.results]


# --- weights -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of an artifact, by the label of the call that reads them: name -> part -> tensor.

    `labels` are those of the calls, in the order in which a program runs them.
    """

    labels: tuple[str, ...]
    by_label: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]]


def read_weights(folder: Path, module: Module, device: torch.device) -> Weights:
    """Read the weights onto a device; MoecError for one that is missing or of another shape."""
    plan = read_json(folder / PLAN)
    try:
        files = [shard["file"] for device_ in plan["devices"] for shard in device_["shards"]]
        same = plan["same"]
        calls = [(call["label"], call["function"]) for call in plan["calls"]]
    except (KeyError, TypeError) as error:
        raise MoecError(f"{PLAN} is damaged", where=str(folder / PLAN)) from error
    stored: dict[str, dict[str, torch.Tensor]] = {}
    for file in files:
        for name, tensor in _read_weights(folder, file, device):
            weight, dot, part = name.rpartition(".")
            plain = not dot or part not in ("codes", "scales", "zeros", "tensor_scale")
            stored.setdefault(name if plain else weight, {})["" if plain else part] = tensor
    found: dict[str, dict[str, Mapping[str, torch.Tensor]]] = {}
    for label, function in calls:
        own = found.setdefault(label, {})
        for const in module.by_name[function].consts:
            name = f"{label}/{const.value.name}"
            if const.value.name not in module.by_name[function].uses:
                continue
            if (parts := stored.get(same.get(name, name))) is None:
                raise MoecError(f"the artifact has no weight {name}", where=str(folder), todo="compile it again")
            own[const.value.name] = parts
    return Weights(tuple(label for label, _ in calls), found)


def _read_weights(folder: Path, file: str, device: torch.device) -> list[tuple[str, torch.Tensor]]:
    path = path_inside(folder, file)
    try:
        return [(name, tensor.to(device)) for name, tensor in read_tensors(path).items()]
    except MoecError as error:
        raise MoecError(f"the weights cannot be read: {error.what}", str(path), todo="compile it again") from error


def path_inside(folder: Path, file: str) -> Path:
    """Return the path of a file of an artifact; MoecError for a name that leads out of it."""
    name = PurePosixPath(file)
    if name.is_absolute() or ".." in name.parts:
        raise MoecError(f"the artifact names a file outside of it: {file}", where=str(folder))
    return folder / name
