"""Writes an Ascend's kernels into an artifact: sources for triton-ascend, and Linalg where triton-ascend is available."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ....compiler.errors import MoecError
from ..ascend.blocks import blocks_of, one_block_a_core
from ..ascend.lower import Environment, Lowered, kernel_of, lower_on_ascend, open_environment
from ..chip.chip import Profile
from ..tile.tiles import Program
from ..triton.source import triton_source
from .spec import Kernels

MISSING = "there is no environment with triton-ascend; -D toolchain=make makes one"
ALLOCATED = re.compile(r"memref\.alloc\(\) : (memref<[^>]*>)")


def source_of(program: Program, profile: Profile) -> str:
    """Return the Triton source of a program for a chip, plain where it computes with types that the chip has not."""
    program = one_block_a_core(program, blocks_of(profile, program))
    try:
        return kernel_of(program, profile.arch or "").source
    except MoecError:
        return triton_source(program)


def find_environment(create: bool) -> tuple[Environment | None, str]:
    """Return the user's environment, made first if `create`; without one, why it is missing.

    Raises MoecError if one is to be made and cannot be.
    """
    try:
        return open_environment(create=create), MISSING
    except MoecError as error:
        if create:
            raise
        return None, "; ".join(filter(None, (f"{error.what} ({error.where})", error.todo)))


def lower_kernels(
    kernels: Kernels, arch: str, folder: str, where: Environment | None, why: str = MISSING
) -> tuple[Kernels, dict[str, bytes]]:
    """Return the kernels with what came of each for `arch`, and the Linalg files, with names below `folder`.

    Without an environment only sources are written, and `why` takes the place of an object. Equal programs are lowered
    once; a kernel that the adapter does not take has its error there.
    """
    if where is None:
        reason = {"arch": arch, "error": why}
        return replace(kernels, kernels=tuple(replace(k, objects={arch: reason}) for k in kernels.kernels)), {}
    programs = {
        repr(k.best.program): one_block_a_core(k.best.program, blocks_of(kernels.profile, k.best.program))
        for k in kernels.kernels
    }
    wanted: dict[str, Any] = {}
    found: dict[str, Lowered] = {}
    for key, program in programs.items():
        try:
            wanted[key] = kernel_of(program, arch)
        except MoecError as error:
            found[key] = Lowered(program.name, stage="program", error=error.what)
    found |= zip(wanted, lower_on_ascend(list(wanted.values()), arch, where), strict=True)
    files, specs = {}, []
    for kernel in kernels.kernels:
        made = found[repr(kernel.best.program)]
        entry: dict[str, Any] = {"arch": arch}
        if made.error:
            entry["error"] = f"{made.stage}: {made.error}"
        else:
            entry["file"] = f"{folder}/{kernel.name}.mlir"
            entry["products"] = made.linalg.count("linalg.matmul ")
            entry["buffers"] = ALLOCATED.findall(made.linalg)
            files[entry["file"]] = made.linalg.encode()
        specs.append(replace(kernel, objects={arch: entry}))
    return replace(kernels, kernels=tuple(specs)), files
