"""Runs torch.export with symbolic sizes and reads off which symbol is which dim of the IR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from ...errors import MoecError
from ...ir.dims import FUNCTIONS, Size, dim
from ..transformers.cache import SIZES

DIM_EXPRESSIONS = {"B": dim("B"), "S": dim("S"), "P": dim("P"), "P + S": dim("P") + dim("S")}

LAYOUT = "check_contiguous_sizes_strides"  # where torch asks how a tensor lies in memory, which no value depends on


@dataclass(frozen=True)
class Traced:
    """An exported graph, and the IR size that each of torch's symbols stands for."""

    program: Any
    symbols: Mapping[sympy.Symbol, Size]

    def size(self, value: Any) -> Size:
        """Return a torch size (int or SymInt) as a size of the IR."""
        if isinstance(value, int):
            return sympy.Integer(value)
        return _translate_expression(value.node.expr, self.symbols)

    def depends_on_data(self, value: Any) -> bool:
        """Return whether a torch size is a number of elements that a mask chooses, which nothing but asserts may read."""
        return not isinstance(value, int) and not value.node.expr.free_symbols <= set(self.symbols)

    def shape(self, tensor: Tensor) -> tuple[Size, ...]:
        """Return the shape of a traced value in IR sizes."""
        return tuple(sympy.expand(self.size(s)) for s in tensor.shape)


def trace_module(module: torch.nn.Module, inputs: Sequence[Tensor], where: str) -> Traced:
    """Export a module for every batch, length and past; MoecError where it holds only for some."""
    from torch.export import Dim, export

    inputs = [t.contiguous() for t in inputs]  # the strides of a slice would be sizes that nobody knows
    dynamic = [{i: Dim.AUTO for i, n in enumerate(t.shape) if n in SIZES} for t in inputs]
    try:
        with torch.no_grad():
            program = export(module, (list(inputs),), dynamic_shapes=(dynamic,), strict=False)
    except MoecError:
        raise
    except Exception as error:
        # torch.export fails with many unrelated exception types; all of them mean the same to a user
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise MoecError(
            f"torch.export cannot trace it: {type(error).__name__}: {lines[0] if lines else ''}", where=where
        ) from error
    placeholders = _user_inputs(program)
    symbols: dict[sympy.Symbol, Size] = {}
    for node, example in zip(placeholders, inputs, strict=True):
        for actual, number in zip(node.meta["val"].shape, example.shape, strict=True):
            if number not in SIZES:
                continue
            if isinstance(actual, int):
                raise MoecError(f"the traced code holds only for {SIZES[number]} = {number}", where=where)
            if isinstance(actual.node.expr, sympy.Symbol):
                symbols[actual.node.expr] = DIM_EXPRESSIONS[SIZES[number]]
    traced = Traced(program, symbols)
    _check_guards(placeholders, traced, where)
    return traced


def _user_inputs(program: Any) -> list[Any]:
    names = set(program.graph_signature.user_inputs)
    return [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]


def _check_guards(placeholders: Sequence[Any], traced: Traced, where: str) -> None:
    """Refuse a trace that took a branch which another length would not take."""
    for node in placeholders:
        for size in node.meta["val"].shape:
            if isinstance(size, int):
                continue
            environment = size.node.shape_env
            for guard in environment.guards:
                if LAYOUT in str(guard.sloc):
                    continue
                # sizes that torch found equal were replaced by each other; the guards still name all of them
                expression = _translate_expression(guard.expr.xreplace(environment.replacements), traced.symbols)
                if expression.free_symbols and _restricts_sizes(expression):
                    raise MoecError(f"the traced code holds only where {expression}", where=where)
            return


def _restricts_sizes(guard: sympy.Basic) -> bool:
    """Return whether a guard is more than torch's own assumption that sizes are 2 or larger."""
    positive = {s: sympy.Symbol(f"{s.name}_", integer=True, nonnegative=True) + 2 for s in guard.free_symbols}
    return sympy.simplify(guard.subs(positive)) is not sympy.true


def _translate_expression(expression: sympy.Basic, symbols: Mapping[sympy.Symbol, Size]) -> Any:
    """Rewrite torch's sympy expression over its own symbols and functions as one of the IR."""
    if isinstance(expression, sympy.Symbol):
        if expression not in symbols:
            raise MoecError(f"the traced code has a size {expression} that depends on data")
        return symbols[expression]
    if not expression.args:
        return expression
    args = [_translate_expression(a, symbols) for a in expression.args]
    match type(expression).__name__:
        case "FloorDiv" | "CleanDiv":
            return FUNCTIONS["floordiv"](*args)
        case "CeilDiv":
            return FUNCTIONS["ceildiv"](*args)
        case "Mod" | "PythonMod":
            return FUNCTIONS["mod"](*args)
        case "Max":
            return sympy.Max(*args)
        case "Min":
            return sympy.Min(*args)
    return expression.func(*args)
