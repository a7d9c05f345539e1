"""The families of chips, each a row of data: what kernels have to know of a programming model beside a chip's figures.

A package outside of moec brings a family through the entry points `moec.families`, and chips of it through `moec.chips`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....compiler.errors import MoecError
from ....compiler.errors.plugins import FAMILIES as BROUGHT
from ....compiler.errors.plugins import entry_points_of, load_brought, refuse_names


@dataclass(frozen=True)
class Family:
    """What the chips of one programming model have in common. Memories are named as in the profiles' `memory` tables.

    `left` and `right`: the memories that an operand of the matrix unit passes, from the first that it is loaded into to
    where the unit reads it. `sums`: where the unit adds; `tall_sums`: where it adds for many rows, on chips that have such
    a memory. `vector`: where everything else is computed. `stages` and `warps`: the numbers of buffers of a loop's loads
    and of warps that the search tries; one stage is tried where these do not fit. `resident`: most points of a grid that
    share a core, `resident_threads`: most threads of these. `vector_matmuls`: operand types that the vector units multiply
    as matrices where the matrix unit does not. `device`: the device of torch that runs kernels; the simulator runs all.
    `library`: of which library kernels.json names calls (artifact/library.py).
    """

    name: str
    left: tuple[str, ...]
    right: tuple[str, ...]
    sums: str
    vector: str
    tall_sums: str = ""
    stages: tuple[int, ...] = (2,)  # copies in turns, for chips that move tiles by commands of their own
    warps: tuple[int, ...] = (1,)
    resident: int = 1
    resident_threads: int = 1
    vector_matmuls: tuple[str, ...] = ()
    has_vector_cores: bool = False  # apart from the matrix unit's cores: a profile counts them by themselves
    device: str | None = None
    library: str = ""


def _gpu_family(name: str, shared: str, stages: tuple[int, ...], tall_sums: str = "") -> Family:
    return Family(
        name, (shared,), (shared,), "registers", "registers", tall_sums, stages=stages, warps=(4, 8), resident=16,
        resident_threads=2048, vector_matmuls=("f32",), device="cuda",
    )  # fmt: skip


FAMILIES = {
    family.name: family
    for family in (
        _gpu_family("nvidia", "shared", (2, 3, 4), "tensor"),
        _gpu_family("amd", "lds", (2, 3)),  # with 4 Triton takes another schedule, of two buffers
        Family("ascend", ("l1", "l0a"), ("l1", "l0b"), "l0c", "ub", has_vector_cores=True, library="torch_npu"),
        Family("cambricon", ("nram",), ("wram",), "nram", "nram"),
    )
}


def family_names() -> list[str]:
    """Return the names of the families that moec has, and of those that packages outside of it bring."""
    refuse_names(BROUGHT, set(FAMILIES))
    return [*FAMILIES, *entry_points_of(BROUGHT)]


def find_family(name: str) -> Family:
    """Return a family by name, that of a package too; MoecError if there is none."""
    found = FAMILIES.get(name) or load_brought(BROUGHT, name, Family, "a Family of chip/families.py")
    if found is None:
        raise MoecError(f"there is no family of chips {name!r}", todo=f"there are {', '.join(family_names())}")
    return found
