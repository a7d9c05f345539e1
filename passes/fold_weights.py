"""Makes weights of what a program cuts out of weights, joins of them or puts in another order."""

from __future__ import annotations

from dataclasses import replace

from ..compiler.ir.dce import eliminate_dead_code
from ..compiler.ir.module import Const, Function, Module, Op, Value
from ..compiler.ir.recipes import Recipe
from ..compiler.rewrite.declare import pass_
from ..compiler.weights.steps.table import step

_MOVES = frozenset(f"core.{name}" for name in ("reshape", "concat", "transpose", "slice"))


@pass_(reads="moe")
def fold_weights(module: Module, target: object) -> Module:
    """Move reshapes, transposes, slices and concatenations of weights into the recipes of the weights.

    A weight that nothing reads as it was before is left out.
    """
    return module.with_functions({f.name: _fold_weights_in(f) for f in module.functions})


def _fold_weights_in(function: Function) -> Function:
    consts = {c.value.name: c for c in function.consts}
    folded: dict[str, Value] = {}
    ops = []
    for original in function.ops:
        op = replace(original, operands=tuple(v and folded.get(v.name, v) for v in original.operands))
        recipe = _moved_recipe(op, [c.recipe for v in op.inputs if (c := consts.get(v.name))])
        if recipe is None or op.results[0] in function.results:
            ops.append(op)
            continue
        alone = len(op.inputs) == 1 and len(function.uses[original.inputs[0].name]) == 1
        value = Value(op.inputs[0].name if alone else op.results[0].name, recipe.type)
        folded[op.results[0].name], consts[value.name] = value, Const(value, recipe)
    if not folded:
        return function
    return eliminate_dead_code(replace(function, ops=tuple(ops), consts=tuple(consts.values())))


def _moved_recipe(op: Op, weights: list[Recipe]) -> Recipe | None:
    """Return the recipe of what an op makes of nothing but weights; None for an op that does more than move numbers."""
    if op.name not in _MOVES or len(weights) < len(op.operands):
        return None
    return step(op.name.removeprefix("core."), *weights, **op.attributes)
