"""Reads what ONNX Runtime's profiler recorded: the time of every node, and where in the source model it comes from."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from ....compiler.errors import MoecError
from ...session import OpTime

_SUFFIX = "_kernel_time"  # behind the name of a node, in that of the event for its computing


def enable_profiling(options: Any) -> None:
    """Turn the profiler on in an onnxruntime.SessionOptions."""
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(tempfile.gettempdir()) / f"moec-profile-{os.getpid()}")


def read_profile(runtime: Any, model: Path) -> tuple[OpTime, ...]:
    """End the profiling of an onnxruntime.InferenceSession; return the nodes in the order in which they ran."""
    begun = _on_monotonic_clock(runtime.get_profiling_start_time_ns())
    path = Path(runtime.end_profiling())
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoecError("the profile that ONNX Runtime wrote cannot be read", where=str(path)) from error
    finally:
        path.unlink(missing_ok=True)
    modules = _modules_of_nodes(model)
    found = []
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(_SUFFIX):
            node = event["name"].removesuffix(_SUFFIX)
            place = modules.get(node) or modules.get(node.rpartition("/")[0], ())
            found.append(OpTime(event["args"]["op_name"], place, begun + event["ts"] * 1000, event["dur"] / 1e6))
    return tuple(sorted(found, key=lambda e: e.start))


def _on_monotonic_clock(moment: int) -> int:
    """Return a moment as time.monotonic_ns() counts: which clock the runtime reads is up to its compiler."""
    clock = min((time.monotonic_ns, time.time_ns), key=lambda c: abs(c() - moment))
    return moment + time.monotonic_ns() - clock()


def _modules_of_nodes(model: Path) -> dict[str, tuple[str, ...]]:
    """Return the modules of the source by the name of a node, and by what it begins with: the runtime fuses nodes."""
    import onnx

    found: dict[str, tuple[str, ...]] = {}
    for node in onnx.load(model, load_external_data=False).graph.node:
        if node.doc_string:
            place = tuple(node.doc_string.split(", "))
            found[node.name] = place
            found.setdefault(node.name.rpartition("/")[0], place)
    return found
