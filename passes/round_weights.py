"""Rounds weights to the float that a target stores them in."""

from __future__ import annotations

from dataclasses import replace

from ..compiler.errors import MoecError
from ..compiler.formats.table import find_format
from ..compiler.ir.module import Const, Function, Module
from ..compiler.ir.notes import Note, Rewritten
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.roles import Uses, weight_roles
from ..compiler.weights.demote import demoted_recipe
from ..compiler.weights.steps.table import step

DTYPES = ("bf16", "f16")
_ALSO = {"nn.block_linear": (1,)}  # weights that are never quantized and so have no role


@pass_(reads="moe", rounds=True)
def round_weights(module: Module, target: object, *, to: str = "bf16") -> Rewritten:
    """Round the weights of linears, experts and the embedding to bf16 (or f16); those that are bf16 stay as they are.

    The types stay f32: a lowering stores what was rounded in the dtype that holds it. Quantized weights stay, and so
    does the router: it is small, and a rounded score may choose another expert.
    """
    if to not in DTYPES:
        raise MoecError(f"weights are not rounded to {to}", todo=f"there are {', '.join(DTYPES)}")
    roles = weight_roles(module)
    rounded = {f.name: _round_function(f, roles[f.name], to) for f in module.functions}
    functions = {name: function for name, (function, _) in rounded.items()}
    return Rewritten(module.with_functions(functions), tuple(note for _, notes in rounded.values() for note in notes))


def _round_function(function: Function, roles: Uses, to: str) -> tuple[Function, list[Note]]:
    stored = {place for place, role in roles.items() if role != "router"}
    stored |= {(i, k) for i, op in enumerate(function.ops) for k in _ALSO.get(op.name, ())}
    names = {function.ops[i][k].name for i, k in stored}
    # a weight that the router reads too stays for both
    others = {
        v.name for i, op in enumerate(function.ops) for k, v in enumerate(op.operands) if v and (i, k) not in stored
    }
    consts, rounded = [], []
    for const in function.consts:
        if const.value.name in names - others and find_format(const.value.type.dtype) is None:
            demoted, exact = demoted_recipe(const.recipe, to)
            if not exact and demoted.type.dtype != const.value.type.dtype:
                rounded.append(const)
                const = Const(const.value, step("cast", demoted, to=const.value.type.dtype))
        consts.append(const)
    if not rounded:
        return function, []
    listed = ", ".join(str(c.value) for c in rounded[:6]) + (" ..." if len(rounded) > 6 else "")
    note = Note(f"{len(rounded)} weights are rounded to {to}: {listed}", function.name)
    return replace(function, consts=tuple(consts)), [note]
