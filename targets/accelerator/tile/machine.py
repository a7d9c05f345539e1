"""From a chip's profile to what kernels need of it: which memories tiles pass, what fits there, how fast it is."""

from __future__ import annotations

from ....compiler.errors import MoecError
from ..chip.chip import Profile
from .builder import Layout
from .simulate import Chip
from .tiles import DEVICE

# rows of sums from which a chip's memory and unit for tall tiles are used; below, sums lie in registers
TALL_ROWS = 64


def layout_of(profile: Profile, rows: int = 128) -> Layout:
    """Return the memories that tiles pass on a chip, for matrix tiles of `rows` rows."""
    f = profile.family
    tall = rows >= TALL_ROWS and any(m.name == f.tall_sums for m in profile.memories)
    sums = f.tall_sums if tall else f.sums
    leave = () if sums == f.vector else (f.vector,) if (sums, f.vector) in profile.moves else (DEVICE, f.vector)
    enter = () if f.vector == f.left[0] or (f.vector, f.left[0]) in profile.moves else (DEVICE,)
    return Layout(f.left, f.right, sums, f.vector, leave, enter)


def chip_of(profile: Profile, layout: Layout) -> Chip:
    """Return what the simulator checks: bytes, alignment and paths. MoecError for a capacity that is not known."""
    outer = {m.name for m in profile.memories if m.per == "device"}
    capacity = {m.name: int(profile.need(f"memory.{m.name}.usable")) for m in profile.memories if m.name not in outer}
    device = profile.memories[0]
    capacity[DEVICE] = int(device.capacity.value) if device.capacity else 1 << 62
    paths = set()
    for source, target in profile.moves:
        paths.add((DEVICE if source in outer else source, DEVICE if target in outer else target))
    align = {m.name: m.align for m in profile.memories if m.name not in outer}
    return Chip(capacity, align, frozenset(paths), layout.operands)


def core_count(profile: Profile) -> int:
    """Return the cores that the points of a grid are spread over."""
    return int(profile.need("cores"))


def device_memory(profile: Profile) -> str:
    """Return the name of the chip's outermost memory."""
    if not profile.memories:
        raise MoecError(f"{profile.name} names no memory", todo="add [memory.dram]")
    return profile.memories[0].name
