"""Folds constants, shares equal expressions and removes unused ops."""

from __future__ import annotations

from typing import Any

from ..compiler.ir.dce import eliminate_dead_code
from ..compiler.ir.module import Function, Module
from ..compiler.rewrite.declare import pass_
from .drop_dead import drop_uncalled_functions
from .fold_constants import fold_constants_in
from .share_expressions import share_expressions_in

BOUND = 100  # rounds over one function; each one shortens it, so this is never reached by a sound program


@pass_(reads="any")
def cleanup(module: Module, target: Any) -> Module:
    """Run fold-constants, share-expressions and drop-dead until nothing changes.

    Names of parameters and of results stay.
    """
    return drop_uncalled_functions(module.with_functions({f.name: _clean_up_function(f) for f in module.functions}))


def _clean_up_function(function: Function) -> Function:
    for _ in range(BOUND):
        cleaned = eliminate_dead_code(share_expressions_in(fold_constants_in(function)))
        if cleaned is function:
            break
        function = cleaned
    return function
