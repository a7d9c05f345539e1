"""Loads the library of moec's own kernels that lies beside a model into an ONNX Runtime session."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....compiler.artifact.manifest import file_sha256
from ....compiler.errors import MoecError
from .library import this_platform

_RUNTIME = "ONNX Runtime's operators"


def register_kernels(options: Any, folder: Path, manifest: Mapping[str, Any]) -> str:
    """Register the library for this platform with an onnxruntime.SessionOptions, if the artifact has one; return what computes.

    Without it ONNX Runtime's operators compute the same nodes. The library is code: only one whose sha256 is the
    manifest's is loaded. Raises MoecError for another one, and for one that the system cannot load.
    """
    if not manifest.get("cpu_kernels", {}).get("operators"):
        return _RUNTIME
    place = this_platform()
    expected = manifest["files"].get(place.file) if place else None
    if place is None or expected is None:
        return f"{_RUNTIME}: the artifact has no kernels for this platform"
    path = folder / place.file
    todo = "compile it again, or take a fresh copy"
    if file_sha256(path) != expected:
        raise MoecError(f"{path.name} is not as it was written: its sha256 differs", where=str(path), todo=todo)
    try:
        options.register_custom_ops_library(str(path))
        library = ctypes.CDLL(str(path))
        library.moec_kernels.restype = ctypes.c_char_p
        name = library.moec_kernels()
    except Exception as error:  # onnxruntime's own classes, one a code; OSError and AttributeError of ctypes
        raise MoecError(f"the system cannot load the kernels: {error}", where=str(path), todo=todo) from error
    return (
        f"moec's kernels for {name.decode()}"
        if name
        else f"{_RUNTIME}: this processor has no instruction set of moec's kernels"
    )
