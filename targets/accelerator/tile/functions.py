"""The functions of the tile language: what each takes, the type of its result, what it computes, and what it costs.

A function takes values, which are expressions, and parameters, which are known when the program is written: sizes, an
axis, or a dtype. Printers add how a function is spelled elsewhere; all else is declared here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np

from ....compiler.errors import MoecError
from ....compiler.ir.dtypes import DTYPES
from .types import (
    FLOATS,
    HALF,
    SIGNED,
    ExprType,
    broadcast_shapes,
    check_integers,
    check_no_bool,
    promoted_type,
)

Parameter: TypeAlias = "int | str"
Parameters: TypeAlias = "Sequence[Parameter]"
TypeRule: TypeAlias = "Callable[[str, Sequence[ExprType], Parameters], ExprType]"


@dataclass(frozen=True)
class Function:
    """A function: the number of its values, its parameters ("sizes", "size", "axis", "dtype"), and what it is.

    `compute` gets the values and then the parameters. `operators`: how many operators it counts as, for every number.
    """

    values: int
    parameters: tuple[str, ...]
    type: TypeRule
    compute: Callable[..., Any]
    operators: int = 4


# --- types ---------------------------------------------------------------------------------------------------------


def _infer_arange(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    return ExprType("i32", _checked_shape(parameters))


def _infer_full(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    *sizes, dtype = parameters
    if values[0].shape:
        raise MoecError(f"full of {values[0]}: it repeats one number")
    return ExprType(str(dtype), _checked_shape(sizes))


def _infer_cast(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    return ExprType(str(parameters[0]), values[0].shape)


def _infer_bitcast(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    (given,), dtype = values, str(parameters[0])
    if given.weak or DTYPES[given.dtype].bits != DTYPES[dtype].bits or "bool" in (dtype, given.dtype):
        raise MoecError(f"bitcast of {given.dtype} to {dtype}: they have not the same bits")
    return ExprType(dtype, given.shape)


def _infer_reshape(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    (given,), shape = values, _checked_shape(parameters)
    if prod(shape) != prod(given.shape):
        raise MoecError(f"reshape of {list(given.shape)} to {list(shape)}")
    return ExprType(given.dtype, shape)


def _infer_trans(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    (given,) = values
    if len(given.shape) < 2:
        raise MoecError(f"trans of {given}", todo="it exchanges the last two axes")
    *lead, rows, columns = given.shape
    return ExprType(given.dtype, (*lead, columns, rows))


def _infer_where(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    condition, both = values[0], promoted_type(values[1], values[2])
    if condition.dtype != "bool" or both.weak:
        raise MoecError("where wants a bool and at least one number that has a dtype", todo="cast one")
    return ExprType(both.dtype, broadcast_shapes(condition.shape, both.shape))


def _infer_extreme(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    both = promoted_type(*values)
    check_no_bool(both, name)
    return both


def _infer_cdiv(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    both = promoted_type(*values)
    check_integers(both, name)
    return both


def _infer_abs(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    return ExprType(values[0].dtype, values[0].shape)


def _infer_float_function(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    if values[0].dtype not in FLOATS:
        raise MoecError(f"{name} of {values[0].dtype}", todo="cast it to f32 first")
    return ExprType(values[0].dtype, values[0].shape)


def _infer_sum(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    (given,) = values
    shape = _shape_without_axis(name, given, parameters)
    if given.dtype not in ("bool", "f32", *SIGNED):
        raise MoecError(f"{name} of {given.dtype}", todo="cast it to f32 or i32 first")
    return ExprType("i32" if given.dtype == "bool" else given.dtype, given.shape if name == "cumsum" else shape)


def _infer_reduction(name: str, values: Sequence[ExprType], parameters: Parameters) -> ExprType:
    (given,) = values
    shape = _shape_without_axis(name, given, parameters)
    if given.dtype not in ("f32", *HALF, *SIGNED):
        raise MoecError(f"{name} of {given.dtype}", todo="cast it to f32 or i32 first")
    return ExprType("i32" if name == "argmax" else given.dtype, shape)


def _shape_without_axis(name: str, given: ExprType, parameters: Parameters) -> tuple[int, ...]:
    """Return a shape without the axis that a function reduces."""
    if not given.shape:
        raise MoecError(f"{name} of a scalar")
    axis, count = int(parameters[0]), len(given.shape)
    if not -count <= axis < count:
        raise MoecError(f"{name} along axis {axis} of {list(given.shape)}")
    return given.shape[: axis % count] + given.shape[axis % count + 1 :]


def _checked_shape(parameters: Parameters) -> tuple[int, ...]:
    shape = tuple(int(n) for n in parameters)
    if any(n < 1 for n in shape):
        raise MoecError(f"a tile of {list(shape)}", todo="sizes begin at 1")
    return shape


# --- numbers -------------------------------------------------------------------------------------------------------


def _erf(x: np.ndarray) -> np.ndarray:
    # Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7
    t = 1 / (1 + 0.3275911 * np.abs(x))
    series = ((((1.061405429 * t - 1.453152027) * t) + 1.421413741) * t - 0.284496736) * t + 0.254829592
    return np.sign(x) * (1 - series * t * np.exp(-x * x))


def _exp(x: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.exp(x)


def _exp2(x: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.exp2(x)


def _log(x: Any) -> Any:
    with np.errstate(divide="ignore"):
        return np.log(x)


def _accumulator_dtype(x: np.ndarray) -> Any:
    """Return the dtype that numbers are added in: numpy's own would be i64."""
    return np.int32 if x.dtype in (np.bool_, np.int32) else None


FUNCTIONS: Mapping[str, Function] = {
    # arange(n): 0 .. n - 1
    "arange": Function(0, ("size",), _infer_arange, lambda n: np.arange(n, dtype=np.int32), 0),
    # full(M, N, value, "f32"), whose sizes are written before the value
    "full": Function(
        1, ("sizes", "dtype"), _infer_full, lambda value, *p: np.full(p[:-1], value, DTYPES[p[-1]].numpy), 1
    ),
    # cast(x, "bf16"), rounding to nearest even
    "cast": Function(1, ("dtype",), _infer_cast, lambda x, dtype: np.asarray(x).astype(DTYPES[dtype].numpy), 1),
    # bitcast(x, "i32"): the same bits
    "bitcast": Function(1, ("dtype",), _infer_bitcast, lambda x, dtype: np.asarray(x).view(DTYPES[dtype].numpy), 0),
    "reshape": Function(1, ("sizes",), _infer_reshape, lambda x, *shape: np.reshape(x, shape), 0),
    "trans": Function(1, (), _infer_trans, lambda x: np.swapaxes(x, -1, -2)),
    "where": Function(3, (), _infer_where, np.where, 1),
    "minimum": Function(2, (), _infer_extreme, np.minimum),
    "maximum": Function(2, (), _infer_extreme, np.maximum),
    "cdiv": Function(2, (), _infer_cdiv, lambda a, b: -(-a // b)),
    "abs": Function(1, (), _infer_abs, np.abs),
    "exp": Function(1, (), _infer_float_function, _exp),
    "exp2": Function(1, (), _infer_float_function, _exp2, 3),  # what a chip has; exp multiplies first
    "log": Function(1, (), _infer_float_function, _log),
    "sqrt": Function(1, (), _infer_float_function, np.sqrt),
    "rsqrt": Function(1, (), _infer_float_function, lambda x: 1 / np.sqrt(x)),
    "sigmoid": Function(1, (), _infer_float_function, lambda x: 1 / (1 + _exp(-x))),
    "tanh": Function(1, (), _infer_float_function, np.tanh),
    "erf": Function(1, (), _infer_float_function, _erf),
    # of the equal ones argmax is the first
    "sum": Function(1, ("axis",), _infer_sum, lambda x, axis: np.sum(x, axis=axis, dtype=_accumulator_dtype(x))),
    "cumsum": Function(1, ("axis",), _infer_sum, lambda x, axis: np.cumsum(x, axis=axis, dtype=_accumulator_dtype(x))),
    "max": Function(1, ("axis",), _infer_reduction, lambda x, axis: np.max(x, axis=axis)),
    "min": Function(1, ("axis",), _infer_reduction, lambda x, axis: np.min(x, axis=axis)),
    "argmax": Function(1, ("axis",), _infer_reduction, lambda x, axis: np.argmax(x, axis=axis).astype(np.int32)),
}
