"""Opens a `.pt2` file of torch.export.save, which is not trusted: it is looked through before torch reads it.

torch.export.load runs pickles for custom objects, loads compiled libraries, and hands the texts of sizes to sympy, which
runs them as Python. A file that has any of these in another form than torch.export.save writes is refused.
"""

from __future__ import annotations

import ast
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.export import ExportedProgram

from ...errors import MoecError
from ...errors.json_files import parse_json
from .logs import without_logs

_TODO = "write it again with torch.export.save"
_CALLS = frozenset(
    [
        "Symbol",
        "Integer",
        "Rational",
        "Add",
        "Mul",
        "Pow",
        "Max",
        "Min",
        "Mod",
        "PythonMod",
        "FloorDiv",
        "CleanDiv",
        "CeilDiv",
        "ModularIndexing",
        "Where",
        "Equality",
        "Eq",
        "Unequality",
        "Ne",
        "StrictLessThan",
        "Lt",
        "LessThan",
        "Le",
        "StrictGreaterThan",
        "Gt",
        "GreaterThan",
        "Ge",
        "And",
        "Or",
        "Not",
        "Abs",
        "floor",
        "ceiling",
    ]
)
_SAFE_NODES = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator,
    ast.unaryop, ast.cmpop,
)  # fmt: skip
_TARGET = re.compile(r"torch\.ops(\.\w+){2,3}|_operator\.\w+|math\.\w+|torch\.sym_\w+|torch\._sym_\w+")
_COMPILED, _OBJECTS, _SAMPLES = "data/aotinductor/", "custom_obj_", "data/sample_inputs/"


def open_archive(path: Path) -> ExportedProgram:
    """Return the program of a `.pt2` file; MoecError for a file that is damaged, or holds what torch would run."""
    try:
        with path.open("rb") as file:
            _check_archive(file, path)
            file.seek(0)
            with without_logs():
                return torch.export.load(file)
    except MoecError:
        raise
    except OSError as error:
        raise MoecError(f"cannot read the file: {error.strerror}", where=str(path)) from None
    except Exception as error:  # torch raises many types that share no base for a file that it cannot read
        raise MoecError("torch cannot read the program", where=str(path), todo=_TODO) from error


def _check_archive(file: BinaryIO, path: Path) -> None:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise MoecError(f"the file is no archive of torch.export.save: {error}", where=str(path), todo=_TODO) from None
    names = [info.filename.partition("/")[2] for info in archive.infolist()]
    if "archive_format" not in names or len(set(names)) < len(names):
        raise MoecError("the file is no archive of torch.export.save", where=str(path), todo=_TODO)
    if packed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
        raise MoecError(f"{packed[0]} is compressed, which torch.export.save never does", where=str(path), todo=_TODO)
    if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
        raise MoecError("the parts of the file are larger than the file", where=str(path), todo=_TODO)
    programs = [name for name in names if name.startswith("models/") and name.endswith(".json")]
    if programs != ["models/model.json"]:
        raise MoecError(f"the file has {len(programs)} programs; one, named model, is read", str(path), todo=_TODO)
    for info, name in zip(archive.infolist(), names, strict=True):
        if name.startswith(_COMPILED) or _OBJECTS in name:
            raise MoecError(f"the file holds {name}, which torch would run", where=str(path), todo=_TODO)
        if name.startswith(_SAMPLES):
            _check_pickle(archive.read(info), name, path)
        elif name.endswith(".json"):
            found = parse_json(archive.read(info), path, name)
            _check_texts(found, path)
            for part in _pickled_parts(found):
                _check_pickle(_read_part(archive, name, part, path), part, path)


def _pickled_parts(config: Any) -> Iterator[str]:
    """Yield the file names of weights that a list of weights says are pickled."""
    entries = config.get("config") if isinstance(config, dict) else None
    for entry in entries.values() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and entry.get("use_pickle"):
            yield str(entry.get("path_name"))


def _read_part(archive: zipfile.ZipFile, config: str, part: str, path: Path) -> bytes:
    folder = config.rpartition("/")[0]
    wanted = f"{folder}/{part}"
    for info in archive.infolist():
        if info.filename.partition("/")[2] == wanted:
            return archive.read(info)
    raise MoecError(f"the file lacks {wanted}", where=str(path), todo=_TODO)


def _check_pickle(content: bytes, name: str, path: Path) -> None:
    """Refuse a pickle that holds more than tensors and plain containers: torch would run it."""
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:
        raise MoecError(f"{name} holds more than tensors, which torch would run", str(path), todo=_TODO) from error


def _check_texts(value: Any, path: Path) -> None:
    """Refuse texts that torch would run: sizes that are no arithmetic, and targets that are no operators."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, list):
            waiting += found
        elif isinstance(found, dict):
            waiting += found.values()
            size, target = found.get("expr_str"), found.get("target")
            if isinstance(size, str) and not _is_arithmetic(size):
                raise MoecError(f"the size {size[:80]!r} is no arithmetic", where=str(path), todo=_TODO)
            if isinstance(target, str) and "inputs" in found and not _TARGET.fullmatch(target):
                raise MoecError(f"the operator {target[:80]!r} is not one of torch", where=str(path), todo=_TODO)


def _is_arithmetic(text: str) -> bool:
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _SAFE_NODES):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _CALLS):
            return False
        if isinstance(node, ast.Name) and node.id not in _CALLS and not re.fullmatch(r"[a-z]\d+", node.id):
            return False
    return True
