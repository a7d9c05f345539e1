"""Folds what an ONNX graph computes of shapes and constants while it is read.

Exporters write `x.view(b, s, -1)` as Shape, Gather, Concat and Reshape. Of all these only the last one computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sympy

from ...ir.dims import floordiv
from .node import Node
from .numbers import MOST, Numbers


def fold_node(node: Node, operands: Sequence[Numbers | None]) -> Numbers | None:
    """Return what an operator makes of numbers; None where it is not one of those that are folded, or too much."""
    folder = _FOLDERS.get(node.type)
    given = [n for n in operands if n is not None]
    if folder is None or node.domain or not given or any(n.dtype not in ("i64", "i32", "bool") for n in given):
        return None
    try:
        found = folder(node, *operands)
    except (_Unknown, ValueError):  # a size that is not known where a number is wanted, or what does not fit
        return None
    return found if found is None or found.array.size <= MOST else None


class _Unknown(Exception):
    """Raised where the result depends on a size that is not known when compiling."""


def _elementwise(function: Callable[..., Any], dtype: str = "") -> Callable[..., Numbers]:
    def fold(node: Node, *operands: Numbers) -> Numbers:
        if math.prod(np.broadcast_shapes(*(n.array.shape for n in operands))) > MOST:
            raise _Unknown
        made = np.frompyfunc(function, len(operands), 1)(*(n.array for n in operands))
        return Numbers(np.array(made, dtype=object), dtype or operands[-1].dtype)

    return fold


def _divide(a: Any, b: Any) -> Any:
    if b == 0 or not _is_positive(b) or not (_is_positive(a) or a == 0):
        raise _Unknown
    exact = sympy.cancel(sympy.sympify(a) / b)
    return sympy.expand(exact) if sympy.denom(sympy.together(exact)) == 1 else floordiv(a, b)


def _is_positive(a: Any) -> bool:
    return all(c > 0 for c in sympy.sympify(a).as_coefficients_dict().values()) and a != 0


def _equal(a: Any, b: Any) -> bool:
    difference = sympy.expand(sympy.sympify(a) - sympy.sympify(b))
    if difference.is_Integer:
        return bool(difference == 0)
    if difference.is_positive or difference.is_negative:  # a size is never -1
        return False
    raise _Unknown


def _compare(test: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def compare(a: Any, b: Any) -> bool:
        difference = sympy.expand(sympy.sympify(a) - sympy.sympify(b))
        if not difference.is_Integer:
            raise _Unknown
        return test(int(difference), 0)

    return compare


def _choose(c: Any, x: Any, y: Any) -> Any:
    return x if c else y


def _fold_gather(node: Node, x: Numbers, index: Numbers) -> Numbers:
    places = np.array(index.integers, dtype=np.int64).reshape(index.array.shape)
    return Numbers(np.array(np.take(x.array, places, axis=node.integer("axis", 0)), dtype=object), x.dtype)


def _fold_slice(
    node: Node, x: Numbers, starts: Numbers, ends: Numbers, axes: Numbers | None = None, steps: Numbers | None = None
) -> Numbers:
    given = axes.integers if axes else range(len(starts.integers))
    index = [slice(None)] * x.array.ndim
    for axis, low, high, by in zip(
        given, starts.integers, ends.integers, steps.integers if steps else [1] * len(list(given)), strict=True
    ):
        index[axis] = slice(low, high, by)
    return Numbers(np.array(x.array[tuple(index)], dtype=object), x.dtype)


def _fold_concat(node: Node, *xs: Numbers) -> Numbers:
    return Numbers(np.concatenate([x.array for x in xs], axis=node.integer("axis")), xs[0].dtype)


def _fold_squeeze(node: Node, x: Numbers, axes: Numbers | None = None) -> Numbers:
    given = node.axes(axes)
    return Numbers(np.squeeze(x.array, tuple(given) if given is not None else None), x.dtype)


def _fold_unsqueeze(node: Node, x: Numbers, axes: Numbers | None = None) -> Numbers:
    return Numbers(np.expand_dims(x.array, tuple(node.axes(axes) or ())), x.dtype)


def _fold_reshape(node: Node, x: Numbers, shape: Numbers) -> Numbers:
    return Numbers(x.array.reshape(shape.integers), x.dtype)


def _fold_cast(node: Node, x: Numbers) -> Numbers:
    dtype = node.dtype("to")
    if not dtype.startswith(("i", "u", "f", "b")) or not x.dtype.startswith(("i", "u")):
        raise _Unknown
    if not dtype.startswith(("i", "u")):
        kind = bool if dtype == "bool" else float
        return Numbers.of([kind(v) for v in x.integers], dtype) if x.array.ndim else Numbers.of(kind(x.single), dtype)
    return Numbers(x.array, dtype)


def _fold_range(node: Node, start: Numbers, stop: Numbers, step: Numbers) -> Numbers:
    bounds = [int(n.integers[0]) for n in (start, stop, step)]
    if bounds[2] == 0 or len(range(*bounds)) > MOST:
        raise _Unknown
    return Numbers.of(list(range(*bounds)), start.dtype)


def _fold_full(node: Node, shape: Numbers) -> Numbers:
    value = node.tensor("value")
    if value is None or value.dtype.kind not in "iu" or value.size != 1:
        raise _Unknown
    if len(shape.integers) > 1 or math.prod(shape.integers) > MOST:
        raise _Unknown
    return Numbers.of(np.full(shape.integers, int(value.ravel()[0])).tolist(), "i64")


def _fold_expand(node: Node, x: Numbers, shape: Numbers) -> Numbers:
    wanted = np.broadcast_shapes(x.array.shape, tuple(shape.integers))
    if math.prod(wanted) > MOST:
        raise _Unknown
    return Numbers(np.broadcast_to(x.array, wanted), x.dtype)


def _fold_product(node: Node, x: Numbers, axes: Numbers | None = None) -> Numbers:
    if x.array.ndim > 1:
        raise _Unknown
    found = sympy.expand(sympy.Mul(*x.array.ravel()))
    return Numbers.of([found] if node.integer("keepdims", 1) else found, x.dtype)


_FOLDERS: dict[str, Callable[..., Numbers | None]] = {
    "Add": _elementwise(lambda a, b: a + b), "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: sympy.expand(a * b)), "Div": _elementwise(_divide),
    "Neg": _elementwise(lambda a: -a),
    "Max": _elementwise(lambda *a: sympy.Max(*a)), "Min": _elementwise(lambda *a: sympy.Min(*a)),
    "Equal": _elementwise(_equal, "bool"), "Greater": _elementwise(_compare(lambda a, b: a > b), "bool"),
    "Less": _elementwise(_compare(lambda a, b: a < b), "bool"),
    "GreaterOrEqual": _elementwise(_compare(lambda a, b: a >= b), "bool"),
    "LessOrEqual": _elementwise(_compare(lambda a, b: a <= b), "bool"),
    "Where": _elementwise(_choose), "Identity": lambda node, x: x, "Gather": _fold_gather, "Slice": _fold_slice,
    "Concat": _fold_concat, "Squeeze": _fold_squeeze, "Unsqueeze": _fold_unsqueeze, "Reshape": _fold_reshape,
    "Cast": _fold_cast, "Range": _fold_range, "ConstantOfShape": _fold_full, "Expand": _fold_expand,
    "ReduceProd": _fold_product,
}  # fmt: skip
