"""moec.json, the manifest of an artifact: how it is written, read and checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import write_error
from .errors import MoecError

if TYPE_CHECKING:
    from .ir import Function, Module, Value

MANIFEST = "moec.json"
SCHEMA = 1
REQUIRED: dict[str, type] = {
    "schema": int, "moec": str, "source": dict, "target": str, "pipeline": str, "precision": dict, "lossy": bool,
    "dims": dict, "inputs": list, "outputs": list, "states": list, "figures": dict, "files": dict,
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """A KV cache or another tensor that lives from step to step: its input, its output, and how it grows.

    `axis` is the axis along which the output has another size than the input; None for a state that keeps its size.
    `shape` is the input's: ints and expressions in the dims `B` and `P`, such as `floordiv(P, 4)`. A state that is
    `in_place` may lie in a buffer that is longer than the past: the new tokens are written behind the past ones.
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
        return tuple(size if isinstance(size, int) else self._size(size, dims) for size in self.shape)

    def _size(self, text: str, dims: Mapping[str, int]) -> int:
        if text in dims:
            return dims[text]
        from .dims import evaluate
        from .fragments import parse_size

        try:
            return evaluate(parse_size(text, dims), dims)
        except MoecError as error:
            what = f"the state {self.past} has the size {text}"
            raise MoecError(what, todo=f"known are {', '.join(dims)}") from error


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
    files: Mapping[str, str] | None = None,
) -> None:
    """Write moec.json for a folder that is otherwise complete; the same inputs give the same bytes.

    `unfused` are the MoE blocks left in plain ops (see unfused.py). `files` holds the sha256 of files whose hash is known already; the others are read.
    """
    known = files or {}
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest = {
        "schema": SCHEMA, "moec": moec, "source": dict(source), "target": target, "pipeline": pipeline,
        "precision": dict(precision or {}), "lossy": lossy, "figures": dict(figures or {}), "unfused": [dict(entry) for entry in unfused], **interface(module),
        "files": {name: known.get(name) or file_sha256(folder / name) for name in names if name != MANIFEST},
    }  # fmt: skip
    _write(folder / MANIFEST, manifest)


def add_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    """Add measured figures to the manifest of a finished artifact."""
    manifest = read_manifest(folder)
    manifest["figures"] = {**manifest["figures"], **figures}
    _write(folder / MANIFEST, manifest)


def interface(module: Module) -> dict[str, Any]:
    """Return the manifest's dims, inputs, outputs and states of a module; states pair up in their order."""
    main = module.main
    pasts = [v for v in main.params if v.type.state]
    presents = [v for v in main.results if v.type.state]
    if len(pasts) != len(presents):
        raise MoecError(f"@main takes {len(pasts)} states and returns {len(presents)}", where="@main")
    return {
        "dims": {dim.name: [dim.low, dim.high] for dim in module.dims},
        "inputs": [
            {"name": v.name, "dtype": v.type.dtype, "shape": _shape(v)} for v in main.params if not v.type.state
        ],
        "outputs": [
            {"name": v.name, "dtype": v.type.dtype, "shape": _shape(v)} for v in main.results if not v.type.state
        ],
        "states": [
            {**_state(past, present), "in_place": _in_place(module, main, past)}
            for past, present in zip(pasts, presents, strict=True)
        ],
    }


def _state(past: Value, present: Value) -> dict[str, Any]:
    sizes = list(zip(past.type.shape, present.type.shape, strict=False))
    grown = [axis for axis, (old, new) in enumerate(sizes) if old != new]
    same_rank = len(past.type.shape) == len(present.type.shape)
    if past.type.dtype != present.type.dtype or not same_rank or len(grown) > 1:
        raise MoecError(f"the state {past}: {past.type} comes back as {present}: {present.type}", where="@main")
    axis = grown[0] if grown else None
    return {"past": past.name, "present": present.name, "axis": axis, "dtype": past.type.dtype, "shape": _shape(past)}


def _in_place(module: Module, function: Function, state: Value) -> bool:
    """Return whether a state is read by one op only, which appends to it."""
    from .ops import OPS

    users = function.uses.get(state.name, [])
    op = users[0] if len(users) == 1 else None
    if op is None or op.operands.count(state) != 1:
        return False
    place = op.operands.index(state)
    if op.callee:
        callee = module.by_name[op.callee]
        return _in_place(module, callee, callee.params[place])
    definition = OPS[op.name]
    return definition.signature.operands[place].name in definition.in_place


def _shape(value: Value) -> list[int | str]:
    from .dims import size_text

    return [int(s) if s.is_Integer else size_text(s) for s in value.type.shape]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder, checked; MoecError says what is wrong with it."""
    path = folder / MANIFEST
    if not path.is_file():
        what = f"the folder has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
        raise MoecError(what, where=str(folder), todo="give an artifact: a folder that moec compile wrote")
    manifest = read_json(path)
    schema = manifest.get("schema")
    if schema != SCHEMA:
        todo = "compile it again with this version, or use the version of moec that wrote it"
        raise MoecError(f"schema {schema!r} of {MANIFEST} is not known, only {SCHEMA} is", where=str(path), todo=todo)
    manifest.setdefault("unfused", [])  # artifacts of the first versions do not say
    for key, kind in {**REQUIRED, "unfused": list}.items():
        if not isinstance(manifest.get(key), kind):
            problem = "is not what it should be" if key in manifest else "is missing"
            raise MoecError(f"{key} {problem} in {MANIFEST}", where=str(path), todo="compile it again")
    for entry in manifest["states"]:
        if not _is_state(entry):
            raise MoecError(
                f"states of {MANIFEST} holds something else: {entry}", where=str(path), todo="compile it again"
            )
    return manifest


def _is_state(entry: Any) -> bool:
    if not isinstance(entry, dict) or not {"past", "present", "axis", "dtype", "shape"} <= set(entry):
        return False
    axis, shape = entry["axis"], entry["shape"]
    texts = all(isinstance(entry[key], str) for key in ("past", "present", "dtype"))
    sizes = isinstance(shape, list) and all(isinstance(s, (int, str)) for s in shape)
    return texts and sizes and (axis is None or (isinstance(axis, int) and 0 <= axis < len(shape)))


def check_files(folder: Path, manifest: Mapping[str, Any], hashes: bool = False) -> None:
    """Check that every file of the manifest is there, and with `hashes` that it is unchanged."""
    for name, expected in sorted(manifest["files"].items()):
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise MoecError(f"the manifest names a file outside of the artifact: {name}", where=str(folder / MANIFEST))
        if not path.is_file():
            raise MoecError(f"the artifact lacks {name}", where=str(folder), todo="compile it again")
        if hashes and file_sha256(path) != expected:
            todo = "compile it again, or take a fresh copy"
            raise MoecError(f"{name} is not as it was written: its sha256 differs", where=str(path), todo=todo)


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MoecError(f"{path.name} is not JSON: {error}", where=str(path)) from None
    except OSError as error:
        raise MoecError(f"{path.name} cannot be read: {error.strerror}", where=str(path)) from error
    if not isinstance(found, dict):
        raise MoecError(f"{path.name} is not a JSON object", where=str(path))
    return found


def _write(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write beside the file and rename, so that a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n", "utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise write_error(error, path) from error
