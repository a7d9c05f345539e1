"""Opens an artifact of target cpu: one that generates tokens, or one that is called with arrays."""

from __future__ import annotations

from pathlib import Path

from ....compiler.artifact.manifest import is_language_model, read_manifest
from ....compiler.errors import MoecError
from .call import CallSession, load_call
from .session import Session, load_session


def open_artifact(
    folder: Path | str, threads: int | None = None, spinning: bool = True, accuracy: str | None = None,
    device: str | None = None, profiling: bool = False,
) -> Session | CallSession:  # fmt: skip
    """Open the artifact in `folder`; `threads` is the number of compute threads (default: one a usable core).

    `accuracy` of `exact` keeps activations beside quantized weights in f32, whatever the model was compiled for.
    `spinning` threads wait for work without sleeping: fast, but whatever else computes between two steps is slowed
    down several times. `device` is `auto` or `cpu`. With `profiling` the time of every node is recorded (`events`).
    Raises MoecError if the artifact is not whole, ONNX Runtime does not take it, or another device is asked for.
    """
    folder = Path(folder)
    if device not in (None, "auto", "cpu"):
        raise MoecError(
            f"an artifact for target cpu does not run on {device}", todo="leave --device out, or compile for a GPU"
        )
    load = load_session if is_language_model(read_manifest(folder)) else load_call
    return load(folder, threads, spinning, accuracy, profiling)
