"""The initializers of an ONNX model: those in the model file, and those in files beside it, which are read a box at a time.

Where external data lies is said by the model, which is not trusted: every path has to stay inside of the folder, and
every range inside of the file.
"""

from __future__ import annotations

import hashlib
import math
import os
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from onnx import GraphProto, TensorProto, numpy_helper

from ...errors import MoecError
from ...ir.dtypes import DTYPES, find_dtype
from ...ir.types import TensorType
from ..unchanged import Opened, stamp_of
from .checkpoint import Checkpoint, open_regular
from .safetensors_header import TensorInfo
from .source import Box, ModuleSource

ONNX_DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "f32", TensorProto.DOUBLE: "f64", TensorProto.FLOAT16: "f16", TensorProto.BFLOAT16: "bf16",
    TensorProto.UINT8: "u8", TensorProto.INT8: "i8", TensorProto.INT16: "i16", TensorProto.INT32: "i32",
    TensorProto.INT64: "i64", TensorProto.BOOL: "bool", TensorProto.FLOAT8E4M3FN: "f8e4m3",
    TensorProto.FLOAT8E5M2: "f8e5m2", TensorProto.FLOAT8E4M3FNUZ: "f8e4m3fnuz", TensorProto.FLOAT8E8M0: "f8e8m0",
}  # fmt: skip
_TODO = "export the model again"
_MOST_AXES = 16


class OnnxSource:
    """The initializers of a model by name; a `WeightSource`. `add` takes those of a graph, also one inside of a node."""

    def __init__(self, file: Path | None, content: bytes) -> None:
        """Start without initializers; `content` is its bytes, `file` None for a model in memory."""
        self.file, self.folder = file, file.parent if file else None
        self.tensors: dict[str, TensorInfo] = {}
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._stamps = {file: stamp_of(file)} if file else {}
        self.opened = Opened(
            self._stamps, self.fingerprint, partial(_hash_file, file) if file else lambda: self.fingerprint
        )
        self._descriptors: dict[Path, int] = {}
        self._stored = Checkpoint(file or Path(), self.tensors, self.fingerprint, self.opened, self._descriptors)
        self._inside: dict[str, torch.Tensor] = {}

    def add(self, tensor: TensorProto, name: str, keep: bool = False) -> TensorType:
        """Take an initializer under a name and return its type; MoecError for one that is not whole.

        Unless its numbers are to be kept in the model, they are taken out of it, so that they are in memory once.
        """
        if name in self.tensors:
            raise MoecError(f"the model has two initializers {name}", model=name, todo=_TODO)
        type_ = _type_of(tensor, name)
        if tensor.data_location == TensorProto.EXTERNAL:
            self.tensors[name] = self._external(tensor, name, type_)
        else:
            self._inside[name] = _read_inside(tensor, name, type_, keep or self.file is None)
            self.tensors[name] = TensorInfo(type_)
        return type_

    def read(self, name: str, box: Box | None = None, expected: TensorType | None = None) -> torch.Tensor:
        """Return an initializer, or the part of it in `box`; MoecError for an unknown name and another type."""
        if name in self._inside:
            return ModuleSource({name: self._inside[name]}).read(name, box, expected)
        return self._stored.read(name, box, expected)

    def lacks(self, name: str) -> MoecError:
        """Return the error for a name that no initializer has."""
        return MoecError(f"the model has no initializer {name}", str(self.file or "the model"))

    def _external(self, tensor: TensorProto, name: str, type_: TensorType) -> TensorInfo:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if self.folder is None or self.file is None:
            raise MoecError(f"the initializer {name} lies in a file, and the model is in memory", todo="give the file")
        path = self._path_inside(entries.get("location", ""), name)
        if path not in self._descriptors:
            self._descriptors[path] = open_regular(path)
            self._stamps[path] = stamp_of(self._descriptors[path])
        size = os.fstat(self._descriptors[path]).st_size
        wanted = int(type_.bytes)
        offset, length = (_read_number(entries.get(k, d), name) for k, d in (("offset", "0"), ("length", str(wanted))))
        if length != wanted or offset + wanted > size:
            what = (
                f"the initializer {name} is {type_}, {wanted} bytes; the file gives it {length} from {offset} of {size}"
            )
            raise MoecError(what, str(path), todo=_TODO)
        return TensorInfo(type_, path, offset)

    def _path_inside(self, location: str, name: str) -> Path:
        """Return the file of external data; it lies in the model's folder, or beside what the model is a link to."""
        assert self.folder is not None and self.file is not None
        pure = PurePosixPath(location)
        bad = not location or "\0" in location or "\\" in location or pure.is_absolute() or ".." in pure.parts
        path = self.folder / location if not bad else self.folder
        roots = (self.folder.resolve(), self.file.resolve().parent)
        if bad or not any(path.resolve().is_relative_to(root) for root in roots):
            what = f"the initializer {name} is said to be in {location!r}, outside of the model's folder"
            raise MoecError(what, str(self.file), todo="do not trust this model")
        return path


def constants_of(graph: GraphProto) -> dict[str, TensorProto]:
    """Return the initializers of a graph by name."""
    if graph.sparse_initializer:
        raise MoecError("the model has a sparse initializer, which is not understood", todo=_TODO)
    return {tensor.name: tensor for tensor in graph.initializer}


def type_name(elem_type: int) -> str:
    """Return what ONNX calls a type of elements."""
    return next((name for name, number in TensorProto.DataType.items() if number == elem_type), str(elem_type))


def _type_of(tensor: TensorProto, name: str) -> TensorType:
    dtype = ONNX_DTYPES.get(tensor.data_type)
    if dtype is None:
        what = f"the initializer {name} is {type_name(tensor.data_type)}, which is not understood"
        raise MoecError(what, model=name)
    if len(tensor.dims) > _MOST_AXES or any(n < 0 for n in tensor.dims):
        raise MoecError(
            f"the initializer {name} has the sizes {list(tensor.dims)[:_MOST_AXES]}", model=name, todo=_TODO
        )
    return TensorType.of(dtype, *tensor.dims)


def _read_number(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise MoecError(f"the place of the initializer {name} is {text[:40]!r}, no number", model=name, todo=_TODO)
    return int(text)


def _read_inside(tensor: TensorProto, name: str, type_: TensorType, keep: bool) -> torch.Tensor:
    """Return the numbers of a tensor in the model."""
    elements = math.prod(type_.sizes)
    dtype = DTYPES[type_.dtype]
    if tensor.HasField("raw_data"):
        raw = np.frombuffer(tensor.raw_data, np.uint8).copy()
        if not keep:
            tensor.ClearField("raw_data")
        if len(raw) * 8 != elements * dtype.bits:
            raise MoecError(
                f"the initializer {name} is {type_}, with {len(raw)} bytes of numbers", model=name, todo=_TODO
            )
        found = torch.from_numpy(raw)
        return found.ne(0).view(type_.sizes) if type_.dtype == "bool" else found.view(dtype.torch).view(type_.sizes)
    lists = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    if sum(map(len, lists)) != elements:
        raise MoecError(
            f"the initializer {name} is {type_}, with {sum(map(len, lists))} numbers", model=name, todo=_TODO
        )
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, OverflowError) as error:
        raise MoecError(f"the initializer {name} cannot be read: {error}", model=name, todo=_TODO) from None
    if find_dtype(array.dtype) != type_.dtype or array.size != elements:
        raise MoecError(f"the initializer {name} is {type_}, its numbers are {array.dtype}", model=name, todo=_TODO)
    bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
    return torch.from_numpy(bits).view(dtype.torch).view(type_.sizes)


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
