"""Calls an artifact of target cpu whose program is no language model: arrays in, arrays out, nothing kept between calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....compiler.artifact.manifest import check_files, read_manifest
from ....compiler.errors import MoecError
from .session import MODEL, open_runtime, reword_errors


@dataclass(frozen=True)
class CallSession:
    """An open program: the names of its inputs and outputs, in order; `kernels` says what computes the quantized layers."""

    folder: Path
    runtime: Any  # onnxruntime.InferenceSession
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kernels: str = ""

    def call(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the program once on an array for each input; MoecError for what the runtime refuses."""
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        with reword_errors("ONNX Runtime cannot run the program", self.folder / MODEL, todo=shapes):
            found = self.runtime.run(list(self.outputs), dict(arrays))
        return dict(zip(self.outputs, found, strict=True))


def load_call(
    folder: Path, threads: int | None = None, spinning: bool = True, accuracy: str | None = None,
    profiling: bool = False,
) -> CallSession:  # fmt: skip
    """Open a program in `folder`; the options are those of `session.load_session`."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    runtime, kernels = open_runtime(folder, manifest, threads, spinning, accuracy, profiling)
    names = [[entry["name"] for entry in manifest[key]] for key in ("inputs", "outputs")]
    if [v.name for v in runtime.get_outputs()] != names[1] or {v.name for v in runtime.get_inputs()} != set(names[0]):
        raise MoecError("moec.json and the model do not belong together", str(folder / MODEL), todo="compile it again")
    return CallSession(folder, runtime, tuple(names[0]), tuple(names[1]), kernels)
