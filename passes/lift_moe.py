"""Moves a module from stage graph to stage moe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..compiler.errors import MoecError
from ..compiler.ir.module import Module
from ..compiler.ops.verify import STAGE_DIALECTS, at_home
from ..compiler.rewrite.declare import pass_


@pass_(reads="graph", leaves="moe")
def lift_moe(module: Module, target: Any) -> Module:
    """Enter the stage moe, once only its ops are left."""
    for function in module.functions:
        for op in function.ops:
            if op.name != "call" and not at_home(op, "moe"):
                raise MoecError(
                    f"{op.name} is not an op of stage moe",
                    where=f"{op.results[0]} in @{function.name}",
                    model=", ".join(op.loc),
                    todo=f"it has {', '.join(f'{d}.*' for d in STAGE_DIALECTS['moe'])}",
                )
    return replace(module, stage="moe")
