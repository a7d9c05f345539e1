"""GGUF files as checkpoints: the header is read and checked, tensors are read a box at a time.

A quantized tensor appears as the bytes of its blocks, u8[..., bytes of a row]; `kinds` says of which type they are. The
format is described in llama.cpp's docs (gguf.md): little endian, version 2 or 3, sizes listed with the fastest first.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from ...errors import MoecError
from ...ir.dtypes import DTYPES
from ...ir.types import TensorType
from ..ggml import BLOCKS
from ..unchanged import Opened, stamp_of
from .checkpoint import Checkpoint, open_regular
from .safetensors_header import TensorInfo

# numbers of types in the file -> dtypes, and block types (ggml.h)
_PLAIN = {0: "f32", 1: "f16", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 30: "bf16"}
_BLOCKS = {
    2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k",
    20: "iq4_nl", 39: "mxfp4",
}  # fmt: skip
_OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
}  # fmt: skip
TYPE_NUMBERS: Mapping[str, int] = {name: number for number, name in (_PLAIN | _BLOCKS).items()}
# metadata types: struct codes of numbers, then string and array
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = 1 << 22  # entries of a list; files have up to a few hundred thousand
_MOST_KEYS, _MOST_TENSORS = 1 << 16, 1 << 20
_LONG = 4096  # arrays with more elements (vocabularies) are not kept: their length is
_LONG_KEY, _LONG_STRING = 1 << 16, 1 << 24  # bytes; chat templates have some 10,000
_PIECE = 1 << 20  # bytes of an array that are read at once
_DAMAGED = "the file is damaged: download it again"


@dataclass(frozen=True)
class LongArray:
    """Stands for an array of the metadata that is too long to keep."""

    count: int


@dataclass(frozen=True)
class Gguf:
    """A model in GGUF: its tensors, its metadata, the block type of quantized tensors."""

    checkpoint: Checkpoint
    metadata: Mapping[str, Any]
    kinds: Mapping[str, str]


def open_gguf(file: Path) -> Gguf:
    """Open a GGUF file, with its other parts if it is one of several.

    Raises MoecError (exit code 2) for missing, truncated or lying files and for types of blocks that are not read.
    """
    digest = hashlib.sha256()
    descriptors: dict[Path, int] = {}
    tensors: dict[str, TensorInfo] = {}
    kinds: dict[str, str] = {}
    metadata: dict[str, Any] = {}
    try:
        parts = _part_files(Path(file))
        for part in parts:
            descriptors[part] = open_regular(part)
            with part.open("rb") as stream:
                header = _Header(part, stream, os.fstat(descriptors[part]).st_size)
                found, own = header.read()
            _check_part(own, part, len(parts))
            metadata = own | metadata
            for name, (info, kind) in found.items():
                if name in tensors:
                    raise MoecError(f"tensor {name!r} is in two parts", str(part), todo="keep the parts of one model")
                tensors[name] = info
                kinds |= {name: kind} if kind else {}
            digest.update(f"{part.name} {header.size} {header.end}\n".encode() + header.digest.digest())
    except BaseException:
        for descriptor in descriptors.values():
            os.close(descriptor)
        raise
    fingerprint = digest.hexdigest()
    opened = Opened({f: stamp_of(d) for f, d in descriptors.items()}, fingerprint, partial(_fingerprint_again, file))
    checkpoint = Checkpoint(Path(file), MappingProxyType(tensors), fingerprint, opened, descriptors)
    return Gguf(checkpoint, MappingProxyType(metadata), MappingProxyType(kinds))


def _fingerprint_again(file: Path) -> str:
    with open_gguf(file).checkpoint as found:
        return found.fingerprint


def _part_files(file: Path) -> list[Path]:
    """Return the files of a model: of several where the name says `-00001-of-00003`."""
    found = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", file.name)
    if not found or int(found[3]) == 0:
        return [file]
    return [file.with_name(f"{found[1]}{i:05}-of-{found[3]}.gguf") for i in range(1, int(found[3]) + 1)]


def _check_part(metadata: Mapping[str, Any], part: Path, parts: int) -> None:
    """Raise MoecError for a file that is one of more parts than its name says."""
    count = metadata.get("split.count")
    if count is not None and count != max(parts, 1) and not (count == 0 and parts == 1):
        number = metadata.get("split.no")
        at = f"part {number + 1} of" if isinstance(number, int) else "one of"
        raise MoecError(
            f"this is {at} {count!r:.40} parts, by split.count, and of {parts} by its name",
            str(part),
            todo="name the parts as they came: model-00001-of-00003.gguf",
        )


@dataclass
class _Header:
    """Reads the header of one file; everything in it is untrusted."""

    file: Path
    stream: BinaryIO
    size: int
    digest: Any = field(default_factory=hashlib.sha256)
    end: int = 0

    def read(self) -> tuple[dict[str, tuple[TensorInfo, str]], dict[str, Any]]:
        """Return the tensors with their block types ("" for plain ones), and the metadata."""
        if self.take(4) != b"GGUF":
            raise MoecError("this is not a GGUF file", str(self.file), todo="or it is damaged: download it again")
        (version,) = self.numbers("I")
        if version not in (2, 3):
            todo = "versions 2 and 3, little endian, are: convert it again with a current llama.cpp"
            raise MoecError(f"GGUF version {version} is not read", str(self.file), todo=todo)
        tensors, pairs = self.numbers("QQ")
        self.check(
            tensors <= _MOST_TENSORS and pairs <= _MOST_KEYS, f"the header announces {tensors} tensors and {pairs} keys"
        )
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string(_LONG_KEY)
            self.check(key not in metadata, f"the key {key!r:.80} is there twice")
            (kind,) = self.numbers("I")
            metadata[key] = self.value(kind, key)
        entries = [self.entry() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        self.check(
            isinstance(alignment, int) and not isinstance(alignment, bool) and 0 < alignment <= 1 << 20,
            f"general.alignment is {alignment!r:.80}",
        )
        start = self.end + -self.end % alignment
        found: dict[str, tuple[TensorInfo, str]] = {}
        for name, type_, kind, offset in entries:
            self.check(name not in found, f"the header names {name!r} twice")
            length = int(type_.elements) * DTYPES[type_.dtype].bits // 8
            self.check(
                offset % alignment == 0 and start + offset + length <= self.size,
                f"tensor {name!r} should start at {offset} and be {length} bytes long; the file has {self.size}",
            )
            found[name] = (TensorInfo(type_, self.file, start + offset), kind)
        return found, metadata

    def entry(self) -> tuple[str, TensorType, str, int]:
        """Return name, type, block type and offset of a tensor."""
        name = self.string(_LONG_KEY)
        (rank,) = self.numbers("I")
        self.check(rank <= 8, f"tensor {name!r} has {rank} axes")
        sizes = tuple(reversed(self.numbers(f"{rank}Q")))
        number, offset = self.numbers("IQ")
        self.check(math.prod(n or 1 for n in sizes) < 1 << 63, f"tensor {name!r} has no valid shape: {list(sizes)}")
        if number in _PLAIN:
            return name, TensorType.of(_PLAIN[number], *sizes), "", offset
        if number not in _BLOCKS:
            what = f"tensor {name!r} has the type {_OTHERS.get(number, number)}, which is not read"
            todo = f"there are {', '.join(sorted(map(str.upper, _BLOCKS.values())))}, F32, F16, BF16"
            raise MoecError(what, str(self.file), todo=todo)
        block = BLOCKS[_BLOCKS[number]]
        self.check(
            bool(sizes) and sizes[-1] % block.elements == 0, f"tensor {name!r} {list(sizes)} has no whole blocks"
        )
        width = sizes[-1] // block.elements * block.bytes
        return name, TensorType.of("u8", *sizes[:-1], width), _BLOCKS[number], offset

    def value(self, kind: int, key: str) -> Any:
        """Return a value of the metadata: a number, a string, a tuple of these, or LongArray."""
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind])[0]
        self.check(kind == _ARRAY, f"the key {key!r:.80} has the unknown type {kind}")
        inner, count = self.numbers("IQ")
        self.check(
            count <= _MOST and (inner == _STRING or inner in _NUMBERS), f"the key {key!r:.80} has no valid array"
        )
        if count <= _LONG:
            return tuple(self.value(inner, key) for _ in range(count))
        if inner == _STRING:
            for _ in range(count):
                self.string_bytes()
        else:
            left = count * struct.calcsize(f"<{_NUMBERS[inner]}")
            while left:
                left -= len(self.take(min(left, _PIECE)))
        return LongArray(count)

    def string(self, most: int = _LONG_STRING) -> str:
        """Return a string; bytes that are no UTF-8 are an error."""
        raw = self.string_bytes(most)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise MoecError(
                f"the header has a string that is not UTF-8: {raw[:60]!r:.60}", str(self.file), todo=_DAMAGED
            ) from None

    def string_bytes(self, most: int = _LONG_STRING) -> bytes:
        """Return the bytes of a string."""
        (length,) = self.numbers("Q")
        self.check(self.end + length <= self.size, "the file is truncated")
        self.check(length <= most, f"the header has a string of {length} bytes")
        return self.take(length)

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """Return numbers, little endian."""
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        self.check(self.end + count <= self.size, "the file is truncated")
        raw = self.stream.read(count)
        self.check(len(raw) == count, "the file got shorter while it was read")
        self.digest.update(raw)
        self.end += count
        return raw

    def check(self, holds: bool, what: str) -> None:
        """Raise MoecError with what is wrong unless it holds."""
        if not holds:
            raise MoecError(what, str(self.file), todo=_DAMAGED)
