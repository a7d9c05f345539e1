"""Reads what ONNX Runtime's profiler recorded: the time of every node, and where in the source model it comes from."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....compiler.errors import MoecError
from ...session import OpTime

_NUMBERED = re.compile(r"[^/]+_(\d+)")
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
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith(_SUFFIX)]
    ran = {event["name"].removesuffix(_SUFFIX): event["args"]["op_name"] for event in nodes}
    modules = _modules_of_nodes(model, ran)
    found = []
    for event in nodes:
        node = event["name"].removesuffix(_SUFFIX)
        place = modules.get(node) or modules.get(node.rpartition("/")[0], ())
        found.append(OpTime(event["args"]["op_name"], place, begun + event["ts"] * 1000, event["dur"] / 1e6))
    return tuple(sorted(found, key=lambda e: e.start))


def _on_monotonic_clock(moment: int) -> int:
    """Return a moment as time.monotonic_ns() counts: which clock the runtime reads is up to its compiler."""
    clock = min((time.monotonic_ns, time.time_ns), key=lambda c: abs(c() - moment))
    return moment + time.monotonic_ns() - clock()


def _modules_of_nodes(model: Path, ran: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the modules of the source by the name of a node, and by what it begins with: the runtime fuses nodes.

    `ran` are the operators of the nodes that ran, by name. Those of a function's body, where no kernel is registered for it,
    have the operator and a number that counts up as a name.
    """
    import onnx

    found: dict[str, tuple[str, ...]] = {}
    read = onnx.load(model, load_external_data=False)
    bodies = {(f.domain, f.name): [node.op_type for node in f.node] for f in read.functions}
    numbered = [
        (int(n[1]), n[0], kind) for n, kind in ((_NUMBERED.fullmatch(name), kind) for name, kind in ran.items()) if n
    ]
    pending = [(name, kind) for _, name, kind in sorted(numbered)]
    for node in read.graph.node:
        place = tuple(node.doc_string.split(", ")) if node.doc_string else ()
        for kind in bodies.get((node.domain, node.op_type), ()):
            if pending and pending[0][1] == kind:
                found[pending.pop(0)[0]] = place
        if place:
            found[node.name] = place
            found.setdefault(node.name.rpartition("/")[0], place)
    return found
