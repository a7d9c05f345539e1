"""The rules of a well-formed module: names, definitions before uses, types as the ops infer them, stage ops."""

from __future__ import annotations

from dataclasses import replace

from ..errors import MoecError
from ..errors.plugins import OPS as BROUGHT
from ..errors.plugins import brought_names
from ..ir.dtypes import is_dtype
from ..ir.module import Function, Module, Op, Value
from ..ir.stages import STAGES
from ..ir.types import TensorType
from . import OPS

STAGE_DIALECTS = {
    "graph": ("core", "nn", "moe", "onnx"),
    "moe": ("core", "nn", "moe", "onnx"),
}  # at the stage kernel the target's table decides


def at_home(op: Op, stage: str) -> bool:
    """Return whether an op is one of a stage; the ops that others than moec declare are at home in each."""
    dialect = op.name.partition(".")[0]
    return dialect in STAGE_DIALECTS.get(stage, (dialect,)) or dialect in brought_names(BROUGHT)


def verify_module(module: Module) -> None:
    """Raise MoecError at the first rule that a module breaks."""
    if module.stage not in STAGES:
        raise MoecError(f"unknown stage {module.stage!r}", todo=f"stages are {', '.join(STAGES)}")
    if not module.functions or module.functions[-1].name != "main":
        raise MoecError("the last function must be @main")
    dims = {d.name for d in module.dims}
    seen: dict[str, Function] = {}
    for function in module.functions:
        if function.name in seen:
            raise MoecError(f"function @{function.name} is defined twice")
        _verify_function(module, function, seen, dims)
        seen[function.name] = function


def _verify_function(module: Module, function: Function, earlier: dict[str, Function], dims: set[str]) -> None:
    defined: dict[str, TensorType] = {}

    def define(value: Value, place: str) -> None:
        if value.name in defined:
            raise MoecError(f"{value} is defined twice", where=place)
        if not is_dtype(value.type.dtype):
            raise MoecError(f"{value} has the unknown dtype {value.type.dtype!r}", where=place)
        unknown = {s.name for size in value.type.shape for s in size.free_symbols} - dims
        if unknown:
            raise MoecError(f"{value}: {value.type} has the undeclared dim {', '.join(sorted(unknown))}", where=place)
        defined[value.name] = value.type

    for value in function.params:
        define(value, f"@{function.name}")
    for const in function.consts:
        define(const.value, f"@{function.name}")
        if const.recipe.type != const.value.type:
            raise MoecError(
                f"the recipe of {const.value} makes {const.recipe.type}, not {const.value.type}",
                where=f"@{function.name}",
            )
    for op in function.ops:
        place = f"{op.results[0] if op.results else op.name} in @{function.name}"
        for value in op.inputs:
            _check_use(value, defined, place, op)
        check_op(op, module.stage, earlier, place)
        for value in op.results:
            define(value, place)
    for value in function.results:
        _check_use(value, defined, f"return of @{function.name}", None)


def _check_use(value: Value, defined: dict[str, TensorType], place: str, op: Op | None) -> None:
    model = ", ".join(op.loc) if op else ""
    if value.name not in defined:
        raise MoecError(f"{value} is used before it is defined", where=place, model=model)
    if defined[value.name] != value.type:
        raise MoecError(f"{value} is {defined[value.name]} but is used as {value.type}", where=place, model=model)


def check_op(op: Op, stage: str, functions: dict[str, Function], place: str) -> None:
    """Raise MoecError unless the op is allowed at this stage and its result types are the inferred ones."""
    model = ", ".join(op.loc)
    if op.name != "call" and not at_home(op, stage):
        allowed = ", ".join(f"{d}.*" for d in STAGE_DIALECTS[stage])
        raise MoecError(f"{op.name} is not an op of stage {stage}", place, model=model, todo=f"it has {allowed}")
    try:
        inferred = infer_op(op, functions)
    except MoecError as error:
        raise replace(error, where=error.where or place, model=error.model or model) from None
    written = tuple(v.type for v in op.results)
    if inferred != written:
        raise MoecError(
            f"{op.name} gives {', '.join(map(str, inferred))}, not {', '.join(map(str, written))}", place, model=model
        )


def infer_op(op: Op, functions: dict[str, Function]) -> tuple[TensorType, ...]:
    """Return the result types of an op or a call; MoecError says what does not fit."""
    if op.name != "call":
        if op.name not in OPS:
            raise MoecError(f"unknown op {op.name}")
        return OPS[op.name].infer(op.operand_types, op.attributes)
    callee = functions.get(op.callee)
    if callee is None:
        raise MoecError(f"@{op.callee} is not defined before this call")
    if len(op.operands) != len(callee.params):
        raise MoecError(f"@{op.callee} takes {len(callee.params)} operands, {len(op.operands)} given")
    for operand, param in zip(op.operands, callee.params, strict=True):
        if operand is None or operand.type != param.type:
            raise MoecError(f"{param} of @{op.callee} is {param.type}, {operand} is {operand and operand.type}")
    return callee.types
