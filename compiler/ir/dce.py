"""Dead-code elimination: a function without what nothing reads. Every op is pure."""

from __future__ import annotations

from dataclasses import replace

from .module import Function, Op


def eliminate_dead_code(function: Function, params: bool = False) -> Function:
    """Return the function without ops and weights (and `params`) whose results are unused; itself if there are none.

    Where two ops make the same value, the later one stays: a fused op takes over the results of those that it replaces.
    """
    live = {v.name for v in function.results}
    ops: list[Op] = []
    for op in reversed(function.ops):
        made = {v.name for v in op.results}
        if made & live:
            ops.append(op)
            live -= made
            live |= {v.name for v in op.inputs}
    consts = tuple(c for c in function.consts if c.value.name in live)
    kept = tuple(p for p in function.params if p.name in live or not params)
    if (len(ops), len(consts), len(kept)) == (len(function.ops), len(function.consts), len(function.params)):
        return function
    return replace(function, params=kept, consts=consts, ops=tuple(reversed(ops)))
