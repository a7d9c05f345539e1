"""`core.*`: arithmetic, shapes, reductions and indexing, with torch's semantics."""

from __future__ import annotations

import sympy

from ..formats.table import find_format
from ..ir.deferred import torch
from ..ir.dims import Size, size
from ..ir.dtypes import DTYPES
from ..ir.types import TensorType
from .define import Attributes, Types, any_size_text, broadcast_shapes, inference_error, op


def axis_of(attributes: Attributes, rank: int) -> int:
    """Return the axis attribute as a non-negative number; axes count from 0."""
    axis = attributes["axis"]
    if not isinstance(axis, int) or not 0 <= axis < rank:
        raise inference_error(f"axis={axis} is not an axis of a tensor with {rank} axes; axes are 0..{rank - 1}")
    return axis


def with_axis(type: TensorType, axis: int, length: int | Size) -> TensorType:
    """Return the type with another size of one axis."""
    return TensorType(type.dtype, (*type.shape[:axis], size(length), *type.shape[axis + 1 :]))


# --- elementwise -----------------------------------------------------------------------------------------------

# ops that one function of torch computes, by its name there
_BINARY = {
    "add": "Add, with broadcasting.",
    "sub": "Subtract y from x, with broadcasting.",
    "mul": "Multiply, with broadcasting.",
    "div": "Divide x by y, with broadcasting.",
    "pow": "Raise x to the power y, with broadcasting.",
    "maximum": "Take the larger element, with broadcasting.",
    "minimum": "Take the smaller element, with broadcasting.",
}
for _name, _doc in _BINARY.items():
    op(f"core.{_name}", "x: A[*X], y: A[*Y] -> z: A[broadcast(X, Y)]", doc=_doc)(
        lambda x, y, _name=_name: getattr(torch, _name)(x, y)
    )

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    op(f"core.{_name}", "x: A[*X], y: A[*Y] -> z: bool[broadcast(X, Y)]", doc=f"Compare elements: x {_name} y.")(
        lambda x, y, _name=_name: getattr(torch, _name)(x, y)
    )
for _name in ("logical_and", "logical_or"):
    op(f"core.{_name}", "x: bool[*X], y: bool[*Y] -> z: bool[broadcast(X, Y)]", doc=f"Combine truth values: {_name}.")(
        lambda x, y, _name=_name: getattr(torch, _name)(x, y)
    )

_UNARY = (
    "neg", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "relu", "abs", "floor", "erf", "reciprocal",
)  # fmt: skip
for _name in _UNARY:
    op(f"core.{_name}", "x: A[*X] -> y: A[*X]", doc=f"Apply {_name} to every element.")(
        lambda x, _name=_name: getattr(torch, _name)(x)
    )
for _name in ("silu", "softplus"):
    op(f"core.{_name}", "x: A[*X] -> y: A[*X]", doc=f"Apply {_name} to every element.")(
        lambda x, _name=_name: getattr(torch.nn.functional, _name)(x)
    )


@op("core.logical_not", "x: bool[*X] -> y: bool[*X]")
def logical_not(x):
    """Negate truth values."""
    return torch.logical_not(x)


@op("core.gelu", "x: A[*X] -> y: A[*X]")
def gelu(x, *, approximate: str = "none"):
    """Apply GELU; `approximate` is `none` (with erf) or `tanh`."""
    return torch.nn.functional.gelu(x, approximate=approximate)


@op("core.clamp", "x: A[*X] -> y: A[*X]")
def clamp(x, *, min: float = float("-inf"), max: float = float("inf")):
    """Limit every element to min..max."""
    return torch.clamp(x, min, max)


@op("core.where", "c: bool[*C], x: A[*X], y: A[*Y] -> z: A[broadcast(C, X, Y)]")
def where(c, x, y):
    """Take x where c holds, else y, with broadcasting."""
    return torch.where(c, x, y)


@op("core.cast", "x: A[*X] -> y: to[*X]")
def cast(x, *, to: str):
    """Convert to another dtype."""
    return x.to(DTYPES[to].torch)


# --- constants -------------------------------------------------------------------------------------------------


@op("core.constant", "-> y: dtype[]")
def constant(*, value: float | int | bool, dtype: str):
    """Make a scalar."""
    return torch.tensor(value, dtype=DTYPES[dtype].torch)


@op("core.iota", "-> y: i64[size]")
def iota(*, size: Size):
    """Count 0, 1, ..., size - 1."""
    return torch.arange(size)


def _infer_full(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    return (TensorType.of(attributes["dtype"], *attributes["shape"]),)


@op("core.full", "-> y: dtype[*Y]", infer=_infer_full)
def full(*, shape: tuple[Size, ...], value: float | int | bool, dtype: str):
    """Fill a shape with one value."""
    return torch.full(shape, value, dtype=DTYPES[dtype].torch)


# --- matrices --------------------------------------------------------------------------------------------------


def _linear_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    return 2 * results[0].elements * operands[0].shape[-1]


@op("core.linear", "x: A[*X, K], w: Q[N, K], b: A[N]? -> y: A[*X, N]", flops=_linear_flops)
def linear(x, w, b):
    """Multiply by a weight stored [out, in]: x wᵀ + b."""
    return torch.nn.functional.linear(x, w, b)


def _infer_matmul(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, y = types
    if len(x.shape) < 2 or len(y.shape) < 2 or x.shape[-1] != y.shape[-2]:
        raise inference_error(
            f"matmul of {x} and {y}: the last size of x must be the last but one of y, both with 2 axes or more"
        )
    return (TensorType(x.dtype, (*broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])),)


@op("core.matmul", "x: A[*X], y: A[*Y] -> z: A[*Z]", infer=_infer_matmul, flops=_linear_flops)
def matmul(x, y):
    """Multiply matrices in the last two axes; the leading axes broadcast."""
    return torch.matmul(x, y)


# --- shapes ----------------------------------------------------------------------------------------------------


def _infer_reshape(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x = types[0]
    result = TensorType.of(x.dtype, *attributes["shape"])
    if sympy.expand(result.elements - x.elements) != 0:
        raise inference_error(
            f"{x} has {any_size_text(x.elements)} elements, the shape {result} has {any_size_text(result.elements)}"
        )
    if find_format(x.dtype) and result.shape[-1:] != x.shape[-1:]:
        raise inference_error(f"{x} has groups along its rows, which the shape {result} would cut")
    return (result,)


@op("core.reshape", "x: A[*X] -> y: A[*Y]", infer=_infer_reshape, flops=0, view=True)
def reshape(x, *, shape: tuple[Size, ...]):
    """Give the same elements, in row-major order, another shape."""
    return x.reshape(shape)


def _infer_transpose(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x = types[0]
    perm = attributes["perm"]
    if sorted(perm) != list(range(len(x.shape))):
        raise inference_error(f"perm={list(perm)} does not order the {len(x.shape)} axes of {x}")
    return (TensorType(x.dtype, tuple(x.shape[p] for p in perm)),)


@op("core.transpose", "x: A[*X] -> y: A[*Y]", infer=_infer_transpose, flops=0, view=True)
def transpose(x, *, perm: tuple[int, ...]):
    """Reorder the axes."""
    return x.permute(perm)


def _infer_expand(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x = types[0]
    result = TensorType.of(x.dtype, *attributes["shape"])
    tail = result.shape[len(result.shape) - len(x.shape) :]
    if len(x.shape) > len(result.shape) or any(a not in (b, 1) for a, b in zip(x.shape, tail, strict=True)):
        raise inference_error(f"{x} does not broadcast to {result}")
    return (result,)


@op("core.expand", "x: A[*X] -> y: A[*Y]", infer=_infer_expand, flops=0, view=True)
def expand(x, *, shape: tuple[Size, ...]):
    """Repeat axes of size 1 up to a shape."""
    return x.expand(shape)


def _infer_slice(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x = types[0]
    axis = axis_of(attributes, len(x.shape))
    step = attributes.get("step", 1)
    length = size(attributes["stop"]) - size(attributes["start"])
    if step != 1:
        length = sympy.ceiling(length / step)
    if length.is_Integer and length < 0:
        raise inference_error(f"slice {attributes['start']}:{attributes['stop']} is empty")
    return (with_axis(x, axis, length),)


@op("core.slice", "x: A[*X] -> y: A[*Y]", infer=_infer_slice, flops=0, view=True)
def slice_(x, *, axis: int, start: Size, stop: Size, step: int = 1):
    """Take start:stop:step along an axis; start and stop count from the front and lie inside."""
    return x[(slice(None),) * axis + (slice(start, stop, step),)]


def _infer_concat(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    first = types[0]
    axis = axis_of(attributes, len(first.shape))
    for other in types:
        if with_axis(other, axis, 0).shape != with_axis(first, axis, 0).shape:
            raise inference_error(f"{other} does not fit beside {first} along axis {axis}")
    return (with_axis(first, axis, sum((t.shape[axis] for t in types if t), size(0))),)


@op("core.concat", "xs: A[*X]... -> y: A[*Y]", infer=_infer_concat, flops=0)
def concat(*xs, axis: int):
    """Join along an axis."""
    return torch.cat(xs, dim=axis)


# --- reductions ------------------------------------------------------------------------------------------------


def _infer_reduction(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x = types[0]
    axes = attributes["axes"]
    if not axes or any(not 0 <= a < len(x.shape) for a in axes):
        raise inference_error(f"axes={list(axes)} are not axes of {x}; they count from 0")
    keep = attributes.get("keepdim", False)
    shape = [size(1) if i in axes else s for i, s in enumerate(x.shape) if keep or i not in axes]
    return (TensorType(x.dtype, tuple(shape)),)


def _input_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    return operands[0].elements


for _name in ("sum", "mean", "amax"):

    def _reference(x, *, axes: tuple[int, ...], keepdim: bool = False, _name=_name):
        return getattr(torch, _name)(x, dim=axes, keepdim=keepdim)

    op(
        f"core.{_name}",
        "x: A[*X] -> y: A[*Y]",
        infer=_infer_reduction,
        flops=_input_flops,
        doc=f"Reduce axes: {_name}.",
    )(_reference)


@op("core.softmax", "x: A[*X] -> y: A[*X]", flops=lambda o, r, a: 5 * r[0].elements)
def softmax(x, *, axis: int):
    """Normalise exponentials along an axis."""
    return torch.softmax(x, dim=axis)


@op("core.cumsum", "x: A[*X] -> y: A[*X]")
def cumsum(x, *, axis: int):
    """Sum up along an axis."""
    return torch.cumsum(x, dim=axis, dtype=x.dtype)


def _infer_topk(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x = types[0]
    values = with_axis(x, axis_of(attributes, len(x.shape)), attributes["k"])
    return values, TensorType("i64", values.shape)


@op("core.topk", "x: A[*X] -> values: A[*Y], indices: i64[*Y]", infer=_infer_topk, flops=_input_flops)
def topk(x, *, k: int, axis: int):
    """Take the k largest along an axis, largest first, with their indices."""
    return torch.topk(x, k, dim=axis)


@op("core.argsort", "x: A[*X] -> indices: i64[*X]")
def argsort(x, *, axis: int, descending: bool = False):
    """Order along an axis; equal elements keep their order."""
    return torch.argsort(x, dim=axis, descending=descending, stable=True)


# --- indexing --------------------------------------------------------------------------------------------------


@op(
    "core.gather",
    "x: A[*X], index: i64[*I] -> y: A[*I]",
    flops=0,
    domains={"index": lambda t, a: t[0].shape[a["axis"]]},
)
def gather(x, index, *, axis: int):
    """Take x[..., index[..., i, ...], ...] along an axis (torch.gather)."""
    return torch.gather(x, axis, index)


@op(
    "core.scatter",
    "x: A[*X], index: i64[*I], src: A[*I] -> y: A[*X]",
    flops=0,
    domains={"index": lambda t, a: t[0].shape[a["axis"]]},
    distinct=("index",),
)
def scatter(x, index, src, *, axis: int):
    """Return x with src written at the indices along an axis (torch.scatter); the indices are distinct."""
    return torch.scatter(x, axis, index, src)


@op(
    "core.scatter_add",
    "x: A[*X], index: i64[*I], src: A[*I] -> y: A[*X]",
    flops=lambda o, r, a: o[2].elements,
    domains={"index": lambda t, a: t[0].shape[a["axis"]]},
)
def scatter_add(x, index, src, *, axis: int):
    """Return x with src added at the indices along an axis (torch.scatter_add); indices may be equal."""
    return torch.scatter_add(x, axis, index, src)


def _infer_take(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, index = types
    axis = axis_of(attributes, len(x.shape))
    return (TensorType(x.dtype, (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])),)


@op(
    "core.take",
    "x: A[*X], index: i64[*I] -> y: A[*Y]",
    infer=_infer_take,
    flops=0,
    domains={"index": lambda t, a: t[0].shape[a["axis"]]},
    rows={"x": lambda t, a: t[0].shape[0] if a["axis"] else t[1].elements},
)
def take(x, index, *, axis: int):
    """Take whole slices of x along an axis; the index may have any rank."""
    flat = torch.index_select(x, axis, index.flatten())
    return flat.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))
