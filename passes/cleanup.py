"""Folds constants, shares equal expressions and removes unused ops."""

from __future__ import annotations

from typing import Any

from ..compiler.ir.dce import dce
from ..compiler.ir.module import Function, Module
from ..compiler.rewrite.declare import pass_
from .drop_dead import drop_uncalled_functions
from .fold_constants import folded
from .share_expressions import shared

BOUND = 100  # rounds over one function; each one shortens it, so this is never reached by a sound program


@pass_(reads="any")
def cleanup(module: Module, target: Any) -> Module:
    """Run fold-constants, share-expressions and drop-dead until nothing changes.

    Names of parameters and of results stay.
    """
    return drop_uncalled_functions(module.with_functions({f.name: _clean(f) for f in module.functions}))


def _clean(function: Function) -> Function:
    for _ in range(BOUND):
        cleaned = dce(shared(folded(function)))
        if cleaned is function:
            break
        function = cleaned
    return function
