"""Where the states of a program lie in other bits than their type says: the attribute `cache` of the ops that read them."""

from __future__ import annotations

from collections.abc import Mapping

from ..ir.module import Module, Op, Value
from .define import OPS


def stored_states(module: Module) -> Mapping[tuple[str, str], str]:
    """Return how states are stored, such as `fp8`, by function and name; those that lie as they are typed are left out."""
    found: dict[tuple[str, str], str] = {}
    for function in module.functions:
        for op in function.ops:
            if op.callee:
                params = module.by_name[op.callee].params
                for param, value in zip(params, op.operands, strict=True):
                    if value and (op.callee, param.name) in found:
                        found[function.name, value.name] = found[op.callee, param.name]
            else:
                found |= {(function.name, v.name): op.settings.text("cache") for v in rounded_values(op)}
    return found


def rounded_values(op: Op) -> set[Value]:
    """Return the states among an op's operands and results that lie in 8 bits."""
    definition = OPS[op.name]
    if not definition.stored or not op.attributes.get("cache"):
        return set()
    results = zip((d.name for d in definition.signature.results), op.results, strict=True)
    return {v for name, v in (*op.named, *results) if name in definition.stored}
