"""Assumptions of predictions where no source has a figure, and the rates that follow from them and a profile.

Predictions of a kernel's tile program (predict.py) and of whole modules (roofline.py) stand on the same table.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..chip.chip import Link, Profile
from ..tile.machine import device_memory

ASSUMED: Mapping[str, float] = {
    "launch": 3e-6,
    "latency": 8e-7,
    "memory_reached": 0.92,
    "matrix_reached": 0.8,
    "vector_reached": 0.5,
    "warp_matrix": 0.6,
    "cache_times": 2.0,
    "step": 1.5e-7,
    "point": 5e-7,
    "intensity": 32.0,
    "vector_share": 0.03,
    "link_latency": 2e-6,
}
MEANING: Mapping[str, str] = {
    "launch": "s, of a kernel, where the profile does not say",
    "latency": "s, from asking device memory to having it",
    "memory_reached": "share of the bandwidth that a long copy reaches",
    "matrix_reached": "share of the matrix peak that a large product reaches",
    "vector_reached": "share of the vector peak, which counts a multiply and an add as two",
    "warp_matrix": "share of the peak for tiles too small for the instructions that reach it",
    "cache_times": "bandwidth of the cache behind device memory where unknown, in times that of device memory",
    "step": "s, that one turn of a loop that loads takes at least",
    "point": "s, of beginning and ending one point of a grid",
    "vector_share": "vector peak where the profile has none, in shares of the matrix peak: less than any known chip has",
    "link_latency": "s, from sending to another device until the first bytes arrive, where the profile does not say",
    "intensity": "m n / (m + n) of a tile from which its operands come from shared memory fast enough",
}


def launch_time(profile: Profile) -> float:
    """Return the seconds of a launch."""
    return profile.launch.value if profile.launch else ASSUMED["launch"]


def memory_rate(profile: Profile) -> float:
    """Return bytes/s from device memory that a long copy reaches; MoecError for an unknown bandwidth."""
    return profile.need(f"memory.{device_memory(profile)}.bandwidth") * ASSUMED["memory_reached"]


def cache_bandwidth(profile: Profile, device: float) -> float:
    """Return bytes/s of the cache before device memory, from where numbers are read again; `device` is that memory's."""
    shared = [m for m in profile.memories if m.per == "device"][1:]
    known = [m.bandwidth.value for m in reversed(shared) if m.bandwidth]
    return known[0] if known else device * (ASSUMED["cache_times"] if shared else 1.0)


def has_matmul(profile: Profile, dtype: str) -> bool:
    """Return whether a chip has products of matrices of a dtype; those of f32 need no matrix unit on a GPU."""
    return profile.unit(dtype) is not None or (
        dtype in profile.family.vector_matmuls and profile.vector_peak is not None
    )


def matrix_rate(profile: Profile, dtype: str) -> float:
    """Return FLOP/s that a large product reaches; MoecError for an unknown peak."""
    if profile.unit(dtype) is None and has_matmul(profile, dtype):
        return profile.need("vector_peak") * ASSUMED["matrix_reached"]
    return profile.need(f"unit.{dtype}.peak") * ASSUMED["matrix_reached"]


def vector_rate(profile: Profile) -> float:
    """Return FLOP/s outside of the matrix unit; an unknown peak is assumed, MoecError where that of matrices is unknown too."""
    if profile.vector_peak is None:
        return profile.need("unit.bf16.peak") * ASSUMED["vector_share"] * ASSUMED["vector_reached"]
    return profile.vector_peak.value * ASSUMED["vector_reached"]


def link_latency(link: Link) -> float:
    """Return the seconds until what is sent over a link begins to arrive."""
    return link.latency.value if link.latency else ASSUMED["link_latency"]


def assumed_of(profile: Profile) -> dict[str, float]:
    """Return the assumptions that predictions for a chip stand on: those that its profile has no figure for."""
    known = {"launch": profile.launch, "vector_share": profile.vector_peak}
    return {name: value for name, value in ASSUMED.items() if known.get(name) is None}
