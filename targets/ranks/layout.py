"""The part of a plan that divides weights: degrees, the experts of each device, formats by role; read from plan.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compiler.errors import MoecError
from ...compiler.errors.json_files import Shape, find_misfit, read_json
from ..serving.experts import Placement, check_placement, place_in_order
from ..serving.storage import PLAIN, ROLES

SHAPE: Shape = {
    "degrees": {"tp": int, "attention_dp": int, "ep": int, "moe_tp": int, "pp": int},
    "formats": {None: str},
    "experts": ({"experts": int, "ranks": int, "copies": int, "physical_to_logical": ([[int]], None)}, None),
    "offload": (dict, None),
}  # fmt: skip
MADE_BY = "make one: moec plan SOURCE --on SYSTEM -o plan.json"


@dataclass(frozen=True)
class Layout:
    """How a model is divided over the devices of one instance.

    Device r of a stage has the part r % tp of attention and copy r // tp of it, and the experts of rank r // moe_tp, of whose rows
    it has the part r % moe_tp.
    """

    tp: int
    dp: int
    ep: int
    pp: int
    entry: Mapping[str, Any] | None  # of the experts' placement, as the plan has it
    where: str

    @property
    def group(self) -> int:
        """Devices of a stage."""
        return self.tp * self.dp

    @property
    def moe_tp(self) -> int:
        """Devices that share an expert."""
        return self.group // self.ep

    def stage_of(self, block: int, blocks: int) -> int:
        """Return the pipeline stage of a layer."""
        return block * self.pp // blocks

    def place(self, layers: int, experts: int) -> Placement:
        """Return the experts of each device; MoecError where the plan is of another model."""
        if self.entry is None or self.entry["physical_to_logical"] is None:
            if experts % self.ep:
                raise MoecError(
                    f"{experts} experts do not divide over {self.ep} expert-parallel ranks",
                    where=self.where,
                    todo=MADE_BY,
                )
            return place_in_order(layers, experts, self.ep)
        return check_placement(self.entry, layers, experts, self.ep, self.where)


def read_plan_file(path: Path) -> dict[str, Any]:
    """Return the content of a plan.json; MoecError for a file that is no plan."""
    found = read_json(path)
    if (place := find_misfit(found, SHAPE)) is not None:
        raise MoecError(
            f"{path.name} is no plan of moec: {place} is missing or of another kind", str(path), todo=MADE_BY
        )
    return found


def read_layout(path: Path) -> Layout:
    """Return how a plan divides a model; MoecError for one that cannot be followed."""
    plan, where = read_plan_file(path), str(path)
    degrees = plan["degrees"]
    layout = Layout(degrees["tp"], degrees["attention_dp"], degrees["ep"], degrees["pp"], plan["experts"], where)
    if min(layout.tp, layout.dp, layout.ep, layout.pp) < 1 or layout.group % layout.ep:
        raise MoecError(f"its degrees {dict(degrees)} do not go together", where, todo=MADE_BY)
    if plan["offload"]:
        raise MoecError(
            "the plan leaves experts in host memory or on disk, which shards of devices do not have", where,
            todo="plan with more devices or fewer bits (--weights int4); llama.cpp takes such a plan: moec plan --export DIR",
        )  # fmt: skip
    return layout


def target_of_plan(
    path: Path, options: Mapping[str, str] | None, quantize: str | None
) -> tuple[str, Mapping[str, str], str | None]:
    """Return target, options and formats of the shards of a plan; a format that is asked for goes before the plan's."""
    return "ranks", {**(options or {}), "plan": str(path)}, quantize or quantize_text(path)


def quantize_text(path: Path) -> str | None:
    """Return what `--quantize` says for the formats of a plan; None where the checkpoint's are kept."""
    formats = read_plan_file(path)["formats"]
    kept = {role: "f32" if formats.get(role, "f32") in PLAIN else formats[role] for role in ROLES}
    return ",".join(f"{role}={name}" for role, name in kept.items()) if formats else None
