"""Writes a module of stage kernel for an accelerator: kernels.json, kernels/, plan.json and weights/."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ....compiler.ir.module import Module
from ....compiler.ir.notes import Note
from ....compiler.weights.memory import TILE_BYTES
from ....compiler.weights.sources.source import WeightSource
from ...target import Emitted
from ..chip.chip import Profile
from ..select.choose import weight_layouts
from ..triton.source import triton_source
from .ascend_objects import source_of
from .device_placement import place_on_devices
from .engine_files import engine_files, find_problems, introduction_text
from .objects import compile_kernels, missing_objects, write_files
from .options import Options
from .shards import find_shards, write_shards
from .spec import BUCKETS, Kernels, KernelSpec, kernel_specs

KERNELS, PLAN, SOURCES, ENGINES = "kernels.json", "plan.json", "kernels", "engines"


def emit_artifact(
    module: Module,
    source: WeightSource,
    folder: Path,
    tile_bytes: int = TILE_BYTES,
    progress: Callable[[int], None] | None = None,
    *,
    profile: Profile,
    options: Options,
) -> Emitted:
    """Write the artifact's files into a folder; return the sha256 of each, and notes on objects that are missing
    and on tuning files of other engines.

    `progress` is told the bytes of weights written so far. MoecError for an op that no kernel computes, for a chip on
    which a kernel does not fit, for weights that cannot be read and for a full disk.
    """
    kernels = kernel_specs(module, profile, options.buckets or BUCKETS)
    packed = weight_layouts(module, profile)
    found = find_shards(module, packed)
    objects: Mapping[str, bytes] = {}
    if options.compiled:
        made = compile_kernels(kernels, profile, SOURCES, make_toolchain=options.make_toolchain)
        kernels, objects = made.kernels, made.files
    sources = {f"{SOURCES}/{k.name}.py": _source_text(k, profile) for k in kernels.kernels}
    tuned, notes = engine_files(find_problems(module, packed), profile, options.tuning)
    engines = {f"{ENGINES}/{name}": _json_text(content) for name, content in tuned.items()}
    notes = (*notes, *missing_objects(kernels))
    if profile.toolchain is None:
        notes = (*notes, Note(f"kernels for {profile.name} are source and simulation: no compiler has checked them"))
    if engines:
        engines[f"{ENGINES}/README.md"] = introduction_text(profile.name)
    texts = {
        **sources,
        **engines,
        KERNELS: _json_text(_with_sources(kernels)),
        PLAN: _json_text(place_on_devices(module, profile, found)),
    }
    written = write_files({**{name: text.encode() for name, text in texts.items()}, **objects}, folder)
    return Emitted(written | write_shards(found, source, folder, tile_bytes, progress), notes)


def _source_text(kernel: KernelSpec, profile: Profile) -> str:
    program, arch = kernel.best.program, profile.arch or ""
    if profile.toolchain == "triton-ascend":
        return source_of(program, profile)
    # a kernel that was compiled with fewer registers is launched so too
    limit = kernel.objects.get(arch, {}).get("register_limit")
    return triton_source(program, kernel.best.tile.warps, limit)


def _with_sources(kernels: Kernels) -> dict[str, Any]:
    """Return the content of kernels.json, each kernel with the file of its source."""
    data = kernels.to_json()
    return {**data, "kernels": [{**k, "source": f"{SOURCES}/{k['name']}.py"} for k in data["kernels"]]}


def _json_text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, allow_nan=False) + "\n"
