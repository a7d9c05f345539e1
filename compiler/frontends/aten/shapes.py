"""The handlers of aten's operators on shapes: views, slices, splits, joins. `aten.py` calls them."""

from __future__ import annotations

from typing import Any

import sympy

from ...errors import MoecError
from ...ir.dims import Size, size
from ...ir.module import Value
from ...ir.types import TensorType
from .lower import Graph, aten, normalize_axis, reshape, resolve_shape
from .uninitialised import Piece, Uninitialised


@aten("aten.view", "aten.reshape", "aten._unsafe_view")
def _view(g: Graph, x: Value, shape: Any) -> Value:
    return reshape(g, x, resolve_shape(x, shape))


@aten("aten.flatten")
def _flatten(g: Graph, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    a, b = normalize_axis(x, start_dim), normalize_axis(x, end_dim)
    s = x.type.shape
    return reshape(g, x, (*s[:a], sympy.Mul(*s[a : b + 1]), *s[b + 1 :]))


@aten("aten.unflatten")
def _unflatten(g: Graph, x: Value, dim: int, sizes: Any) -> Value:
    a = normalize_axis(x, dim)
    s = x.type.shape
    known = [size(n) for n in sizes]
    if -1 in known:
        hole = known.index(sympy.Integer(-1))
        known[hole] = s[a] / sympy.Mul(*[k for i, k in enumerate(known) if i != hole])
    return reshape(g, x, (*s[:a], *known, *s[a + 1 :]))


@aten("aten.unsqueeze")
def _unsqueeze(g: Graph, x: Value, dim: int) -> Value:
    a = dim if dim >= 0 else dim + len(x.type.shape) + 1
    return reshape(g, x, (*x.type.shape[:a], 1, *x.type.shape[a:]), hint="unsqueeze")


@aten("aten.squeeze")
def squeeze(g: Graph, x: Value, dim: Any = None) -> Value:
    """Remove axes of size 1."""
    dims = range(len(x.type.shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    drop = {normalize_axis(x, d) for d in dims if x.type.shape[normalize_axis(x, d)] == 1}
    return reshape(g, x, tuple(s for i, s in enumerate(x.type.shape) if i not in drop), hint="squeeze")


@aten("aten.transpose", "aten.swapaxes")
def _transpose(g: Graph, x: Value, a: int, b: int) -> Value:
    perm = list(range(len(x.type.shape)))
    a, b = normalize_axis(x, a), normalize_axis(x, b)
    perm[a], perm[b] = perm[b], perm[a]
    return g.builder.add("core.transpose", x, perm=tuple(perm))


@aten("aten.t", "aten.numpy_T")
def _t(g: Graph, x: Value) -> Value:
    return g.builder.add("core.transpose", x, perm=tuple(reversed(range(len(x.type.shape)))))


@aten("aten.permute")
def _permute(g: Graph, x: Value, dims: Any) -> Value:
    return g.builder.add("core.transpose", x, perm=tuple(normalize_axis(x, d) for d in dims))


@aten("aten.expand")
def _expand(g: Graph, x: Value, shape: Any, implicit: bool = False) -> Value:
    lead = len(shape) - len(x.type.shape)
    sizes = [x.type.shape[i - lead] if s == -1 else size(s) for i, s in enumerate(shape)]
    return x if tuple(sizes) == x.type.shape else g.builder.add("core.expand", x, shape=tuple(sizes))


@aten("aten.repeat_interleave")
def _repeat_interleave(g: Graph, x: Value, repeats: Any, dim: int | None = None, output_size: Any = None) -> Value:
    if not isinstance(repeats, int):
        raise MoecError("repeat_interleave with repeats that are data is not understood")
    a = 0 if dim is None else normalize_axis(x, dim)
    s = (x.type.elements,) if dim is None else x.type.shape
    opened = reshape(g, x, (*s[: a + 1], 1, *s[a + 1 :]))
    repeated = g.builder.add("core.expand", opened, shape=(*s[: a + 1], repeats, *s[a + 1 :]))
    return reshape(g, repeated, (*s[:a], s[a] * repeats, *s[a + 1 :]))


@aten("aten.pad", "aten.constant_pad_nd")
def _pad(g: Graph, x: Value, amounts: Any, mode: str = "constant", value: Any = None) -> Value:
    if mode != "constant":
        raise MoecError(f"padding by {mode} is not understood")
    for i, amount in enumerate(size(n) for n in amounts):
        a = len(x.type.shape) - 1 - i // 2
        if amount == 0:
            continue
        if not amount.is_nonnegative:
            raise MoecError(f"padding by {amount} is not understood")
        shape = (*x.type.shape[:a], amount, *x.type.shape[a + 1 :])
        edge = g.builder.add("core.full", shape=shape, value=float(value or 0), dtype=x.type.dtype)
        x = g.builder.add("core.concat", *((edge, x) if i % 2 == 0 else (x, edge)), axis=a)
    return x


@aten("aten.repeat")
def _repeat(g: Graph, x: Value, repeats: Any) -> Value:
    if len(repeats) != len(x.type.shape) or not all(isinstance(n, int) for n in repeats):
        raise MoecError(f"repeat of {x.type} by {list(repeats)} is not understood")
    for a, count in enumerate(repeats):
        x = x if count == 1 else g.builder.add("core.concat", *[x] * count, axis=a)
    return x


@aten("aten.view_as", "aten.reshape_as")
def _view_as(g: Graph, x: Value, other: Value) -> Value:
    return reshape(g, x, other.type.shape)


@aten("aten.expand_as")
def _expand_as(g: Graph, x: Value, other: Value) -> Value:
    return _expand(g, x, other.type.shape)


@aten("aten.cat", "aten.concat")
def _cat(g: Graph, xs: list[Value], dim: int = 0) -> Value:
    a = normalize_axis(xs[0], dim)
    some = [x for x in xs if x.type.shape[a] != 0] or xs[:1]
    return some[0] if len(some) == 1 else g.builder.add("core.concat", *some, axis=a)


@aten("aten.stack")
def _stack(g: Graph, xs: list[Value], dim: int = 0) -> Value:
    return g.builder.add("core.concat", *[_unsqueeze(g, x, dim) for x in xs], axis=dim % (len(xs[0].type.shape) + 1))


def _slice_bound(x: Value | Uninitialised, a: int, index: Any, default: Any) -> Size:
    """Return a slice bound counted from the front and inside the axis."""
    length = x.type.shape[a]
    if index is None:
        return size(default)
    at = size(index)
    if at.is_Integer and at >= 2**62:
        return length
    if at.is_nonpositive and at != 0:  # also -S: every dim is 0 or more
        return sympy.expand(length + at)
    return sympy.Integer(min(int(at), int(length))) if at.is_Integer and length.is_Integer else at


@aten("aten.new_empty", "aten.empty_like")
def _empty(g: Graph, x: Value, shape: Any = None, dtype: str | None = None, **kwargs: Any) -> Uninitialised:
    sizes = x.type.shape if shape is None else tuple(size(s) for s in shape)
    return Uninitialised(TensorType(dtype or x.type.dtype, sizes))


@aten("aten.copy")
def _copy(g: Graph, target: Any, source: Value, non_blocking: bool = False) -> Any:
    if isinstance(target, Uninitialised):
        target = target.piece(0, size(0), target.type.shape[0])
    if not isinstance(target, Piece):
        raise MoecError("copying into a tensor that has values already is not understood")
    target.fill(g.cast(_expand(g, source, target.type.shape), target.type.dtype))
    return target


@aten("aten.slice")
def _slice(g: Graph, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    a = normalize_axis(x, dim)
    if isinstance(x, Uninitialised):
        return x.piece(a, _slice_bound(x, a, start, 0), _slice_bound(x, a, end, x.type.shape[a]))
    low, high = _slice_bound(x, a, start, 0), _slice_bound(x, a, end, x.type.shape[a])
    if low == 0 and high == x.type.shape[a] and step == 1:
        return x
    extra: dict[str, Any] = {} if step == 1 else {"step": step}
    return g.builder.add("core.slice", x, axis=a, start=low, stop=high, **extra)


@aten("aten.select")
def _select(g: Graph, x: Value, dim: int, index: Any) -> Value:
    a = normalize_axis(x, dim)
    at = _slice_bound(x, a, index, 0)
    piece = g.builder.add("core.slice", x, axis=a, start=at, stop=at + 1)
    return reshape(g, piece, (*x.type.shape[:a], *x.type.shape[a + 1 :]))


@aten("aten.split", "aten.split_with_sizes")
def _split(g: Graph, x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    a = normalize_axis(x, dim)
    length = x.type.shape[a]
    if not isinstance(sizes, (list, tuple)):
        each = int(sizes)
        sizes = [min(each, int(length) - i) for i in range(0, int(length), each)]
    pieces, at = [], size(0)
    for n in sizes:
        pieces.append(g.builder.add("core.slice", x, axis=a, start=at, stop=at + size(n)))
        at += size(n)
    return tuple(pieces)


@aten("aten.chunk")
def _chunk(g: Graph, x: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    return _split(g, x, -(-int(x.type.shape[normalize_axis(x, dim)]) // chunks), dim)


@aten("aten.unbind")
def _unbind(g: Graph, x: Value, dim: int = 0) -> tuple[Value, ...]:
    return tuple(_select(g, x, dim, i) for i in range(int(x.type.shape[normalize_axis(x, dim)])))
