"""Systems as rows for `moec list systems`."""

from __future__ import annotations

from typing import Any

from ..accelerator.chip.quantities import quantity_text
from .read import find_system, system_names
from .system import System


def list_systems() -> list[dict[str, Any]]:
    """Return the systems that moec brings along, one a row."""
    return [system_row(find_system(name)) for name in system_names()]


def system_row(system: System) -> dict[str, Any]:
    """Return what a system is in one row of texts and numbers."""
    return {
        "name": system.name,
        "device": system.device.name,
        "devices": system.devices,
        "memory": quantity_text(system.memory, "bytes"),
        "bandwidth": quantity_text(system.device.bandwidth.value, "bytes/s"),
        "host": quantity_text(system.host.memory.value, "bytes") if system.host else "",
        "fabrics": ", ".join(f.name for f in system.fabrics),
        "doc": system.doc,
    }
