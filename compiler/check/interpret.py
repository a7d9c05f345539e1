"""Runs a module with torch: every op's reference is its meaning.

Used to check passes, to test rules and kernels, and as the slow truth that targets are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch

from ..errors import MoecError
from ..ir.dims import evaluate
from ..ir.dtypes import DTYPES
from ..ir.module import Function, Module, Op, Value, call_bindings
from ..ir.recipes import Recipe, bind_recipe
from ..ops import OPS

if TYPE_CHECKING:
    from torch import Tensor

Weights = Callable[[Recipe], "Tensor"]  # makes the tensor of a bound recipe
# is told of every op that ran: its function, what that is bound to, the op and its results
Observer = Callable[[Function, Mapping[str, str], Op, "Sequence[Tensor]"], None]


def interpret(
    module: Module,
    inputs: Sequence[Tensor],
    weights: Weights,
    function: str = "main",
    bound: Mapping[str, str] | None = None,
    dims: Mapping[str, int] | None = None,
    observe: Observer | None = None,
) -> tuple[Tensor, ...]:
    """Run a function on tensors in the order of its parameters; `bound` fills the holes of its weight names.

    `dims` are values of dims that the shapes of the inputs need not tell: P cannot be read off floordiv(P, 4).
    """
    start = module.by_name[function]
    found = bind_dims(start.params, inputs, dims)
    with torch.no_grad():
        return _run_function(module, start, inputs, weights, dict(bound or {}), found, observe)


def bind_dims(
    params: Sequence[Value], inputs: Sequence[Tensor], given: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the value of every dim, given or read off the shapes of the inputs; MoecError where they disagree."""
    dims: dict[str, int] = dict(given or {})
    pairs = [
        (param, size, actual)
        for param, tensor in zip(params, inputs, strict=True)
        for size, actual in zip(param.type.shape, tensor.shape, strict=True)
    ]
    for _, size, actual in pairs:
        if isinstance(size, sympy.Symbol):
            dims.setdefault(size.name, actual)
    for _, size, actual in pairs:
        # a dim that no parameter has alone (T in P + S) follows from the ones that are known
        unknown = [s for s in size.free_symbols if s.name not in dims]
        if len(unknown) == 1 and size.is_polynomial(unknown[0]):
            known = size.subs({s: dims[s.name] for s in size.free_symbols if s.name in dims})
            dims[unknown[0].name] = int(sympy.solve(known - actual, unknown[0])[0])
    for param, size, actual in pairs:
        if lacking := sorted(s.name for s in size.free_symbols if s.name not in dims):
            raise MoecError(f"the shapes of the inputs do not say how large {', '.join(lacking)} is")
        if evaluate(size, dims) != actual:
            raise MoecError(f"{param} is {param.type} with {dims}, but the input has {actual} there")
    return dims


def _run_function(
    module: Module, function: Function, inputs: Sequence[Any], weights: Weights, bound: dict[str, str], dims: dict,
    observe: Observer | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    values: dict[str, Tensor] = {p.name: t for p, t in zip(function.params, inputs, strict=True)}
    values |= {c.value.name: weights(bind_recipe(c.recipe, function.weights, bound)) for c in function.consts}
    last_use = {v.name: i for i, op in enumerate(function.ops) for v in op.inputs}
    keep = {v.name for v in function.results}
    for i, op in enumerate(function.ops):
        operands = [None if v is None else values[v.name] for v in op.operands]
        if op.callee:
            results: Any = _run_function(
                module, module.by_name[op.callee], operands, weights, {**bound, **call_bindings(op)}, dims, observe
            )
        else:
            results = run_op(op, operands, dims)
            if observe is not None:
                observe(function, bound, op, results)
        for value, tensor in zip(op.results, results, strict=True):
            values[value.name] = tensor
        for value in op.inputs:  # a layer's intermediate values need not outlive their last use
            if last_use[value.name] == i and value.name not in keep:
                values.pop(value.name, None)
    return tuple(values[v.name] for v in function.results)


def run_op(op: Op, operands: Sequence[Tensor | None], dims: Mapping[str, int]) -> tuple[Tensor, ...]:
    """Run one op's reference; size expressions in attributes are evaluated with `dims`."""
    attributes = {name: _concrete_sizes(value, dims) for name, value in op.attrs}
    result = OPS[op.name].reference(*operands, **attributes)
    return result if isinstance(result, tuple) else tuple(result) if isinstance(result, list) else (result,)


def _concrete_sizes(value: Any, dims: Mapping[str, int]) -> Any:
    if isinstance(value, sympy.Expr):
        return evaluate(value, dims)
    if isinstance(value, tuple):
        return tuple(_concrete_sizes(v, dims) for v in value)
    return value


# --- random inputs and weights, for checks ---------------------------------------------------------------------


def random_inputs(module: Module, function: str, dims: Mapping[str, int], seed: int = 0) -> list[Tensor]:
    """Return a tensor for every parameter: normal floats, and integers that the ops which read them can take."""
    f = module.by_name[function]
    generator = torch.Generator().manual_seed(seed)
    return [_random_value(f, p, dims, generator) for p in f.params]


def _random_value(function: Function, param: Value, dims: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = [evaluate(s, dims) for s in param.type.shape]
    dtype = DTYPES[param.type.dtype].torch
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    bound, distinct = 2, False
    for user in function.uses.get(param.name, []):
        if user is None or user.callee:
            continue
        definition = OPS[user.name]
        for name, given in user.named:
            if given == param and name in definition.domains:
                below = definition.domains[name](user.operand_types, user.settings)
                bound = evaluate(below, dims)
                distinct = distinct or name in definition.distinct
    if distinct:
        return torch.rand([*shape[:-1], bound], generator=generator).argsort(-1)[..., : shape[-1]].to(dtype)
    return torch.randint(0, max(bound, 1), shape, generator=generator).to(dtype)
