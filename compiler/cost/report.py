"""What a module costs, as plain data and as text: the figures of moec.json and of moec inspect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import sympy

from ..ir.dims import Size, size
from ..ir.types import TensorType
from .count import Cost, Costs
from .states import States

CONTEXT = 4096  # past tokens at which a decoded token is costed, unless the model allows fewer


def per_token(costs: Costs) -> dict[str, Any]:
    """Return a program's token-efficiency figures, all counted from the IR: what moec.json holds of them."""
    past = next((d.high for d in costs.module.dims if d.name == "P"), CONTEXT)
    return {"context": min(CONTEXT, past), **_cost_figures(costs, costs.total, min(CONTEXT, past))}


def left_out_of(tensors: Mapping[str, TensorType]) -> dict[str, Any]:
    """Return the names' first parts (behind `model`) and the bytes of tensors that a program does not read; nothing without any."""
    if not tensors:
        return {}
    names = sorted({re.sub(r"^((model\.)?[^.]*).*", r"\1.*", name) for name in tensors})
    return {"names": names, "tensors": len(tensors), "bytes": sum(int(t.bytes) for t in tensors.values())}


def _parameter_counts(cost: Cost) -> dict[str, int]:
    return {
        "total": cost.parameters,
        "experts": cost.expert_parameters,
        "embeddings": cost.table_parameters,
        "active": cost.active_parameters,
        "active_without_embeddings": cost.active_without_tables,
    }


def _per_token(costs: Costs, cost: Cost, context: int) -> dict[str, int]:
    """Return what decoding one token behind `context` others takes (batch 1)."""
    return {
        "flops": costs.at(cost.flops, context),
        "checkpoint_bytes_read": cost.stored_bytes_read,
        "compiled_bytes_read": cost.compiled_bytes_read,
        "state_bytes_read": costs.at(cost.state_bytes_read, context),
    }


def _state_figures(costs: Costs, cost: Cost, context: int) -> dict[str, int]:
    """Return what a sequence needs of states; `held_...` is what the program holds, tokens outside of all windows too."""
    each, fixed = costs.state_growth(cost.state_bytes_kept, context)
    held = costs.state_growth(cost.state_bytes, context)[0]
    return {
        "bytes_per_token": each, "fixed_bytes": fixed, "bytes": costs.at(cost.state_bytes_kept, context),
        "held_bytes_per_token": held, "held_bytes": costs.at(cost.state_bytes, context),
    }  # fmt: skip


def _bf16_per_token(costs: Costs, context: int) -> int:
    """Return the bytes that one more token adds to a sequence's states if they were stored in two bytes a number."""

    def size_of(type: TensorType) -> Size:
        return size(2) if type.dtype == "f32" else sympy.Rational(type.bits) / 8

    kept = States(costs.module, "reach").bytes(costs.module.main, False, size_of)
    return costs.state_growth(kept, context)[0]


def _cost_figures(costs: Costs, cost: Cost, context: int) -> dict[str, Any]:
    return {
        "parameters": _parameter_counts(cost),
        "bytes": {"checkpoint": cost.stored_bytes, "compiled": cost.compiled_bytes},
        "per_token": _per_token(costs, cost, context),
        "state": _state_figures(costs, cost, context),
    }


def count_text(number: int) -> str:
    """Return a count with four digits: `6.919 B`, `37.6 M`, `512`."""
    return _with_unit(number, "", " k", " M", " B", " T")


def bytes_text(number: int) -> str:
    """Return bytes in decimal units: `13.84 GB`."""
    return _with_unit(number, " B", " kB", " MB", " GB", " TB")


def flops_text(number: int) -> str:
    """Return floating-point operations: `2.36 GFLOP`."""
    return _with_unit(number, " FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP")


def _with_unit(number: int, *units: str) -> str:
    """Return a number in the largest of units a thousand apart that leaves a digit before the point."""
    power = 0
    while power < len(units) - 1 and abs(number) >= 1000 ** (power + 1):
        power += 1
    return f"{number / 1000**power:.4g}{units[power]}" if power else f"{number}{units[0]}"
