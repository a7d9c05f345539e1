"""Opens an ONNX file, which is not trusted: what it says of sizes and places is checked before anything is read by it."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto

from ...errors import MoecError

LARGEST = (1 << 31) - 1  # a protobuf message ends there
_TODO = "export the model again; larger weights belong into a file of external data"


def open_model(path: Path) -> tuple[ModelProto, bytes]:
    """Return the model of a file and the file's bytes; MoecError for a file that is no model."""
    try:
        size = path.stat().st_size
        if not path.is_file() or size > LARGEST:
            what = (
                "this is not a regular file"
                if size <= LARGEST
                else f"the file has {size} bytes, more than one protobuf message may have"
            )
            raise MoecError(what, where=str(path), todo=_TODO)
        content = path.read_bytes()
    except OSError as error:
        raise MoecError(f"cannot read the file: {error.strerror}", where=str(path)) from None
    model = ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's own type, which no package that is declared here exports
        raise MoecError(f"the file is no ONNX model: {str(error)[:200]}", str(path), todo=_TODO) from error
    if not model.HasField("graph") or not model.graph.output:
        raise MoecError("the file is no ONNX model: it has no graph with outputs", where=str(path), todo=_TODO)
    return model, content
