"""Opens what was emitted for ONNX Runtime."""

from pathlib import Path

import onnxruntime as ort
from moec.targets.cpu.onnx.emit import MODEL


def open_session(folder: Path) -> ort.InferenceSession:
    """Return a session of a folder's model on one thread, which says errors only."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
