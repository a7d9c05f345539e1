"""What the driver does with a calibration text: a plan for `--quantize auto`, and weights that know their inputs."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MoecError
from ..frontends.load import Loaded
from ..ir.module import Module
from ..weights.heap import returning_freed_memory
from .options import ROLES
from .plan import KEEP, Budget, Plan

if TYPE_CHECKING:
    from ...targets import Target
    from ..formats.format import Format
    from ..ir.module import Op
    from ..rewrite.declare import PassDef
    from ..weights.sources.source import WeightSource

_LOWERED = "the program is already lowered"


def plan_under_budget(
    budget: Budget, method: str, loaded: Loaded, module: Module, quantize: PassDef, target: Target,
    file: Path | str | None, limit: int,
) -> Plan:  # fmt: skip
    """Return the plan of `--quantize auto`: formats under a budget, by what they cost on the calibration text `file`.

    Without one they are judged on tokens drawn at random. `module` is what is to be quantized, `quantize` the pass that
    does it, and `limit` are the bytes to work in.
    """
    text = None if file is None else _calibration_text(loaded, file)
    if module.stage != "moe":
        raise MoecError(f"{_LOWERED}: its formats are fixed", todo="enter at stage moe or earlier")
    from .sensitivity import make_plan

    def store(module: Module, layers: str) -> Module:
        return quantize(module, target, **dict.fromkeys(ROLES, KEEP), layers=layers)

    def obstacle(op: Op, format: Format) -> str | None:
        return target.formats.holds(op, format) or target.formats.slow(op, format)

    with returning_freed_memory():
        return make_plan(module, loaded.need_weights(), text, budget, method, store, obstacle, limit)


def calibrate_weights(
    loaded: Loaded, module: Module | None, file: Path | str | None, out: Path, limit: int, divided: WeightSource | None = None,
) -> tuple[Loaded, dict[str, Any]]:  # fmt: skip
    """Return the source with weights that know their inputs on a text, and what there is to report of it.

    `module` is the one that is to be lowered; None if it is lowered already. `limit` are the bytes to work in. `divided` is the
    source with workers, which fit factors.
    """
    from ..weights.awq import fit_awq_factors
    from ..weights.calibrated import Calibrated
    from .calibrate import collect_inputs, windows_of

    if module is None:
        raise MoecError(f"{_LOWERED}, and its weights want a calibration", todo="enter at stage moe or earlier")
    if file is None:
        why = "the method looks at what weights are multiplied with"
        raise MoecError(f"there is no calibration text: {why}", todo="name a text file: --calibration FILE")
    text = _calibration_text(loaded, file)
    weights = loaded.need_weights()
    out.parent.mkdir(parents=True, exist_ok=True)
    found = collect_inputs(module, weights, windows_of(text, module), out.parent, limit)
    fitted = fit_awq_factors(module, divided or weights, found.inputs)
    source = Calibrated(weights, found.inputs, fitted, limit // 4)
    return replace(loaded, weights=source), {"text": text.sha256, **found.to_dict()}


def _calibration_text(loaded: Loaded, file: Path | str) -> Any:
    """Return the calibration text as tokens."""
    from .calibrate import CalibrationText

    if loaded.folder is not None or not loaded.brought:
        return CalibrationText.read(Path(file), loaded.folder)
    with tempfile.TemporaryDirectory() as folder:  # of a live model
        for name, content in loaded.brought.items():
            Path(folder, name).write_bytes(content)
        return CalibrationText.read(Path(file), Path(folder))
