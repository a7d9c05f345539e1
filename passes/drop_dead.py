"""Removes ops, constants and functions whose results are unused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..compiler.ir.dce import eliminate_dead_code
from ..compiler.ir.module import Module, walk_calls
from ..compiler.rewrite.declare import pass_


@pass_(reads="any")
def drop_dead(module: Module, target: Any) -> Module:
    """Drop ops and weights whose results are never read, and functions that are never called; every op is pure."""
    return drop_uncalled_functions(module.with_functions({f.name: eliminate_dead_code(f) for f in module.functions}))


def drop_uncalled_functions(module: Module) -> Module:
    """Return the module without functions that the program does not call; itself if there are none."""
    reached = {function.name for function, _ in walk_calls(module)}
    functions = tuple(f for f in module.functions if f.name in reached)
    return module if len(functions) == len(module.functions) else replace(module, functions=functions)
