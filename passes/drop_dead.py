"""Removes ops, constants and functions whose results are unused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..compiler.ir.module import Function, Module, Op, walk_calls
from ..compiler.rewrite.declare import pass_


@pass_(reads="any")
def drop_dead(module: Module, target: Any) -> Module:
    """Drop ops and weights whose results are never read, and functions that are never called; every op is pure."""
    return without_idle_functions(module.with_functions({f.name: without_dead(f) for f in module.functions}))


def without_dead(function: Function) -> Function:
    """Return the function without ops and weights that nothing reads; itself if there are none."""
    live = {v.name for v in function.results}
    ops: list[Op] = []
    for op in reversed(function.ops):
        if any(v.name in live for v in op.results):
            ops.append(op)
            live |= {v.name for v in op.inputs}
    consts = tuple(c for c in function.consts if c.value.name in live)
    if len(ops) == len(function.ops) and len(consts) == len(function.consts):
        return function
    return replace(function, consts=consts, ops=tuple(reversed(ops)))


def without_idle_functions(module: Module) -> Module:
    """Return the module without functions that the program does not call; itself if there are none."""
    reached = {function.name for function, _ in walk_calls(module)}
    functions = tuple(f for f in module.functions if f.name in reached)
    return module if len(functions) == len(module.functions) else replace(module, functions=functions)
