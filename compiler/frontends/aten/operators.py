"""One handler for each aten operator, in torch's spelling of arguments. `aten.py` calls them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from ...errors import MoecError
from ...ir.dims import size
from ...ir.dtypes import DTYPES
from ...ir.module import Value
from .chosen_rows import Place, Rows, take_rows, write_rows
from .lower import HANDLERS, Graph, aten, normalize_axis, reshape
from .shapes import squeeze

Handler = Callable[..., Any]


# --- elementwise -----------------------------------------------------------------------------------------------


def _promote_dtypes(g: Graph, x: Any, y: Any) -> tuple[Value, Value]:
    if not isinstance(x, Value):
        return g.like(x, y), y
    if not isinstance(y, Value):
        if isinstance(y, float) and not x.type.dtype.startswith(("f", "b")):
            x = g.cast(x, "f32")
        return x, g.like(y, x)
    order = ["bool", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64"]
    # torch: a 0-d tensor does not widen an operand of the same category
    dtype = max(x.type.dtype, y.type.dtype, key=order.index)
    return g.cast(x, dtype), g.cast(y, dtype)


def _binary_handler(name: str) -> Handler:
    def handler(g: Graph, x: Any, y: Any, alpha: Any = 1, rounding_mode: Any = None) -> Any:
        if not isinstance(x, Value) and not isinstance(y, Value):
            return {"add": operator.add, "sub": operator.sub, "mul": operator.mul}[name](x, y)
        if alpha != 1 or rounding_mode is not None:
            raise MoecError(f"{name} with alpha={alpha}, rounding_mode={rounding_mode} is not understood")
        x, y = _promote_dtypes(g, x, y)
        if name == "div" and not x.type.dtype.startswith(("f", "b")):
            x, y = g.cast(x, "f32"), g.cast(y, "f32")
        return g.builder.add(f"core.{name}", x, y)

    return handler


for _name in ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge"):
    aten(f"aten.{_name}")(_binary_handler(_name))
for _name in ("logical_and", "logical_or"):
    _short = _name.split("_")[1]
    aten(f"aten.{_name}", f"aten.bitwise_{_short}", f"aten.__{_short}__")(_binary_handler(_name))


def _unary_handler(name: str) -> Handler:
    return lambda g, x, **kwargs: g.builder.add(f"core.{name}", x)


for _name in (
    "neg", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "silu", "relu", "abs", "floor", "erf",
    "reciprocal", "logical_not",
):  # fmt: skip
    aten(f"aten.{_name}")(_unary_handler(_name))


@aten("aten.bitwise_not")
def _bitwise_not(g: Graph, x: Value) -> Value:
    if x.type.dtype != "bool":
        raise MoecError("bitwise_not of integers is not understood")
    return g.builder.add("core.logical_not", x)


@aten("aten.rsub")
def _rsub(g: Graph, x: Value, y: Any, alpha: Any = 1) -> Value:
    return HANDLERS["aten.sub"](g, y, x, alpha)


@aten("aten.square")
def _square(g: Graph, x: Value) -> Value:
    return g.builder.add("core.mul", x, x)


@aten("aten.log1p")
def _log1p(g: Graph, x: Value) -> Value:
    return g.builder.add("core.log", g.builder.add("core.add", x, g.like(1.0, x)))


@aten("aten.softplus")
def _softplus(g: Graph, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    if beta != 1:
        raise MoecError(f"softplus with beta={beta} is not understood")
    return g.builder.add("core.softplus", x)


@aten("aten.log_sigmoid")
def _log_sigmoid(g: Graph, x: Value) -> Value:
    return g.builder.add("core.neg", g.builder.add("core.softplus", g.builder.add("core.neg", x)))


@aten("aten.gelu")
def _gelu(g: Graph, x: Value, approximate: str = "none") -> Value:
    return g.builder.add("core.gelu", x, approximate=approximate)


@aten("aten.clamp", "aten.clamp_min", "aten.clamp_max")
def _clamp(g: Graph, x: Value, min: Any = None, max: Any = None) -> Value:
    if isinstance(min, Value) or isinstance(max, Value):
        x = x if min is None else g.builder.add("core.maximum", *_promote_dtypes(g, x, min))
        return x if max is None else g.builder.add("core.minimum", *_promote_dtypes(g, x, max))
    low = float("-inf") if min is None else float(min)
    high = float("inf") if max is None else float(max)
    return g.builder.add("core.clamp", x, min=low, max=high)


@aten("aten.where")
def _where(g: Graph, condition: Value, x: Any, y: Any) -> Value:
    x, y = (
        _promote_dtypes(g, x, y)
        if isinstance(x, Value) or isinstance(y, Value)
        else (g.scalar(x, "f32"), g.scalar(y, "f32"))
    )
    return g.builder.add("core.where", condition, x, y)


@aten("aten.masked_fill")
def _masked_fill(g: Graph, x: Value, mask: Value, value: Any) -> Value:
    return g.builder.add("core.where", mask, g.like(value, x), x)


@aten("aten.to", "aten._to_copy", "aten.type_as")
def _to(g: Graph, x: Value, *args: Any, dtype: str | None = None, **kwargs: Any) -> Value:
    for argument in args:
        if isinstance(argument, str) and argument in DTYPES:
            dtype = argument
        elif isinstance(argument, Value):
            dtype = argument.type.dtype
    return g.cast(x, dtype) if dtype else x


@aten("aten.contiguous", "aten.clone", "aten.detach", "aten.alias", "aten.dropout", "aten.lift_fresh_copy")
def _return_unchanged(g: Graph, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


@aten("aten._assert_tensor_metadata", "aten._assert_scalar", "aten.sym_constrain_range_for_size")
def _return_none(g: Graph, *args: Any, **kwargs: Any) -> None:
    return None


# --- matrices and reductions -----------------------------------------------------------------------------------


@aten("aten.linear")
def _linear(g: Graph, x: Value, w: Value, b: Value | None = None) -> Value:
    return g.builder.add("core.linear", x, w, b, hint=_last_name(g))


@aten("aten.matmul", "aten.bmm", "aten.mm")
def _matmul(g: Graph, x: Value, y: Value) -> Value:
    return g.builder.add("core.matmul", x, y)


@aten("aten.conv1d")
def _conv1d(
    g: Graph, x: Value, w: Value, b: Value | None = None, stride: Any = (1,), padding: Any = (0,),
    dilation: Any = (1,), groups: int = 1,
) -> Value:  # fmt: skip
    """Convolve as a product for each tap: a group's channels [in, T] by its weight [out, in]."""
    if [*stride, *padding, *dilation] != [1, 0, 1]:
        raise MoecError(f"conv1d with stride={stride}, padding={padding}, dilation={dilation} is not understood")
    batch, _, tokens = x.type.shape
    outputs, inner, taps = (int(n) for n in w.type.shape)
    kept = tokens - taps + 1
    heads = reshape(g, x, (batch, groups, inner, tokens))
    total: Value | None = None
    for tap in range(taps):
        weight = g.builder.add("core.slice", w, axis=2, start=tap, stop=tap + 1)
        weight = reshape(g, weight, (groups, outputs // groups, inner))
        seen = g.builder.add("core.slice", heads, axis=3, start=tap, stop=tap + kept)
        product = g.builder.add("core.matmul", weight, seen)
        total = product if total is None else g.builder.add("core.add", total, product)
    assert total  # a kernel has a tap or more
    y = reshape(g, total, (batch, outputs, kept))
    return y if b is None else g.builder.add("core.add", y, reshape(g, b, (outputs, 1)))


@aten("aten.scaled_dot_product_attention")
def _scaled_dot_product_attention(
    g: Graph, q: Value, k: Value, v: Value, mask: Any = None, dropout: float = 0.0, is_causal: bool = False,
    scale: float | None = None, **kwargs: Any,
) -> Value:  # fmt: skip
    """Attend as a model does outside of its attention layers: to all of a few rows."""
    if mask is not None or is_causal or q.type.shape[:-2] != k.type.shape[:-2]:
        raise MoecError("scaled_dot_product_attention with a mask or groups of heads is not understood")
    scores = g.builder.add("core.matmul", q, _transpose_last_axes(g, k))
    factor = float(scale) if scale is not None else float(q.type.shape[-1]) ** -0.5
    weights = g.builder.add(
        "core.softmax", g.builder.add("core.mul", scores, g.like(factor, q)), axis=len(q.type.shape) - 1
    )
    return g.builder.add("core.matmul", weights, v)


def _transpose_last_axes(g: Graph, x: Value) -> Value:
    rank = len(x.type.shape)
    return g.builder.add("core.transpose", x, perm=(*range(rank - 2), rank - 1, rank - 2))


@aten("aten.addmm")
def _addmm(g: Graph, b: Value, x: Value, y: Value, beta: Any = 1, alpha: Any = 1) -> Value:
    if beta != 1 or alpha != 1:
        raise MoecError(f"addmm with beta={beta}, alpha={alpha} is not understood")
    return g.builder.add("core.add", g.builder.add("core.matmul", x, y), b)


@aten("aten.max.dim")
def _max(g: Graph, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, ...]:
    found = g.builder.add_all("core.topk", x, k=1, axis=normalize_axis(x, dim))
    return found if keepdim else tuple(squeeze(g, part, dim) for part in found)


def _last_name(g: Graph) -> str:
    """Return the innermost module's name where it is a good name for a value."""
    name = g.builder.loc[0].rpartition(".")[2] if g.builder.loc else ""
    return name if name.isidentifier() else "linear"


@aten("aten.softmax", "aten._softmax")
def _softmax(g: Graph, x: Value, dim: int, dtype: Any = None) -> Value:
    x = g.cast(x, dtype) if isinstance(dtype, str) else x
    return g.builder.add("core.softmax", x, axis=normalize_axis(x, dim))


def _reduction_handler(name: str) -> Handler:
    def handler(g: Graph, x: Value, dim: Any = None, keepdim: bool = False, dtype: str | None = None) -> Value:
        dims = range(len(x.type.shape)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
        x = g.cast(x, dtype) if dtype else x
        return g.builder.add(
            f"core.{name}", x, axes=tuple(sorted(normalize_axis(x, d) for d in dims)), keepdim=bool(keepdim)
        )

    return handler


for _name in ("sum", "mean", "amax"):
    aten(f"aten.{_name}")(_reduction_handler(_name))


@aten("aten.linalg_vector_norm", "aten.norm")
def _vector_norm(g: Graph, x: Value, ord: Any = 2, dim: Any = None, keepdim: bool = False) -> Value:
    if ord not in (1, 2):
        raise MoecError(f"a norm of order {ord} is not understood")
    if ord == 1:
        return HANDLERS["aten.sum"](g, g.builder.add("core.abs", x), dim, keepdim)
    return g.builder.add("core.sqrt", HANDLERS["aten.sum"](g, g.builder.add("core.mul", x, x), dim, keepdim))


@aten("aten.logsumexp")
def _logsumexp(g: Graph, x: Value, dim: Any, keepdim: bool = False) -> Value:
    top = HANDLERS["aten.amax"](g, x, dim, True)
    total = HANDLERS["aten.sum"](g, g.builder.add("core.exp", g.builder.add("core.sub", x, top)), dim, True)
    y = g.builder.add("core.add", g.builder.add("core.log", total), top)
    return y if keepdim else squeeze(g, y, dim)


@aten("aten.cumsum")
def _cumsum(g: Graph, x: Value, dim: int, dtype: str | None = None) -> Value:
    return g.builder.add("core.cumsum", g.cast(x, dtype) if dtype else x, axis=normalize_axis(x, dim))


@aten("aten.argmax")
def _argmax(g: Graph, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    if dim is None:
        raise MoecError("argmax over all axes is not understood")
    return _max(g, x, dim, keepdim)[1]


@aten("aten.topk")
def _topk(g: Graph, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not largest:
        raise MoecError("topk of the smallest is not understood")
    return g.builder.add_all("core.topk", x, k=int(k), axis=normalize_axis(x, dim))


@aten("aten.layer_norm")
def _layer_norm(
    g: Graph, x: Value, shape: Any, w: Value | None = None, b: Value | None = None, eps: float = 1e-5, *rest: Any
) -> Value:
    if len(shape) != 1:
        raise MoecError(f"layer_norm over {len(shape)} axes is not understood")
    return g.builder.add("nn.layer_norm", x, w, b, eps=eps, hint=_last_name(g))


# --- indexing and constants ------------------------------------------------------------------------------------


@aten("aten.embedding")
def _embedding(g: Graph, table: Value, ids: Value, *args: Any) -> Value:
    return g.builder.add("nn.embedding", ids, table)


@aten("aten.gather")
def _gather(g: Graph, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Value:
    return g.builder.add("core.gather", x, index, axis=normalize_axis(x, dim))


@aten("aten.scatter")
def _scatter(g: Graph, x: Value, dim: int, index: Value, src: Any) -> Value:
    if not isinstance(src, Value):
        src = g.builder.add("core.full", shape=index.type.shape, value=float(src), dtype=x.type.dtype)
    return g.builder.add("core.scatter", x, index, src, axis=normalize_axis(x, dim))


@aten("aten.one_hot")
def _one_hot(g: Graph, ids: Value, classes: int) -> Value:
    if classes < 0:
        raise MoecError("one_hot without the number of classes is not understood", todo="give num_classes")
    column = reshape(g, ids, (*ids.type.shape, 1))
    return g.cast(g.builder.add("core.eq", column, g.builder.add("core.iota", size=size(classes))), "i64")


@aten("aten.index_select")
def _index_select(g: Graph, x: Value, dim: int, index: Value | Place) -> Value | Rows:
    if isinstance(index, Place):
        rows = take_rows(g, x, [index]) if normalize_axis(x, dim) == 0 else None
        if rows is None:
            raise MoecError(f"index_select along axis {dim} by places that a mask chooses is not understood")
        return rows
    return g.builder.add("core.take", x, index, axis=normalize_axis(x, dim))


@aten("aten.index")
def _index(g: Graph, x: Value, indices: list[Any]) -> Value | Rows:
    if (rows := take_rows(g, x, indices)) is not None:
        return rows
    given = [i for i, index in enumerate(indices) if index is not None]
    if len(given) != 1 or indices[given[0]].type.dtype == "bool":
        raise MoecError("indexing with several tensors or with a mask is not understood")
    return g.builder.add("core.take", x, indices[given[0]], axis=given[0])


@aten("aten.index_put")
def _index_put(g: Graph, x: Value, indices: list[Any], value: Value | Rows, accumulate: bool = False) -> Value:
    """Write one number where a mask is set, or rows back to where they were taken from."""
    if isinstance(value, Rows):
        return write_rows(g, x, indices, value, accumulate)
    if accumulate or len(indices) != 1 or indices[0].type.shape != x.type.shape or value.type.elements != 1:
        raise MoecError("writing by indices, or other than one number by a mask, is not understood")
    return g.builder.add("core.where", indices[0], value, x)


@aten("aten.scalar_tensor")
def _scalar_tensor(g: Graph, number: Any, dtype: str = "f32", **kwargs: Any) -> Value:
    return g.scalar(number, dtype)


@aten("aten.arange")
def _arange(g: Graph, *args: Any, **kwargs: Any) -> Value:
    start, end = (0, args[0]) if len(args) == 1 else args[:2]
    if len(args) > 2 and args[2] != 1:
        raise MoecError(f"arange in steps of {args[2]} is not understood")
    counted = g.builder.add("core.iota", size=size(end) - size(start))
    dtype = kwargs.get("dtype") or "i64"
    counted = g.cast(counted, dtype)
    if size(start) == 0:
        return counted
    if not size(start).is_Integer:
        raise MoecError("arange from a size that is not known when compiling is not understood")
    return g.builder.add("core.add", counted, g.scalar(int(start), dtype))


def _filled_handler(value: float | None, like: bool, new: bool) -> Handler:
    def handler(g: Graph, *args: Any, dtype: str | None = None, fill_value: Any = None, **kwargs: Any) -> Value:
        rest = list(args)
        source: Any = rest.pop(0) if like or new else None
        shape = source.type.shape if like else tuple(size(s) for s in rest.pop(0))
        number = value if value is not None else fill_value if fill_value is not None else rest.pop(0)
        kind = dtype or (source.type.dtype if source is not None else "f32")
        if isinstance(number, (int, float)) and not math.isfinite(number) and not kind.startswith(("f", "b")):
            raise MoecError(f"{number} does not fit into {kind}")
        return g.builder.add("core.full", shape=tuple(shape), value=number, dtype=kind)

    return handler


for _name, _number in (("zeros", 0.0), ("ones", 1.0), ("full", None)):
    aten(f"aten.{_name}")(_filled_handler(_number, False, False))
    aten(f"aten.{_name}_like")(_filled_handler(_number, True, False))
    aten(f"aten.new_{_name}")(_filled_handler(_number, False, True))
