"""A predicted step as plain data, for `moec inspect --target`."""

from __future__ import annotations

from typing import Any

from ....compiler.ir.dims import evaluate
from ....compiler.ir.module import Module
from ....compiler.ops.define import any_size_text
from ..chip.chip import Profile
from ..predict.assumed import MEANING, assumed_of
from ..predict.roofline import Rates, Row, StepPrediction
from ..predict.work import MATRIX, VECTOR, call_counts, state_bytes, weight_bytes
from .step import predict_step


def predicted_step(
    module: Module, profile: Profile, *, batch: int = 1, new: int = 1, past: int = 0, devices: int = 1
) -> dict[str, Any]:
    """Return the prediction for a step of a module: bytes, FLOPs and seconds of one device, in all and by op.

    Keys: target, variant, batch, new, past, devices; time, tokens_per_second, bandwidth_share; bytes, flops, formulas;
    roofs; memory (what a device has to hold, and its capacity); parts (seconds if nothing overlapped); functions; assumed.
    Raises MoecError as `predict_step`.
    """
    step = predict_step(module, profile, batch=batch, new=new, past=past, devices=devices)
    return {
        "target": profile.name,
        "variant": profile.variant,
        **{"batch": batch, "new": new, "past": past, "devices": devices},
        "time": step.time,
        "tokens_per_second": step.tokens_per_second,
        "bandwidth_share": step.bandwidth_share,
        **_amounts_entry(step.total),
        "formulas": {
            "bytes": {name: any_size_text(formula) for name, formula in step.table.bytes.items()},
            "flops": {name: any_size_text(formula) for name, formula in step.table.flops.items()},
        },
        "roofs": _roof_entries(profile),
        "memory": _memory_entry(module, profile, batch, past + new, devices),
        "functions": _function_entries(module, step),
        "assumed": assumption_lines(profile, devices),
    }


def _amounts_entry(row: Row) -> dict[str, Any]:
    return {
        "bytes": {"weights": round(row.weights), "states": round(row.states), "activations": round(row.activations)},
        "device_bytes": round(row.device_bytes),
        "flops": {unit: round(flops) for unit, flops in row.flops.items()},
        "parts": dict(row.parts),
        "bound": row.bound,
    }


def _roof_entries(profile: Profile) -> dict[str, list[float]]:
    """Return the roofs of a chip as (FLOP/s, bytes/s) that long products and copies reach, by what computes."""
    rates = Rates.of(profile)
    return {MATRIX: [rates.matrix, rates.memory], VECTOR: [rates.vector, rates.memory]}


def _memory_entry(module: Module, profile: Profile, batch: int, past: int, devices: int) -> dict[str, Any]:
    """Return the bytes that one device holds after a step, and whether it has as many; None where that is unknown."""
    capacity = profile.memories[0].capacity
    dims = {d.name: max(1, d.low) for d in module.dims} | {"B": batch, "S": 1, "P": past}
    weights, states = weight_bytes(module, devices), evaluate(state_bytes(module), dims)
    return {
        "weights": weights,
        "states": states,
        "capacity": None if capacity is None else int(capacity.value),
        "fits": None if capacity is None else weights + states <= capacity.value,
    }


def _function_entries(module: Module, step: StepPrediction) -> list[dict[str, Any]]:
    """Return every function with its ops, equal ones together, those of its callees apart."""
    calls = call_counts(module)
    ops: dict[str, list[dict[str, Any]]] = {}
    for row in step.grouped("function", "op"):
        ops.setdefault(row.function, []).append({"op": row.op, **_timed_entry(row, step)})
    return [
        {"function": row.function, "calls": calls[row.function], **_timed_entry(row, step), "ops": ops[row.function]}
        for row in step.grouped("function")
    ]


def assumption_lines(profile: Profile, devices: int) -> list[str]:
    """Return what a prediction takes as given beside the profile, in words."""
    lines = [f"{name} = {value:g} ({MEANING[name]})" for name, value in assumed_of(profile).items()]
    lines += [
        "kernels run one after the other, each with its launch, tuned for this number of tokens",
        "ops without a kernel take what a good one would",
        f"states and activations are {MATRIX} between kernels",
        "routing is balanced",
    ]
    if devices > 1:
        lines.append(
            f"experts are spread over {devices} devices, the rest is on each of them; what they exchange is not counted"
        )
    return lines


def _timed_entry(row: Row, step: StepPrediction) -> dict[str, Any]:
    return {"kernels": row.kernels, **_amounts_entry(row), "time": row.time, "share": row.time / step.time}
