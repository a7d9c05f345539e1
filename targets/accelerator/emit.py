"""Writes a module of stage kernel for an accelerator: kernels.json, kernels/, plan.json and weights/."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...compiler.atomic import write_error
from ...compiler.ir import Module
from ...compiler.weights.sink import TILE_BYTES
from ...compiler.weights.sources import WeightSource
from .chip import Profile
from .plan import make_plan
from .shards import find_shards, write_shards
from .spec import Kernels, KernelSpec, kernel_specs, packings
from .triton_source import triton_source

KERNELS, PLAN, SOURCES = "kernels.json", "plan.json", "kernels"


def emit(
    module: Module,
    source: WeightSource,
    folder: Path,
    tile_bytes: int = TILE_BYTES,
    progress: Callable[[int], None] | None = None,
    *,
    profile: Profile,
) -> dict[str, str]:
    """Write the artifact's files into a folder and return the sha256 of each by name.

    `progress` is told the bytes of weights written so far. MoecError for an op that no kernel computes, for a chip on
    which a kernel does not fit, for weights that cannot be read and for a full disk.
    """
    kernels = kernel_specs(module, profile)
    found = find_shards(module, packings(module, profile))
    files = write_sources(kernels, folder)
    files[KERNELS] = write_json(folder / KERNELS, kernels.to_json())
    files[PLAN] = write_json(folder / PLAN, make_plan(module, profile, found, profile.name))
    return files | write_shards(found, source, folder, tile_bytes, progress)


def write_sources(kernels: Kernels, folder: Path) -> dict[str, str]:
    """Write the Triton source of each kernel as a file of its name; return the sha256 of each."""
    return {
        f"{SOURCES}/{kernel.name}.py": write_text(folder / SOURCES / f"{kernel.name}.py", _source(kernel))
        for kernel in kernels.kernels
    }


def _source(kernel: KernelSpec) -> str:
    return triton_source(kernel.best.program, kernel.best.tile.warps)


def write_json(path: Path, data: Mapping[str, Any]) -> str:
    """Write JSON, the same bytes for the same data, and return its sha256."""
    return write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> str:
    """Write a text and return its sha256; MoecError where that fails."""
    raw = text.encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    except OSError as error:
        raise write_error(error, path) from error
    return hashlib.sha256(raw).hexdigest()
