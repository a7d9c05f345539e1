"""Predicts a step of a whole module on a chip: each op takes the kernels that `moec compile` chooses for so many tokens.

What no kernel computes takes what roofline.py says. Nothing is emitted: kernels.json holds the same predictions for its
buckets (artifact/spec.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....compiler.errors import MoecError
from ....compiler.ir.module import Module
from ..chip.chip import Profile
from ..predict.predict import Prediction
from ..predict.roofline import Rates, StepPrediction, framework_row, kernel_row
from ..predict.work import WorkTable, module_work, place_of
from .choose import computation_of, fastest_kernels, weight_layouts
from .experts import part_of_experts
from .implementations import Tokens


def predict_step(
    module: Module, profile: Profile, *, batch: int = 1, new: int = 1, past: int = 0, devices: int = 1
) -> StepPrediction:
    """Return the prediction of a step of a module of stage kernel, on one of `devices` devices that share the experts.

    MoecError for an op that is not lowered, for a figure of the chip that is needed and unknown, where nothing fits the
    chip, and for sizes that the program does not take.
    """
    if devices < 1:
        raise MoecError(f"devices = {devices}: at least 1 is possible")
    for d in module.dims:
        given = {"B": batch, "S": new, "P": past}.get(d.name, d.high)
        if not d.low <= given <= d.high:
            raise MoecError(f"{d.name} = {given} is outside the program's {d.low}..{d.high}")
    rates = Rates.of(profile)
    found = _kernel_predictions(module, profile, Tokens(batch, new, past), devices)
    table = WorkTable(module, tuple(module_work(module, devices)))
    rows = [
        kernel_row(work, amounts, found[work.place]) if work.place in found else framework_row(work, amounts, rates)
        for work, amounts in zip(table.works, table.at(batch, new, past), strict=True)
    ]
    return StepPrediction(batch, new, past, tuple(rows), rates.peak_memory, table)


def _kernel_predictions(
    module: Module, profile: Profile, tokens: Tokens, devices: int
) -> Mapping[str, list[Prediction]]:
    """Return the predictions of each op's kernels, by its place; ops that the framework computes are left out."""
    stored = weight_layouts(module, profile)
    known: dict[tuple[str, Any], list[Prediction]] = {}
    places: dict[str, list[Prediction]] = {}
    for function in module.functions:
        for op in function.ops:
            computation = None if op.callee else computation_of(op, function, stored, profile)
            if computation is None:
                continue
            computation = part_of_experts(computation, devices)
            key = computation.kind, computation.problem
            if key not in known:
                kernels = fastest_kernels(computation, tokens, profile, {})
                known[key] = [found.best.prediction for _, found in kernels]
            places[place_of(function, op)] = known[key]
    return places
