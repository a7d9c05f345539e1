"""Where the bytes of each weight lie in an artifact's files, so that two artifacts can be compared weight by weight."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import MoecError

CHUNK = 1 << 24


@dataclass(frozen=True)
class Place:
    """Bytes of a file: where a weight lies, or the weight itself where a model file holds it."""

    file: Path
    offset: int
    length: int
    held: bytes | None = None

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes, some at a time."""
        if self.held is not None:
            yield self.held
            return
        with self.file.open("rb") as file:
            file.seek(self.offset)
            left = self.length
            while left:
                part = file.read(min(CHUNK, left))
                if not part:
                    raise MoecError(f"{self.file.name} ends within a weight", str(self.file), todo="compile it again")
                left -= len(part)
                yield part


def weight_places(folder: Path) -> dict[str, Place]:
    """Return the weights of an artifact by name: those of model.onnx, and of every safetensors file."""
    found: dict[str, Place] = {}
    if (folder / "model.onnx").is_file():
        found |= _onnx_places(folder / "model.onnx")
    for file in sorted(folder.rglob("*.safetensors")):
        found |= _safetensors_places(file)
    return found


def differing_weights(old: Path, new: Path) -> list[str]:
    """Return the names of the weights that two artifacts have in common and whose bytes differ."""
    left, right = weight_places(old), weight_places(new)
    return [name for name in left if name in right and not _same_bytes(left[name], right[name])]


def _same_bytes(old: Place, new: Place) -> bool:
    return old.length == new.length and all(a == b for a, b in zip(old.chunks(), new.chunks(), strict=True))


def _onnx_places(file: Path) -> dict[str, Place]:
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        external: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
        if external:
            data = file.parent / Path(external["location"]).name
            found[tensor.name] = Place(data, int(external.get("offset", 0)), int(external.get("length", 0)))
        else:
            content = tensor.SerializeToString(deterministic=True)
            found[tensor.name] = Place(file, 0, len(content), content)
    return found


def _safetensors_places(file: Path) -> dict[str, Place]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    start = 8 + length
    places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: Place(file, start + low, high - low) for name, (low, high) in places.items()}
