"""Experts that lie beside the devices: in host memory, and on disk where that is full too.

Everything else is read for every token and stays with the devices. Which experts a token takes is not known before, so that
with balanced routing each place is read as often as it holds experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..systems.system import System
from .degrees import Degrees
from .demand import Demand
from .memory import Memory
from .storage import Storage
from .workload import Workload

SYSTEM_SHARE = 0.9  # of host memory that a model can have: general knowledge
HOST_REACHED = 0.7  # share of a host's bandwidth that its cores reach with experts of few rows: general knowledge
HANDOVER = 1e-4  # s, that a layer's rows take to the host and back, and the host to begin: general knowledge


@dataclass(frozen=True)
class Offload:
    """The shares of the routed experts that lie in each place, their bytes of one instance, and the sequences that leave room for none."""

    device: float
    host: float
    disk: float
    bytes: int
    largest_batch: int

    def entry(self) -> dict[str, float]:
        """Return the shares as plain data."""
        return {"device": self.device, "host": self.host, "disk": self.disk, "expert_bytes": self.bytes}


def place_experts(
    workload: Workload, system: System, degrees: Degrees, storage: Storage, memory: Memory
) -> Offload | None:
    """Return where the experts lie that a device has no room for; None where all else does not fit either, or no place is left."""
    bits = storage.roles["experts"].bits
    whole = int(sum(n.calls * e.count * e.elements for n in workload.layers for e in n.experts) * bits / 8)
    here = whole // degrees.devices  # of one device
    room = memory.free + here
    if not whole or room < 0:
        return None
    device = min(1.0, room / here)
    host = 0.0
    if system.host:
        held = system.host.memory.value * SYSTEM_SHARE / system.host.devices * degrees.devices
        host = min(1 - device, held / whole)
    disk = max(0.0, 1 - device - host)
    if disk and system.storage is None:
        return None
    largest = replace(memory, weights=memory.weights - here).largest_batch
    return Offload(device, host, disk, whole, largest)


def offloaded_decode(decode: Demand, workload: Workload, system: System, degrees: Degrees, placed: Offload) -> Demand:
    """Return a decoding step's demand: the host computes with its experts, those on disk are read first."""
    bandwidth = system.device.bandwidth.value
    slower = placed.device
    if placed.host and system.host:
        slower += placed.host * bandwidth * degrees.devices / _host_rate(system, degrees, system.host.bandwidth.value)
    if placed.disk and system.storage:
        slower += placed.disk * bandwidth * degrees.devices / system.storage.value
    added = workload.expert_blocks * HANDOVER if placed.host else 0.0
    return replace(decode, expert_read=decode.expert_read * slower, latency=decode.latency + added)


def offloaded_prompt(prompt: Demand, system: System, degrees: Degrees, placed: Offload) -> Demand:
    """Return a prompt's demand: the experts that lie elsewhere are brought to the devices, layer by layer."""
    bandwidth = system.device.bandwidth.value
    slower = placed.device
    if placed.host and system.host:
        link = system.host.link.value * degrees.devices if system.host.link else system.host.bandwidth.value
        rate = min(link, _host_rate(system, degrees, system.host.bandwidth.value))
        slower += placed.host * bandwidth * degrees.devices / rate
    if placed.disk and system.storage:
        slower += placed.disk * bandwidth * degrees.devices / system.storage.value
    return replace(prompt, expert_read=prompt.expert_read * slower)


def _host_rate(system: System, degrees: Degrees, rate: float) -> float:
    """Return the bandwidth of the hosts that an instance has."""
    shared = system.host.devices if system.host else 1
    return HOST_REACHED * rate * max(1.0, degrees.devices / shared)
