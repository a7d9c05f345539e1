"""Computes ops on constants while compiling, and removes ops that change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy

from ..compiler.ir.dims import size
from ..compiler.ir.module import Const, Function, Module, Op, Value
from ..compiler.ir.types import attr_key, make_attrs
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.function_rewriter import FunctionRewriter
from ..compiler.rewrite.roles import weight_operands
from ..compiler.weights.steps.table import step

# elementwise ops: on operands that hold one number everywhere, the result does too
_ELEMENTWISE = frozenset(
    f"core.{name}"
    for name in (
        "add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "logical_and",
        "logical_or", "logical_not", "neg", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "silu",
        "relu", "softplus", "abs", "floor", "erf", "reciprocal", "gelu", "clamp", "where", "cast",
    )
)  # fmt: skip
# ops that give the same numbers in another shape
_RESHAPING = frozenset(f"core.{name}" for name in ("reshape", "transpose", "expand", "slice", "concat"))


@pass_(reads="any")
def fold_constants(module: Module, target: Any) -> Module:
    """Compute ops on constants, leave out ops that change nothing, and join two reshapes or transposes into one.

    Constants are scalars, and tensors that hold one number everywhere. Transposes of weights move into the recipes of
    the weights. Names of parameters and of results stay.
    """
    return module.with_functions({f.name: fold_constants_in(f) for f in module.functions})


def fold_constants_in(function: Function) -> Function:
    """Return the function with its constants folded; itself if nothing can be."""
    rewriter = FunctionRewriter(function)
    for original in function.ops:
        op = rewriter.read(original)
        op = _fold_op(op, rewriter) or _read_through(op, rewriter)
        same = _unchanged_operand(op, rewriter)
        if same is None or not rewriter.stand_for(op.results[0], same):
            rewriter.keep(op)
    return _weights_in_order(rewriter.finish())


# --- weights that the program transposes -----------------------------------------------------------------------------


def _weights_in_order(function: Function) -> Function:
    """Return the function with transposes of weights in their recipes, where all that reads them are experts and linears.

    Otherwise the program would hold a weight in one order and compute with it in another.
    """
    consts = {c.value.name: c for c in function.consts}
    turned: dict[str, Value] = {}
    for op in function.ops:
        weight = op.operands[0] if op.name == "core.transpose" else None
        if weight is None or weight.name not in consts or not _only_weights(function, op.results[0]):
            continue
        alone = len(function.uses[weight.name]) == 1
        recipe = step("transpose", consts[weight.name].recipe, **op.attributes)
        name = weight.name if alone else op.results[0].name
        turned[op.results[0].name] = Value(name, recipe.type)
        consts[name] = Const(turned[op.results[0].name], recipe)
    if not turned:
        return function
    ops = tuple(
        replace(op, operands=tuple(v and turned.get(v.name, v) for v in op.operands))
        for op in function.ops
        if not op.results or op.results[0].name not in turned
    )
    return replace(function, consts=tuple(consts.values()), ops=ops)


def _only_weights(function: Function, value: Value) -> bool:
    """Return whether a value is read as the weight of ops and as nothing else."""
    users = function.uses.get(value.name, [])
    return bool(users) and all(
        op is not None and all(v != value or k in weight_operands(op) for k, v in enumerate(op.operands))
        for op in users
    )


# --- constants -------------------------------------------------------------------------------------------------


def _constant_number(value: Value | None, rewriter: FunctionRewriter) -> float | int | bool | None:
    """Return the number that a value holds everywhere, if it is a constant."""
    op = rewriter.made.get(value.name) if value else None
    return op.attributes.number("value") if op and op.name in ("core.constant", "core.full") else None


def _fold_op(op: Op, rewriter: FunctionRewriter) -> Op | None:
    """Return the constant that an op on constants makes."""
    if op.name not in _ELEMENTWISE | _RESHAPING or not op.operands:
        return None
    numbers = [_constant_number(v, rewriter) for v in op.operands]
    if any(n is None for n in numbers):
        return None
    type_ = op.results[0].type
    if op.name in _RESHAPING:
        if len({attr_key(n) for n in numbers if n is not None}) > 1:
            return None
        number = numbers[0]
    else:
        number = _compute_op(op, numbers)
    if isinstance(number, float) and math.isnan(number):  # its bits are another machine's choice
        return None
    attrs = {"value": number, "dtype": type_.dtype, **({"shape": type_.shape} if type_.shape else {})}
    return op.become("core.full" if type_.shape else "core.constant", **attrs)


def _compute_op(op: Op, numbers: list[Any]) -> Any:
    from ..compiler.check.interpret import run_op  # computes with torch

    scalars = [
        run_op(Op("core.constant", (), (), make_attrs({"value": n, "dtype": v.type.dtype})), [], {})[0]
        for n, v in zip(numbers, op.inputs, strict=True)
    ]
    return run_op(op, scalars, {})[0].item()


# --- ops that change nothing -----------------------------------------------------------------------------------


def _read_through(op: Op, rewriter: FunctionRewriter) -> Op:
    """Return the op reading through an op of the same kind before it, where one does the work of both."""
    if op.name == "core.concat":
        return _without_empty(op)
    if op.name == "core.slice":
        return _slice_of_part(op, rewriter)
    if op.name not in ("core.reshape", "core.transpose"):
        return op
    inner = rewriter.made.get(op["x"].name)
    if inner is None or inner.name != op.name:
        return op
    if op.name == "core.reshape":
        return replace(op, operands=inner.operands)
    first, second = inner.attributes.integers("perm"), op.attributes.integers("perm")
    attrs = make_attrs({"perm": tuple(first[p] for p in second)})
    return replace(op, operands=inner.operands, attrs=attrs)


def _without_empty(op: Op) -> Op:
    """Return a concat without the operands that have nothing along its axis."""
    axis = op.attributes.integer("axis")
    full = tuple(v for v in op.inputs if v.type.shape[axis] != 0)
    return replace(op, operands=full) if full and full != op.operands else op


def _slice_of_part(op: Op, rewriter: FunctionRewriter) -> Op:
    """Return a slice of joined values that lies in one of them as the slice of that one."""
    attributes, axis = op.attributes, op.attributes.integer("axis")
    joined = rewriter.made.get(op.inputs[0].name)
    if joined is None or joined.name != "core.concat" or joined.attributes["axis"] != axis:
        return op
    start, stop = size(attributes["start"]), size(attributes["stop"])
    low = size(0)
    for part in joined.inputs:
        high = low + part.type.shape[axis]
        if all(sympy.expand(d).is_nonnegative for d in (start - low, high - stop)):
            return replace(
                op, operands=(part,), attrs=make_attrs({**attributes, "start": start - low, "stop": stop - low})
            )
        low = high
    return op


def _unchanged_operand(op: Op, rewriter: FunctionRewriter) -> Value | None:
    """Return the operand that the op's only result equals, if there is one."""
    test = _SAME.get(op.name)
    if test is None:
        return None
    return next((v for i, v in enumerate(op.operands) if v is not None and test(op, i, rewriter)), None)


def _with_number(neutral: float, commutative: bool) -> Callable[[Op, int, FunctionRewriter], bool]:
    def test(op: Op, index: int, rewriter: FunctionRewriter) -> bool:
        number = _constant_number(op.operands[1 - index], rewriter)
        if number is None or isinstance(number, bool):
            return False
        return number == neutral and (commutative or index == 0)

    return test


def _whole_slice(op: Op, index: int, rewriter: FunctionRewriter) -> bool:
    attributes = op.attributes
    whole = op["x"].type.shape[attributes.integer("axis")]
    start, stop = size(attributes["start"]), size(attributes["stop"])
    return start == 0 and sympy.expand(stop - whole) == 0 and attributes.get("step", 1) == 1


def _same_type(op: Op, index: int, rewriter: FunctionRewriter) -> bool:
    return op["x"].type == op.results[0].type


def _in_order(op: Op, index: int, rewriter: FunctionRewriter) -> bool:
    perm = op.attributes.integers("perm")
    return list(perm) == sorted(perm)


_SAME: dict[str, Callable[[Op, int, FunctionRewriter], bool]] = {
    "core.cast": _same_type,
    "core.reshape": _same_type,
    "core.expand": _same_type,
    "core.transpose": _in_order,
    "core.slice": _whole_slice,
    "core.concat": lambda op, index, rewriter: len(op.operands) == 1,
    "core.add": _with_number(0, commutative=True),
    "core.sub": _with_number(0, commutative=False),
    "core.mul": _with_number(1, commutative=True),
    "core.div": _with_number(1, commutative=False),
    "core.pow": _with_number(1, commutative=False),
}
