"""moec.json, the manifest of an artifact: how it is written, read and checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MoecError, write_error
from ..errors.json_files import Shape, find_misfit, no_constant, read_json

if TYPE_CHECKING:
    from ..ir.module import Function, Module, Value

MANIFEST = "moec.json"
SCHEMA = 1
_VALUE: Shape = {"name": str, "dtype": str, "shape": [(int, str)]}
_BLOCK: Shape = {"function": str, "place": str, "reason": str, "cost": str}
_STAND_IN: Shape = {"moec": str, "replaces": str, "source": str, "checked": bool}
# the parts of it that are read again; those with a question mark are missing in artifacts of the first versions
SHAPE: Shape = {
    "schema": int, "moec": str, "source": {"name?": str, "sha256?": str}, "target": str, "pipeline": str,
    "precision": {None: [str]}, "lossy": bool, "dims": {None: [int]}, "inputs": [_VALUE], "outputs": [_VALUE],
    "states": [{"past": str, "present": str, "axis": (int, None), "dtype": str, "shape": [(int, str)], "in_place?": bool, "stored?": str}],
    "figures": dict, "unfused?": [_BLOCK], "files": {None: str}, "sizes?": {None: int}, "vocabulary?": (int, None),
    "packages?": {None: str}, "replaced?": [_STAND_IN], "cpu_kernels?": dict,
}  # fmt: skip
_LOOKUPS = ("nn.embedding", "ort.gather_nbits")  # ops that take rows of a table, by ids
LARGEST = 1 << 48  # of a size: more would not be a size of anything that runs


@dataclass(frozen=True)
class State:
    """A KV cache or another tensor that lives from step to step: its input, its output, and how it grows.

    `axis` is the axis along which the output has another size than the input; None for a state that keeps its size.
    `shape` is the input's: ints and expressions in the dims `B` and `P`, such as `floordiv(P, 4)`. A state that is
    `in_place` may lie in a buffer that is longer than the past: the new tokens are written after the past ones.
    """

    past: str
    present: str
    axis: int | None
    dtype: str
    shape: tuple[int | str, ...]
    in_place: bool = False

    @staticmethod
    def of(entry: Mapping[str, Any]) -> State:
        """Return a state from its entry in the manifest."""
        return State(
            entry["past"], entry["present"], entry["axis"], entry["dtype"], tuple(entry["shape"]),
            bool(entry.get("in_place", False)),
        )  # fmt: skip

    def sizes(self, **dims: int) -> tuple[int, ...]:
        """Return the shape as ints, e.g. `sizes(B=1, P=0)`; MoecError for a size that the dims do not tell."""
        return tuple(self._size(size, dims) for size in self.shape)

    def _size(self, size: int | str, dims: Mapping[str, int]) -> int:
        return size_of(size, dims, f"the state {self.past}")


def size_of(size: int | str, dims: Mapping[str, int], owner: str = "a value") -> int:
    """Return a size of the manifest as an int; MoecError for one that the dims do not tell."""
    if isinstance(size, str) and size in dims:
        return dims[size]
    what = f"{owner} has the size {size}"
    try:
        found = size if isinstance(size, int) else _evaluate_text(size, dims)
    except (MoecError, TypeError, ArithmeticError, ValueError) as error:  # a size such as floordiv(P, 0)
        raise MoecError(what, todo=f"known are {', '.join(dims)}") from error
    if not 0 <= found <= LARGEST:
        raise MoecError(what, todo=f"{MANIFEST} and the model do not belong together: compile it again")
    return found


def _evaluate_text(text: str, dims: Mapping[str, int]) -> int:
    from ..ir.dims import evaluate
    from ..ir.fragments import parse_size

    return evaluate(parse_size(text, dims), dims)


def write_manifest(
    folder: Path,
    module: Module,
    *,
    source: Mapping[str, Any],
    target: str,
    pipeline: str,
    moec: str,
    precision: Mapping[str, Any] | None = None,
    lossy: bool = False,
    figures: Mapping[str, Any] | None = None,
    unfused: Sequence[Mapping[str, Any]] = (),
    packages: Mapping[str, str] | None = None,
    replaced: Sequence[Mapping[str, Any]] = (),
    kernels: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write moec.json for a folder that is otherwise complete; the same inputs give the same bytes.

    `unfused` are the MoE blocks left in plain ops (see fusion_report.py), `packages` the versions of what made the artifact,
    `replaced` what of transformers moec's own functions stand for (see frontends/stand_ins.py), `kernels` the operators that libraries of
    moec's own compute. `files` holds the sha256 of files whose hash is known already; the others are read.
    """
    known = files or {}
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if name != MANIFEST]
    vocabulary = vocabulary_of(module)
    manifest = {
        "schema": SCHEMA, "moec": moec, "source": dict(source), "target": target, "pipeline": pipeline,
        "precision": dict(precision or {}), "lossy": lossy, "figures": dict(figures or {}), "unfused": [dict(entry) for entry in unfused], **interface_entries(module),
        "packages": dict(packages or {}), "replaced": [dict(entry) for entry in replaced],
        "files": {name: known.get(name) or file_sha256(folder / name) for name in names},
        "sizes": {name: (folder / name).stat().st_size for name in names},
        **({} if vocabulary is None else {"vocabulary": vocabulary}), **({"cpu_kernels": dict(kernels)} if kernels else {}),
    }  # fmt: skip
    _write_manifest_file(folder / MANIFEST, manifest)


def add_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    """Add measured figures to the manifest of a finished artifact."""
    manifest = read_manifest(folder)
    manifest["figures"] = {**manifest["figures"], **figures}
    _write_manifest_file(folder / MANIFEST, manifest)


def interface_entries(module: Module) -> dict[str, Any]:
    """Return the manifest's dims, inputs, outputs and states of a module; states pair up in their order."""
    from ..ops.stored_states import stored_states

    main, stored = module.main, stored_states(module)
    pasts = [v for v in main.params if v.type.state]
    presents = [v for v in main.results if v.type.state]
    if len(pasts) != len(presents):
        raise MoecError(f"@main takes {len(pasts)} states and returns {len(presents)}", where="@main")
    return {
        "dims": {dim.name: [dim.low, dim.high] for dim in module.dims},
        "inputs": [
            {"name": v.name, "dtype": v.type.dtype, "shape": _shape_entry(v)} for v in main.params if not v.type.state
        ],
        "outputs": [
            {"name": v.name, "dtype": v.type.dtype, "shape": _shape_entry(v)} for v in main.results if not v.type.state
        ],
        "states": [
            {
                **_state_entry(past, present),
                "in_place": _in_place(module, main, past),
                **({"stored": stored[main.name, past.name]} if (main.name, past.name) in stored else {}),
            }
            for past, present in zip(pasts, presents, strict=True)
        ],
    }


def _state_entry(past: Value, present: Value) -> dict[str, Any]:
    sizes = list(zip(past.type.shape, present.type.shape, strict=False))
    grown = [axis for axis, (old, new) in enumerate(sizes) if old != new]
    same_rank = len(past.type.shape) == len(present.type.shape)
    if past.type.dtype != present.type.dtype or not same_rank or len(grown) > 1:
        raise MoecError(f"the state {past}: {past.type} comes back as {present}: {present.type}", where="@main")
    axis = grown[0] if grown else None
    return {
        "past": past.name,
        "present": present.name,
        "axis": axis,
        "dtype": past.type.dtype,
        "shape": _shape_entry(past),
    }


def vocabulary_of(module: Module) -> int | None:
    """Return how many rows the table has in which @main looks token ids up; None where it changes the ids before."""
    main = module.main
    ids = {v.name for v in main.params if v.name == "input_ids"}
    rows: list[int] = []
    for op in main.ops:
        if op.name in _LOOKUPS and op.inputs[0].name in ids:
            rows.append(op.inputs[1].type.sizes[0])
        elif op.name in ("core.reshape", "core.cast") and op.inputs[0].name in ids:
            ids.add(op.results[0].name)
    return min(rows, default=None)


def _in_place(module: Module, function: Function, state: Value) -> bool:
    """Return whether a state is read by one op only, which appends to it."""
    from ..ops import OPS

    users = function.uses.get(state.name, [])
    op = users[0] if len(users) == 1 else None
    if op is None or op.operands.count(state) != 1:
        return False
    place = op.operands.index(state)
    if op.callee:
        callee = module.by_name[op.callee]
        return _in_place(module, callee, callee.params[place])
    definition = OPS[op.name]
    return definition.operand_name(place) in definition.in_place


def _shape_entry(value: Value) -> list[int | str]:
    from ..ir.dims import size_text

    return [int(s) if s.is_Integer else size_text(s) for s in value.type.shape]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder, checked; MoecError says what is wrong with it."""
    path = folder / MANIFEST
    if not path.is_file():
        what = f"the folder has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
        raise MoecError(what, where=str(folder), todo="give an artifact: a folder that moec compile wrote")
    manifest = read_json(path, parse_constant=no_constant)
    schema = manifest.get("schema")
    if schema != SCHEMA:
        todo = "compile it again with this version, or use the version of moec that wrote it"
        raise MoecError(f"schema {schema!r} of {MANIFEST} is not known, only {SCHEMA} is", where=str(path), todo=todo)
    if (place := find_misfit(manifest, SHAPE)) is not None:
        problem = "is missing" if place in set(SHAPE) - set(manifest) else "is not what it should be"
        raise MoecError(f"{place} {problem} in {MANIFEST}", where=str(path), todo="compile it again")
    for entry in manifest["states"]:
        if entry["axis"] is not None and not 0 <= entry["axis"] < len(entry["shape"]):
            raise MoecError(f"a state of {MANIFEST} has no axis {entry['axis']}", str(path), todo="compile it again")
    for name, bounds in manifest["dims"].items():
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= LARGEST:
            raise MoecError(f"the dim {name} of {MANIFEST} is {bounds!r:.80}", str(path), todo="compile it again")
    return {"unfused": [], "sizes": {}, "vocabulary": None, "packages": {}, "replaced": [], **manifest}


def is_language_model(manifest: Mapping[str, Any]) -> bool:
    """Return whether a program takes token ids and returns logits, so that text can be generated with it."""
    names = {entry["name"] for key in ("inputs", "outputs") for entry in manifest[key]}
    return {"input_ids", "logits"} <= names


def check_files(folder: Path, manifest: Mapping[str, Any], hashes: bool = False) -> None:
    """Check that every file of the manifest is there with its size, and with `hashes` that its content is unchanged."""
    todo = "compile it again, or take a fresh copy"
    for name, expected in sorted(manifest["files"].items()):
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise MoecError(f"the manifest names a file outside of the artifact: {name}", where=str(folder / MANIFEST))
        if not path.is_file():
            raise MoecError(f"the artifact lacks {name}", where=str(folder), todo="compile it again")
        wanted, size = manifest["sizes"].get(name), path.stat().st_size
        if wanted not in (None, size):
            what = f"{name} is not as it was written: it has {size} bytes, not {wanted}"
            raise MoecError(what, where=str(path), todo=todo)
        if hashes and file_sha256(path) != expected:
            raise MoecError(f"{name} is not as it was written: its sha256 differs", where=str(path), todo=todo)


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest_file(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write beside the file and rename, so that a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n", "utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise write_error(error, path) from error
