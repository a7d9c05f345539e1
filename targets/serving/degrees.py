"""How a model is divided: degrees of tensor, expert, data and pipeline parallelism, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...compiler.errors import MoecError
from ..systems.system import System
from .workload import Workload

WIDEST, BROADEST, DEEPEST = 512, 16, 8  # devices of a group, of tensor parallelism and stages that are tried unasked


@dataclass(frozen=True)
class Degrees:
    """One instance of the model: attention is divided over `tp` devices and copied `dp` times, experts over `tp dp`, layers over `pp`.

    `ep` devices hold different experts, each of which is divided over `moe_tp` devices: ep moe_tp = tp dp.
    """

    tp: int = 1
    dp: int = 1
    ep: int = 1
    pp: int = 1

    @property
    def group(self) -> int:
        """Devices that compute a layer together."""
        return self.tp * self.dp

    @property
    def devices(self) -> int:
        """Devices of one instance."""
        return self.group * self.pp

    @property
    def moe_tp(self) -> int:
        """Devices that share an expert."""
        return self.group // self.ep

    def entry(self) -> dict[str, int]:
        """Return the degrees as plain data."""
        return {"tp": self.tp, "attention_dp": self.dp, "ep": self.ep, "moe_tp": self.moe_tp, "pp": self.pp}

    def options(self) -> str:
        """Return the degrees as options to type."""
        return f"--tp {self.tp} --attention-dp {self.dp} --ep {self.ep} --pp {self.pp}"


def why_impossible(degrees: Degrees, workload: Workload, system: System) -> str | None:
    """Return what forbids to divide a model so on a system, None if nothing does."""
    experts = {e.count for layer in workload.layers for e in layer.experts}
    inner = {e.inner for layer in workload.layers for e in layer.experts}
    if degrees.group % degrees.ep:
        return f"{degrees.ep} expert-parallel ranks do not divide the {degrees.group} devices of tp {degrees.tp} and attention-dp {degrees.dp}"
    if not experts and degrees.ep > 1:
        return "the model has no routed experts to divide"
    if bad := next((n for n in experts if n % degrees.ep), None):
        return f"{bad} experts do not divide over {degrees.ep} expert-parallel ranks"
    if bad := next((n for n in inner if n % degrees.moe_tp), None):
        return f"an expert's {bad} inner rows do not divide over {degrees.moe_tp} devices"
    if workload.heads and workload.heads % degrees.tp:
        return f"{workload.heads} attention heads do not divide over tp {degrees.tp}"
    if degrees.pp > max(workload.blocks, 1):
        return f"{workload.blocks} layers do not make {degrees.pp} pipeline stages"
    if degrees.devices > system.devices:
        return f"tp {degrees.tp}, attention-dp {degrees.dp} and pp {degrees.pp} take {degrees.devices} devices, {system.name} has {system.devices}"
    if system.devices % degrees.devices:
        return f"instances of {degrees.devices} devices do not divide {system.devices} devices"
    return None


def possible_degrees(workload: Workload, system: System, given: dict[str, int]) -> Iterator[Degrees]:
    """Yield the degrees that a system could use, those that are `given` (tp, dp, ep, pp) fixed."""
    sizes = [n for n in range(1, min(system.devices, WIDEST) + 1) if system.devices % n == 0]

    def choices(name: str, most: int) -> list[int]:
        return [given[name]] if name in given else [n for n in sizes if n <= most]

    for pp in choices("pp", DEEPEST):
        for tp in choices("tp", BROADEST):
            for dp in choices("dp", WIDEST // tp):
                # experts divided whole or by rows: what lies between the two is for those who ask
                for ep in [given["ep"]] if "ep" in given else sorted({1, tp * dp}):
                    found = Degrees(tp, dp, ep, pp)
                    if why_impossible(found, workload, system) is None:
                        yield found


def check_degrees(degrees: Degrees, workload: Workload, system: System) -> None:
    """Raise MoecError for degrees that cannot be, with the nearest ones that can."""
    reason = why_impossible(degrees, workload, system)
    if reason is None:
        return
    others = [*possible_degrees(workload, system, {})]

    def distance(other: Degrees) -> float:
        pairs = zip(
            (degrees.tp, degrees.dp, degrees.ep, degrees.pp), (other.tp, other.dp, other.ep, other.pp), strict=True
        )
        return sum(max(a, b) / min(a, b) for a, b in pairs)

    todo = f"the nearest that works: {min(others, key=distance).options()}" if others else ""
    raise MoecError(reason, where=degrees.options(), todo=todo)
