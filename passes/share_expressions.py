"""Computes once what is computed several times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..compiler.ir.module import Const, Function, Module, Op
from ..compiler.ir.types import attr_key
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.function_rewriter import FunctionRewriter


@pass_(reads="any")
def share_expressions(module: Module, target: Any) -> Module:
    """Replace equal ops by one, and weights with the same recipe by one; every op is pure.

    Names of parameters and of results stay.
    """
    return module.with_functions({f.name: share_expressions_in(f) for f in module.functions})


def share_expressions_in(function: Function) -> Function:
    """Return the function with equal ops and weights only once; itself if there are none."""
    rewriter = FunctionRewriter(function)
    consts = _shared_consts(rewriter)
    seen: dict[Any, int] = {}
    for original in function.ops:
        op = rewriter.read(original)
        position = seen.get(_expression_key(op))
        if position is None or any(map(rewriter.is_returned, op.results)):
            seen.setdefault(_expression_key(op), len(rewriter.ops))
            rewriter.keep(op)
            continue
        first = rewriter.ops[position]
        rewriter.alias |= {old.name: new for old, new in zip(op.results, first.results, strict=True)}
        rewriter.ops[position] = replace(first, loc=tuple(dict.fromkeys((*first.loc, *op.loc))))
    return rewriter.finish(consts)


def _shared_consts(rewriter: FunctionRewriter) -> tuple[Const, ...]:
    kept: dict[Any, Const] = {}
    for const in rewriter.function.consts:
        first = kept.setdefault(const.recipe, const)
        if first is not const and not rewriter.stand_for(const.value, first.value):
            kept[const.value.name] = const
    return tuple(kept.values())


def _expression_key(op: Op) -> tuple:
    return op.name, op.callee, op.operands, attr_key(op.attrs)
