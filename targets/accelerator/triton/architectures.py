"""The architectures that Triton compiles for, each a row of data: how it is asked for, and which matrix units it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ....compiler.errors import MoecError


@dataclass(frozen=True)
class Architecture:
    """An architecture by the name that profiles have as `arch`.

    `backend` and `warp` (threads) are those of Triton's GPUTarget, `suffix` that of its objects. `unit`: what multiplies
    matrices, `least` the rows and columns of sums from which. `tall`: a unit for tall tiles of at least `tall_columns`
    columns and four warps. `exact`: whether a unit multiplies f32. `past_registers`: whether loads reach shared memory
    without passing registers, also those of operands. `registers`: 32-bit registers of a core, of which a kernel can be
    given more than the compiler takes by itself (0 where it cannot). `mixed`: whether a unit multiplies E4M3 with E2M1
    under scales; elsewhere Triton widens both. `scaled_rows`: the rows from which codes under scales are multiplied as
    such; fewer are widened to bf16.
    """

    name: str
    backend: str
    warp: int
    suffix: str
    unit: str
    least: int = 1
    tall: str = ""
    tall_columns: int = 1
    exact: bool = False
    past_registers: bool = False
    registers: int = 0
    mixed: bool = False
    scaled_rows: int = 1


def _nvidia_architecture(name: str, tall: str = "", tall_columns: int = 1) -> Architecture:
    mixed = tall == "tcgen05"
    return Architecture(
        name,
        "cuda",
        32,
        ".cubin",
        "mma",
        tall=tall,
        tall_columns=tall_columns,
        registers=65536,
        mixed=mixed,
        scaled_rows=128 if mixed else 1,
    )


def _amd_architecture(name: str, newer: bool = False) -> Architecture:
    return Architecture(name, "hip", 64, ".hsaco", "mfma", least=16, exact=True, past_registers=newer, mixed=newer)


ARCHITECTURES: Mapping[str, Architecture] = {
    row.name: row
    for row in (
        _nvidia_architecture("sm_80"),
        _nvidia_architecture("sm_89"),
        _nvidia_architecture("sm_90", "wgmma"),
        _nvidia_architecture("sm_100", "tcgen05", 16),
        _nvidia_architecture("sm_103", "tcgen05", 16),
        _nvidia_architecture("sm_120"),
        _nvidia_architecture("sm_121"),
        _amd_architecture("gfx942"),
        _amd_architecture("gfx950", newer=True),
        Architecture("gfx1151", "hip", 32, ".hsaco", "wmma", least=16),
    )
}


def architecture_of(name: str) -> Architecture:
    """Return an architecture; MoecError for one that kernels are not compiled for."""
    if name not in ARCHITECTURES:
        raise MoecError(f"no kernels are compiled for {name}", todo=f"it knows {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def nearest_architecture(name: str) -> Architecture:
    """Return an architecture, for one that is not listed the row that it is most alike: that of its vendor's oldest."""
    oldest = ARCHITECTURES["gfx942" if name.startswith("gfx") else "sm_89"]
    return ARCHITECTURES.get(name) or replace(oldest, name=name)
