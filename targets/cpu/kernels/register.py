"""Loads the library of moec's own kernels that lies beside a model into an ONNX Runtime session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....compiler.artifact.manifest import file_sha256
from ....compiler.errors import MoecError
from .library import this_platform


def register_kernels(options: Any, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Register the library for this platform with an onnxruntime.SessionOptions, if the artifact has one.

    Without it ONNX Runtime's operators compute the same nodes. The library is code: only one whose sha256 is the
    manifest's is loaded. Raises MoecError for another one, and for one that the system cannot load.
    """
    place = this_platform()
    expected = manifest["files"].get(place.file) if place else None
    if place is None or expected is None:
        return
    path = folder / place.file
    if file_sha256(path) != expected:
        todo = "compile it again, or take a fresh copy"
        raise MoecError(f"{path.name} is not as it was written: its sha256 differs", where=str(path), todo=todo)
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime's own classes, one a code
        raise MoecError(f"the system cannot load the kernels: {error}", where=str(path)) from error
