"""How many bytes the values of a program take while the tiled interpreter runs it: what a memory limit is divided by."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from ..ir.dims import evaluate
from ..ir.module import Function, Module, Op, Value

_SCORES = 5  # tensors of the size of attention's scores that computing it takes


def live_bytes(module: Module, dims: Mapping[str, int]) -> int:
    """Return the most bytes of f32 that the values of a program take at once, and what its ops work in."""

    def size(value: Value) -> int:
        return 4 * evaluate(value.type.elements, dims)

    @cache
    def peak(name: str) -> int:
        function = module.by_name[name]
        last = {v.name: i for i, op in enumerate(function.ops) for v in op.inputs}
        last |= {v.name: len(function.ops) for v in function.results}
        held = {p.name: size(p) for p in function.params}
        most = sum(held.values())
        for i, op in enumerate(function.ops):
            held |= {v.name: size(v) for v in op.results}
            most = max(most, sum(held.values()) + _inside(function, op))
            held = {n: b for n, b in held.items() if last.get(n, -1) > i}
        return most

    def _inside(function: Function, op: Op) -> int:
        if op.callee:
            callee = module.by_name[op.callee]
            return max(0, peak(op.callee) - sum(map(size, (*callee.params, *callee.results))))
        results = sum(map(size, op.results))
        if op.name.endswith("attention"):
            return results + _SCORES * 4 * dims["B"] * dims["S"] ** 2 * score_heads(op)
        if op.name == "moe.experts":
            # what all experts' second matrices are multiplied with, and what one expert works in
            return 2 * results + 2 * size(op["ids"]) * int(op["down"].type.shape[-1])
        return results

    return peak("main")


def score_heads(op: Op) -> int:
    """Return for how many heads an op computes scores, at least 1."""
    if "heads" in op.attributes:
        return op.attributes.integer("heads")
    return max([1, *(int(s) for s in op.inputs[0].type.shape[1:-1] if s.is_Integer)])
