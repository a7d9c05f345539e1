"""Calls of a program that is no language model: its arrays checked against moec.json, and compared with its module's."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.manifest import is_language_model
from ..errors import MoecError, write_error


def bind_arrays(
    manifest: Mapping[str, Any], given: Sequence[Any], named: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Return an array for each input of a program: those of `given` in the order of the inputs, the others by name.

    torch tensors become numpy arrays. MoecError for inputs that are missing, not known or given twice, for a dtype that
    is not the program's, and for a shape that does not fit: a size that stands in two places has to be the same in both.
    """
    entries = {entry["name"]: entry for entry in manifest["inputs"]}
    if is_language_model(manifest):
        raise MoecError("the artifact is a language model", todo="use run(), or session().step()")
    wanted = "it takes " + ", ".join(f"{name} {e['dtype']}{e['shape']}" for name, e in entries.items())
    if len(given) > len(entries):
        raise MoecError(f"{len(given)} inputs are given", todo=wanted)
    found = dict(zip(entries, given, strict=False))
    for name, value in (named or {}).items():
        if name not in entries or name in found:
            raise MoecError(f"the input {name} is {'given twice' if name in found else 'not known'}", todo=wanted)
        found[name] = value
    if missing := [name for name in entries if name not in found]:
        raise MoecError(f"the input {missing[0]} is missing", todo=wanted)
    sizes: dict[str, int] = {}
    return {name: _checked_array(entries[name], found[name], sizes, manifest["dims"]) for name in entries}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file by name; MoecError for a file that holds anything else."""
    try:
        with np.load(path, allow_pickle=False) as found:
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array without a name")
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise MoecError(f"cannot read the arrays: {reason}", str(path), todo="write them with numpy.savez") from None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name into a .npz file, which appears whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            save: Any = np.savez  # its own parameters are keywords too: no array is called allow_pickle
            save(file, **arrays)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise write_error(error, path) from error


def _checked_array(
    entry: Mapping[str, Any], value: Any, sizes: dict[str, int], dims: Mapping[str, Sequence[int]]
) -> np.ndarray:
    name, shape = entry["name"], entry["shape"]
    array = np.ascontiguousarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    dtype = NUMPY.get(entry["dtype"])
    if dtype is None or array.dtype != dtype:
        raise MoecError(f"the input {name} is {array.dtype}, {entry['dtype']} is wanted")
    if array.ndim != len(shape):
        raise MoecError(f"the input {name} has the shape {list(array.shape)}, {shape} is wanted")
    for axis, (size, actual) in enumerate(zip(shape, array.shape, strict=True)):
        expected = size if isinstance(size, int) else sizes.setdefault(size, actual) if size in dims else actual
        if expected != actual:
            what = f"axis {axis} of the input {name} is {actual} long, {expected} is wanted"
            raise MoecError(what, todo=f"its shape is {shape}")
        low, high = dims.get(str(size), (actual, actual))
        if not low <= actual <= high:
            raise MoecError(f"axis {axis} of the input {name} is {actual} long; the program takes {low} to {high}")
    return array


NUMPY = {
    "bool": np.dtype(np.bool_), "u8": np.dtype(np.uint8), "i8": np.dtype(np.int8), "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64),
}  # fmt: skip
