"""A predicted step as plain data, for `moec inspect --target`."""

from __future__ import annotations

from typing import Any

from ....compiler.ir.dims import evaluate
from ....compiler.ir.module import Module
from ....compiler.ops.define import free
from ..chip.chip import Profile
from .roofline import Roofline, Row, StepPrediction, module_roofline
from .work import call_counts, state_bytes


def predicted(
    module: Module, profile: Profile, *, batch: int = 1, new: int = 1, past: int = 0, devices: int = 1
) -> dict[str, Any]:
    """Return the prediction for a step of a module: bytes, FLOPs and seconds of one device, in all and by op.

    Keys: target, variant, batch, new, past, devices; time, tokens_per_second, bandwidth_share; bytes, flops, formulas;
    memory (what a device has to hold, and its capacity); parts (seconds if nothing overlapped); functions; assumed.
    Raises MoecError as `module_roofline` and `Roofline.at`.
    """
    roofline = module_roofline(module, profile, devices=devices)
    step = roofline.at(batch=batch, new=new, past=past)
    return {
        "target": profile.name,
        "variant": profile.variant,
        **{"batch": batch, "new": new, "past": past, "devices": devices},
        "time": step.time,
        "tokens_per_second": step.tokens_per_second,
        "bandwidth_share": step.bandwidth_share,
        **_amounts(step.total),
        "formulas": {
            "bytes": {name: free(formula) for name, formula in roofline.bytes.items()},
            "flops": {name: free(formula) for name, formula in roofline.flops.items()},
        },
        "memory": _memory(roofline, batch, past + new),
        "functions": _functions(roofline, step),
        "assumed": roofline.assumptions(),
    }


def _amounts(row: Row) -> dict[str, Any]:
    return {
        "bytes": {"weights": round(row.weights), "states": round(row.states), "activations": round(row.activations)},
        "device_bytes": round(row.device_bytes),
        "flops": {unit: round(flops) for unit, flops in row.flops.items()},
        "parts": dict(row.parts),
        "bound": row.bound,
    }


def _memory(roofline: Roofline, batch: int, past: int) -> dict[str, Any]:
    """Return the bytes that one device holds after a step, and whether it has as many; None where that is unknown."""
    capacity = roofline.profile.memories[0].capacity
    dims = {d.name: max(1, d.low) for d in roofline.module.dims} | {"B": batch, "S": 1, "P": past}
    held = roofline.weights + evaluate(state_bytes(roofline.module), dims)
    return {
        "weights": roofline.weights,
        "states": held - roofline.weights,
        "capacity": None if capacity is None else int(capacity.value),
        "fits": None if capacity is None else held <= capacity.value,
    }


def _functions(roofline: Roofline, step: StepPrediction) -> list[dict[str, Any]]:
    """Return every function with its ops, equal ones together, those of its callees apart."""
    calls = call_counts(roofline.module)
    ops: dict[str, list[dict[str, Any]]] = {}
    for row in step.grouped("function", "op"):
        ops.setdefault(row.function, []).append({"op": row.op, **_timed(row, step)})
    return [
        {"function": row.function, "calls": calls[row.function], **_timed(row, step), "ops": ops[row.function]}
        for row in step.grouped("function")
    ]


def _timed(row: Row, step: StepPrediction) -> dict[str, Any]:
    return {"kernels": row.kernels, **_amounts(row), "time": row.time, "share": row.time / step.time}
