"""Rows that a mask chooses, in code that loops over experts: `token, choice = torch.where(ids == e)`, `expert(x[token])`.

How many rows there are depends on data, which no size of the IR can say. What is computed for each row alone is
written for all rows instead, and where rows are added to a result, those that the mask leaves out get the factor 0.
The pass raise-experts reads such sums over all experts as one choice of experts for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...errors import MoecError
from ...ir.module import Value
from .lower import Graph, Proxy, aten, normalize_axis, reshape

_RESHAPING = {f"aten.{name}" for name in ("view", "reshape", "unsqueeze", "squeeze")}
_MOVING = {f"aten.{name}" for name in ("to", "_to_copy", "type_as", "contiguous", "clone", "detach")}
_BY_ROW = _MOVING | {
    f"aten.{name}" for name in (
        "linear", "matmul", "mm", "addmm", "layer_norm", "silu", "gelu", "relu", "sigmoid", "tanh", "softplus", "neg", "exp",
        "square", "pow", "mul", "add", "sub", "div", "clamp", "clamp_min", "clamp_max", "dropout", "chunk", "split",
        "split_with_sizes", "slice",
    )
}  # fmt: skip
_WRITING = {"aten.index", "aten.index_select", "aten.index_add", "aten.index_put", "aten.scatter_add"}


@dataclass(frozen=True)
class Place(Proxy):
    """What `where` gives for one axis of a mask: where along it each chosen element is."""

    mask: Value
    axis: int

    def apply(self, g: Graph, name: str, handler: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Return the places repeated for each feature as they are; MoecError for what computes with them."""
        base = name.rpartition(".")[0] if name.count(".") > 1 else name
        if base in _WRITING:
            return handler(g, *args, **kwargs)
        if base in _RESHAPING | _MOVING | {"aten.expand", "aten.repeat"}:
            return self
        raise MoecError(f"{name} of the places that a mask chooses is not understood")


@dataclass(frozen=True)
class Rows(Proxy):
    """What is computed for the chosen rows, written for all: `value` has a row for each place along `axis` of the mask.

    `weight` is a number for each element of the mask that the row is multiplied by. Without a `value` the rows are these
    numbers themselves. `base` is the tensor whose rows have been added, which it is to be written back into.
    """

    mask: Value
    axis: int
    value: Value | None
    weight: Value | None = None
    base: Value | None = None

    def apply(self, g: Graph, name: str, handler: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Return what an operator makes of rows; MoecError for one that does not work on each row alone."""
        base = name.rpartition(".")[0] if name.count(".") > 1 else name
        if base in _WRITING:
            return handler(g, *args, **kwargs)
        rows = [a for a in args if isinstance(a, Rows)]
        if any(r.mask != self.mask for r in rows):
            raise MoecError("rows of two masks meet, which is not understood")
        if base in _RESHAPING:
            return self._reshaped(g, base, args)
        if base == "aten.mul" and len(rows) == 2 and (weighted := _weigh(*rows)) is not None:
            return weighted
        if base == "aten.add" and len(rows) == 2 and (kept := next((r for r in rows if r.value == r.base), None)):
            return replace(rows[1 - rows.index(kept)], base=kept.base)
        if base in _MOVING and self.value is None:
            return replace(self, weight=handler(g, self.weight, *args[1:], **kwargs))
        if base not in _BY_ROW or any(r.value is None or (r.weight and base not in _MOVING) for r in rows):
            raise MoecError(f"{name} of rows that a mask chooses is not understood")
        made = handler(g, *[a.value if isinstance(a, Rows) else a for a in args], **kwargs)
        if isinstance(made, (tuple, list)):
            return tuple(replace(self, value=part, base=None) for part in made)
        return replace(self, value=made, base=None)

    def _reshaped(self, g: Graph, base: str, args: list[Any]) -> Rows:
        """Return rows of another shape; the number of rows stays what it is, so that a mask's numbers stay as they are."""
        if self.value is None:
            return self
        if base not in ("aten.view", "aten.reshape"):
            raise MoecError(f"{base} of rows that a mask chooses is not understood")
        sizes = list(args[1])
        tail = [int(n) for n in sizes[1:] if isinstance(n, int) or getattr(n, "is_Integer", False)]
        if len(tail) != len(sizes) - 1 or -1 in tail:
            raise MoecError("rows that a mask chooses are put into another number of rows, which is not understood")
        return replace(self, value=reshape(g, self.value, (self.value.type.shape[0], *tail)))


def _weigh(a: Rows, b: Rows) -> Rows | None:
    """Return rows times numbers of the mask, which stay apart until the rows are added to a result."""
    weight, rows = (a, b) if a.value is None else (b, a)
    if weight.value is not None:
        return None
    if rows.value is None or rows.weight is not None:
        raise MoecError("rows that a mask chooses are weighted twice, which is not understood")
    return replace(rows, weight=weight.weight)


@aten("aten.where.default", "aten.nonzero_numpy")
def where_true(g: Graph, mask: Value) -> tuple[Place, ...]:
    """Return the places of what is true, for each axis of the mask."""
    if mask.type.dtype != "bool":
        mask = g.builder.add("core.ne", mask, g.like(0, mask))
    return tuple(Place(mask, axis) for axis in range(len(mask.type.shape)))


def take_rows(g: Graph, x: Value, indices: list[Any]) -> Rows | None:
    """Return the rows of `x` that places or a mask choose; None where the indices are neither."""
    places = _places_of(g, indices)
    if places is None:
        return None
    mask, axes = places[0].mask, [p.axis for p in places]
    if len(places) == 1:
        if x.type.shape[0] != mask.type.shape[axes[0]]:
            raise MoecError(f"{x.type} is indexed by the places of {mask.type}, which is not understood")
        if len(x.type.shape) == 1:
            return Rows(mask, axes[0], None, _like_mask(g, x, mask, axes[0]))
        return Rows(mask, axes[0], x, base=x)
    if any(p.mask != mask for p in places) or sorted(axes) != list(range(len(mask.type.shape))):
        raise MoecError("rows are taken by the places of two masks, which is not understood")
    rest = x.type.shape[len(axes) :]
    flat = reshape(g, x, x.type.shape[: len(axes)]) if rest and all(n == 1 for n in rest) else x
    perm = tuple(axes.index(axis) for axis in range(len(axes)))
    weight = flat if perm == tuple(range(len(perm))) else g.builder.add("core.transpose", flat, perm=perm)
    if weight.type.shape != mask.type.shape:
        raise MoecError(f"{x.type} is indexed by the places of {mask.type}, which is not understood")
    return Rows(mask, -1, None, weight)


def _like_mask(g: Graph, x: Value, mask: Value, axis: int) -> Value:
    """Return numbers along one axis of a mask as numbers of all its elements."""
    if len(mask.type.shape) == 1:
        return x
    column = reshape(g, x, tuple(n if i == axis else 1 for i, n in enumerate(mask.type.shape)))
    return g.builder.add("core.expand", column, shape=mask.type.shape)


def _places_of(g: Graph, indices: list[Any]) -> list[Place] | None:
    given = [index for index in indices if index is not None]
    if len(given) == len(indices) and given and all(isinstance(index, Place) for index in given):
        return given
    if len(indices) == 1 and isinstance(indices[0], Value) and indices[0].type.dtype == "bool":
        places = list(where_true(g, indices[0]))
        return places if len(places) == 1 else None
    return None


@aten("aten.index_add", "aten.scatter_add")
def _index_add(g: Graph, target: Value, dim: int, place: Any, rows: Any, alpha: Any = 1) -> Value:
    if not isinstance(place, Place) or not isinstance(rows, Rows) or alpha != 1:
        raise MoecError("adding other rows than a mask chooses by their places is not understood")
    if normalize_axis(target, dim) != 0:
        raise MoecError(f"adding rows along axis {dim} is not understood")
    return add_rows(g, target, place, rows)


def add_rows(g: Graph, target: Value, place: Place, rows: Rows) -> Value:
    """Return a tensor to which rows are added where they were taken from."""
    if rows.value is None or (rows.mask, rows.axis) != (place.mask, place.axis):
        raise MoecError("rows are added elsewhere than where they were taken from, which is not understood")
    factor = g.cast(place.mask, rows.value.type.dtype)
    if rows.weight is not None:
        factor = g.builder.add("core.mul", rows.weight, factor)
    others = tuple(a for a in range(len(place.mask.type.shape)) if a != place.axis)
    if others:
        factor = g.builder.add("core.sum", factor, axes=others, keepdim=False)
    column = reshape(g, factor, (factor.type.shape[0], *(1 for _ in rows.value.type.shape[1:])))
    return g.builder.add("core.add", target, g.builder.add("core.mul", rows.value, column))


def write_rows(g: Graph, target: Value, indices: list[Any], rows: Rows, accumulate: bool) -> Value:
    """Return a tensor with rows written back, or added, where they were taken from."""
    places = _places_of(g, indices)
    if places is None or len(places) != 1:
        raise MoecError("rows are written elsewhere than where they were taken from, which is not understood")
    if accumulate or (rows.base is not None and rows.base == target and rows.value != target):
        return add_rows(g, target, places[0], replace(rows, base=None))
    if rows.value is None or rows.base not in (None, rows.value):
        raise MoecError("rows are added to others than they are written over, which is not understood")
    if (rows.mask, rows.axis) != (places[0].mask, places[0].axis) or len(rows.mask.type.shape) != 1:
        raise MoecError("rows are written elsewhere than where they were taken from, which is not understood")
    shape = (rows.mask.type.shape[0], *(1 for _ in rows.value.type.shape[1:]))
    weight = rows.weight
    value = rows.value if weight is None else g.builder.add("core.mul", rows.value, reshape(g, weight, shape))
    return g.builder.add("core.where", reshape(g, rows.mask, shape), value, target)
