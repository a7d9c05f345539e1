"""From a chip's profile to what kernels need of it: which memories tiles pass, what fits there, how fast it is."""

from __future__ import annotations

from ....compiler.errors import MoecError
from ..chip.chip import Profile
from .builder import Layout
from .simulate import Chip
from .tiles import DEVICE

# rows from which the matrix unit with an accumulator memory of its own is used; below, its results lie in registers
TENSOR_ROWS = 64


def layout_of(profile: Profile, rows: int = 128) -> Layout:
    """Return the memories that tiles pass on a chip, for matrix tiles of `rows` rows."""
    if profile.family == "ascend":
        leave = ("ub",) if ("l0c", "ub") in profile.moves else (DEVICE, "ub")
        enter = () if ("ub", "l1") in profile.moves else (DEVICE,)
        return Layout(("l1", "l0a"), ("l1", "l0b"), "l0c", "ub", leave, enter)
    if profile.family == "cambricon":
        return Layout(("nram",), ("wram",), "nram", "nram")
    shared = "lds" if profile.family == "amd" else "shared"
    if rows >= TENSOR_ROWS and any(m.name == "tensor" for m in profile.memories):
        return Layout((shared,), (shared,), "tensor", "registers", ("registers",))
    return Layout((shared,), (shared,), "registers", "registers")


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
