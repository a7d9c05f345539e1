"""plan.json: where each file of weights goes, and whether all that a program needs fits the chip's memory."""

from __future__ import annotations

from typing import Any

import sympy

from ....compiler.cost.count import module_costs
from ....compiler.ir.dims import Size, evaluate
from ....compiler.ir.module import Module, Op
from ....compiler.ops.define import any_size_text
from ....compiler.ops.stored_states import stored_states
from ..chip.chip import Profile
from ..predict.work import state_bytes
from .shards import Shards

SCHEMA = 1
TOKENS = 8192  # of the step that the workspace is counted for: the largest that kernels are tuned for
_BETWEEN = {"f32": 2, "bf16": 2}  # bytes of an activation: bf16 between kernels, whatever the program types


def place_on_devices(module: Module, profile: Profile, found: Shards) -> dict[str, Any]:
    """Return the content of plan.json: one device, its files, and the memory that weights, states and a step take."""
    memory = profile.memories[0]
    capacity = None if memory.capacity is None else int(memory.capacity.value)
    weights = sum(shard.bytes for shard in found.shards)
    costs = module_costs(module)
    past = next((d.high for d in module.dims if d.name == "P"), 0)
    most = next((d.high for d in module.dims if d.name == "S"), 1)
    tokens = min(TOKENS, most)
    state = state_bytes(module)
    each = _per_token(state, costs.dims(past=past), past)
    space = max(
        (evaluate(_workspace_bytes(op), costs.dims(new=tokens)) for f in module.functions for op in f.ops), default=0
    )
    room = None if capacity is None else capacity - weights - space
    return {
        "schema": SCHEMA,
        "target": profile.name,
        "devices": [
            {
                "device": 0,
                "memory": {"name": memory.name, "bytes": capacity},
                "shards": [{"file": s.name, "bytes": s.bytes, "tensors": len(s.tensors)} for s in found.shards],
                "weights": weights,
            }
        ],
        "state": {
            "formula": any_size_text(state),
            "bytes_per_token": each,
            "dtype": "fp8" if stored_states(module) else "bf16",
        },
        "workspace": {"tokens": tokens, "bytes": space},
        "fits": None if room is None else room >= 0,
        "free": room,
        "tokens_of_state": None if room is None or not each else max(0, room // each),
        "calls": [{"label": c.label, "function": c.function, "bindings": dict(c.bindings)} for c in found.calls],
        "same": dict(sorted(found.same.items())),
    }


def _value_bytes(elements: Size, dtype: str) -> Size:
    return elements * _BETWEEN.get(dtype, 8)


def _per_token(state: Size, dims: dict[str, int], past: int) -> int:
    """Return how many bytes of state one more token of a sequence adds, on average over the context."""
    if not past:
        return 0
    low, high = (evaluate(state, {**dims, "P": p}) for p in (0, past))
    return round((high - low) / past)


def _workspace_bytes(op: Op) -> Size:
    """Return the bytes of an op's operands and results that are neither weights nor states, all alive at once."""
    values = {v.name: v for v in (*op.inputs, *op.results) if v.type.elements.free_symbols and not v.type.state}
    return sympy.Add(*(_value_bytes(v.type.elements, v.type.dtype) for v in values.values()))
