"""Read and check the header of a safetensors file, and write one.

The safetensors library is not used for this. It maps the file, and the pages of a mapping count as resident memory
of the process as soon as they are read, so that a compile would seem to (and under a memory limit does) grow with the
model. Here only the header is read; the data is read later with `os.preadv` into buffers of one tile.
The checks are at least as strict as those of the library: a header is input from outside, and every offset in it is
compared with the shape, with its neighbours and with the size of the file before a byte of data is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import MoecError
from ...errors.json_files import no_constant
from ...errors.json_files import parse_json as parse_any
from ...ir.dtypes import DTYPES
from ...ir.types import TensorType

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format

# dtype strings of the format -> ours
SAFETENSORS_DTYPES = {
    "BOOL": "bool", "U8": "u8", "I8": "i8", "I16": "i16", "I32": "i32", "I64": "i64",
    "F8_E4M3": "f8e4m3", "F8_E5M2": "f8e5m2", "F8_E8M0": "f8e8m0", "F8_E4M3FNUZ": "f8e4m3fnuz",
    "F16": "f16", "BF16": "bf16", "F32": "f32", "F64": "f64",
}  # fmt: skip

_DAMAGED = "the file is damaged: download it or convert the model again"


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor: `offset` is counted in bytes from the start of `file` (None: not in a file)."""

    type: TensorType
    file: Path | None = None
    offset: int = 0


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file, read, and its bytes (length included).

    `unreadable` are tensors of dtypes that have no meaning here, with the reason: they stop a compile only if it needs
    them.
    """

    tensors: Mapping[str, TensorInfo]
    unreadable: Mapping[str, str]
    content: bytes


def read_header(file: Path, descriptor: int) -> Header:
    """Return the header of an open safetensors file.

    Raises MoecError for a truncated file, a header that is not JSON, and offsets that do not fit the shapes, each
    other, or the file.
    """
    size = os.fstat(descriptor).st_size
    start = os.pread(descriptor, 8, 0)
    if start == b"version ":
        raise MoecError("this is a Git LFS pointer, not a weight file", str(file), todo="fetch it with `git lfs pull`")
    if len(start) < 8:
        what = f"the file is truncated: {size} bytes cannot hold a safetensors header"
        raise MoecError(what, str(file), todo=_DAMAGED)
    length = int.from_bytes(start, "little")
    if length > HEADER_LIMIT:
        what = f"the header claims to be {length} bytes long; the safetensors format allows {HEADER_LIMIT}"
        raise MoecError(what, str(file), todo="this is not a safetensors file, or it is damaged")
    if 8 + length > size:
        what = f"the file is truncated: its header claims to be {length} bytes long, the file has {size}"
        raise MoecError(what, str(file), todo=_DAMAGED)
    text = os.pread(descriptor, length, 8)
    if len(text) < length:
        raise MoecError("the file got shorter while it was read", str(file), todo=_DAMAGED)
    entries = parse_json(text, file, "the header")
    if not isinstance(entries, dict) or not text.startswith(b"{"):
        raise MoecError("the header is not a JSON object", str(file), todo=_DAMAGED)
    _check_metadata(entries.pop("__metadata__", {}), file)
    data_start = 8 + length
    spans = {name: _read_entry(name, entry, file) for name, entry in entries.items()}
    _check_cover(spans, size - data_start, file)
    found = {
        name: TensorInfo(type_, file, data_start + begin)
        for name, (type_, begin, _) in spans.items()
        if isinstance(type_, TensorType)
    }
    unreadable = {
        name: f"has the dtype {kind} in {file.name}, which is not understood; known: {', '.join(SAFETENSORS_DTYPES)}"
        for name, (kind, _, _) in spans.items()
        if isinstance(kind, str)
    }
    return Header(found, unreadable, start + text)


def parse_json(text: bytes, file: Path, what: str) -> Any:
    """Return the value of JSON bytes; MoecError for bad JSON and for an object with the same key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise MoecError(f"{what} names {key!r} twice", str(file), todo=_DAMAGED)
            result[key] = value
        return result

    return parse_any(
        text, file, what, _DAMAGED, object_pairs_hook=unique, parse_constant=no_constant, parse_int=None
    )  # the lengths of integers are judged where they are used: there are many of them


def _check_metadata(metadata: Any, file: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MoecError("__metadata__ in the header is not a table of strings", str(file), todo=_DAMAGED)


def _read_entry(name: str, entry: Any, file: Path) -> tuple[TensorType | str, int, int]:
    """Return the type (the dtype alone where it is unknown) and the byte range (within the data) of one tensor."""
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise MoecError(f"tensor {name!r}: dtype, shape or data_offsets is missing", str(file), todo=_DAMAGED)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise MoecError(f"tensor {name!r} has the unknown dtype {dtype!r:.80}", str(file), todo=_DAMAGED)
    if not _is_shape(shape) or math.prod(n or 1 for n in shape) >= 2**63:
        raise MoecError(f"tensor {name!r} has no valid shape: {shape!r:.80}", str(file), todo=_DAMAGED)
    if not _is_shape(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        what = f"tensor {name!r} has no valid data_offsets: {offsets!r:.80}"
        raise MoecError(what, str(file), todo=_DAMAGED)
    if dtype not in SAFETENSORS_DTYPES:
        return dtype[:40], offsets[0], offsets[1]
    wanted = math.prod(shape) * DTYPES[SAFETENSORS_DTYPES[dtype]].bits // 8
    if offsets[1] - offsets[0] != wanted:
        what = f"the header lies about sizes: tensor {name!r} {dtype}{shape} takes {wanted} bytes, not"
        raise MoecError(f"{what} {offsets[1] - offsets[0]}", str(file), todo=_DAMAGED)
    return _tensor_type(SAFETENSORS_DTYPES[dtype], tuple(shape)), offsets[0], offsets[1]


@lru_cache(maxsize=1024)
def _tensor_type(dtype: str, shape: tuple[int, ...]) -> TensorType:
    """Return a type; a checkpoint has 100,000 tensors of a few dozen types, and making one costs more than parsing."""
    return TensorType.of(dtype, *shape)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_cover(spans: Mapping[str, tuple[TensorType | str, int, int]], length: int, file: Path) -> None:
    """Check that the byte ranges follow each other without holes and overlaps and fill the data exactly."""
    position, before = 0, "the header"
    for name, (_, begin, end) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if begin < position:
            what = f"the header lies about sizes: tensors {before!r} and {name!r} overlap"
            raise MoecError(what, str(file), todo=_DAMAGED)
        if begin > position:
            what = f"the header lies about sizes: {begin - position} bytes before tensor {name!r} belong to no tensor"
            raise MoecError(what, str(file), todo=_DAMAGED)
        position, before = end, name
    if position > length:
        what = f"the file is truncated: the header announces {position} bytes of data, there are {length}"
        raise MoecError(what, str(file), todo=_DAMAGED)
    if position < length:
        what = f"the header lies about sizes: {length - position} bytes at the end belong to no tensor"
        raise MoecError(what, str(file), todo=_DAMAGED)


# --- writing -------------------------------------------------------------------------------------------------------

_NAMES = {ours: name for name, ours in SAFETENSORS_DTYPES.items()}
_START = 64  # data begins at a multiple of it


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], about: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Return the header for tensors (name -> dtype, shape) in their order, its length in front, and where each begins in the file.

    `about` is what the header says of the file itself.
    """
    entries: dict[str, dict[str, Any]] = {"__metadata__": dict(about)} if about else {}
    begins: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begins[name], end = end, end + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _START)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype].bits // 8
