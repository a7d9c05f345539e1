"""What a system is: devices of one kind, the fabrics that join them, and the host and storage that they share.

Figures are in SI units and have a grade and a source, as those of chips (`accelerator/chip`). Bandwidths are one-way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...compiler.errors import MoecError
from ..accelerator.chip.chip import Figure

SHAPES = ("switch", "mesh", "line")


@dataclass(frozen=True, eq=False)  # by identity: a system has one, and is a key of tables
class Device:
    """What a plan asks of one device: its memory, that memory's bandwidth, and dense peaks by type of operands."""

    name: str
    memory: Figure
    bandwidth: Figure
    peaks: Mapping[str, Figure]  # bf16, f8e4m3, mxfp4, i8

    def peak(self, dtype: str) -> float:
        """Return FLOP/s of products of a type; a type that the device lacks is computed in the next wider one."""
        wider = {"mxfp4": "f8e4m3", "f8e4m3": "bf16", "i8": "bf16"}
        figure = self.peaks.get(dtype)
        if figure is not None:
            return figure.value
        if dtype not in wider:
            raise MoecError(f"the peak of {self.name} in {dtype} is unknown", todo="give it: [device] peak.bf16")
        return self.peak(wider[dtype])


@dataclass(frozen=True)
class Fabric:
    """Links of one kind: every `span` neighbouring devices are joined by a switch, a full mesh or a line.

    `bandwidth` is that of a device's port; of a mesh or a line, that of the link between two devices.
    """

    name: str
    shape: str
    span: int
    bandwidth: Figure
    latency: Figure


@dataclass(frozen=True)
class Host:
    """Memory beside the devices; `link` is the bandwidth from it to each device, `devices` how many share one host."""

    memory: Figure
    bandwidth: Figure
    link: Figure | None
    devices: int


@dataclass(frozen=True)
class System:
    """A system; `unified` says that the devices' memory is the host's too."""

    name: str
    doc: str
    device: Device
    devices: int
    fabrics: tuple[Fabric, ...]
    host: Host | None = None
    storage: Figure | None = None  # bytes/s of reading
    unified: bool = False
    cards: str = ""  # the profile of the device, where it has one
    power: Figure | None = None  # W of one device at work, with its share of the rack where that is what is known

    @property
    def memory(self) -> float:
        """Bytes of all devices."""
        return self.devices * self.device.memory.value

    def of_devices(self, devices: int) -> System:
        """Return the part of the system with its first devices; MoecError if it has not so many."""
        if not 1 <= devices <= self.devices:
            raise MoecError(
                f"{self.name} has {self.devices} devices, not {devices}",
                todo=f"--on {self.name}:{self.devices}, or a file of your own with more",
            )
        return replace(self, devices=devices)

    def figures(self) -> dict[str, Figure]:
        """Return every figure by a dotted key."""
        found = {"device.memory": self.device.memory, "device.bandwidth": self.device.bandwidth}
        found |= {f"device.peak.{dtype}": figure for dtype, figure in self.device.peaks.items()}
        for fabric in self.fabrics:
            found |= {
                f"fabric.{fabric.name}.bandwidth": fabric.bandwidth,
                f"fabric.{fabric.name}.latency": fabric.latency,
            }
        if self.host:
            found |= {"host.memory": self.host.memory, "host.bandwidth": self.host.bandwidth}
            found |= {"host.link": self.host.link} if self.host.link else {}
        found |= {"power": self.power} if self.power else {}
        return found | ({"storage.bandwidth": self.storage} if self.storage else {})
