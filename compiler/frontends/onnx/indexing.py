"""The operators of ONNX that take and put by indices, each declared once, and the places of what a mask chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import MoecError
from ...ir.dims import dim, size
from ...ir.module import Value
from ..aten.chosen_rows import Place, Rows, take_rows, where_true, write_rows
from ..aten.lower import Graph, Proxy, normalize_axis, reshape
from .graph import OnnxGraph, operator
from .node import Item, Node
from .numbers import Numbers
from .origins import origin_of

POSITIONS = "position_ids"
CHOSEN = dim("chosen_rows")  # how many rows a mask chooses; no size of a program


@dataclass(frozen=True)
class Elements(Proxy):
    """The numbers of rows that a mask chooses, one after the other: an exporter writes them by a mask of elements."""

    rows: Rows

    def apply(self, g: Graph, name: str, handler: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Raise MoecError: nothing but writing them back is understood."""
        raise MoecError(f"{name} of the elements of rows that a mask chooses")


@dataclass(frozen=True)
class Places(Proxy):
    """Where a mask is set, as NonZero gives it: a row (`by_column`: a column) of places for each of these axes."""

    places: tuple[Place, ...]
    by_column: bool = False

    def apply(self, g: Graph, name: str, handler: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Return the places again where nothing but the shape changes; MoecError for what computes with them."""
        if name in ("aten.reshape", "aten.expand", "aten.to"):
            return self
        raise MoecError(f"{name} of the places that a mask chooses")

    def turned(self) -> Places:
        """Return the places with rows and columns swapped."""
        return Places(self.places, not self.by_column)

    def column(self, starts: Sequence[Any], stops: Sequence[Any], axes: Sequence[int]) -> Places:
        """Return those of some axes of the mask, which lie along the columns or rows that are cut."""
        if list(axes) not in ([1], [-1]) if self.by_column else list(axes) not in ([0], [-2]):
            raise MoecError("a cut through the places that a mask chooses")
        return Places(self.places[starts[0] : stops[0]], self.by_column)

    def single(self) -> Place:
        """Return the places along the one axis that is left."""
        if len(self.places) != 1:
            raise MoecError(f"the places along {len(self.places)} axes of a mask are taken for those along one")
        return self.places[0]

    @staticmethod
    def joined(places: Sequence[Place]) -> Places:
        """Return places along several axes, side by side."""
        return Places(tuple(places), by_column=True)


def _places_in(item: Item | None) -> list[Place] | None:
    if isinstance(item, Places):
        return list(item.places)
    return [item] if isinstance(item, Place) else None


@operator("NonZero")
def _non_zero(g: OnnxGraph, node: Node) -> Places:
    return Places(where_true(g, g.value(node.inputs[0])))


@operator("Gather")
def _gather(g: OnnxGraph, node: Node) -> Any:
    x, index = node.inputs
    axis = node.integer("axis", 0)
    if (places := _places_in(index)) is not None:
        if axis != 0 or (rows := take_rows(g, g.value(x), list(places))) is None:
            raise MoecError("Gather by the places that a mask chooses, along another axis than the first")
        return rows
    data = g.value(x)
    axis = normalize_axis(data, axis)
    if isinstance(index, Numbers) and not index.array.shape:
        at = index.single
        length = data.type.shape[axis]
        if isinstance(at, int) and length.is_Integer and not -length <= at < length:
            raise MoecError(f"Gather at {at} of an axis of {length}")
        return g.call("aten.select", data, axis, length + at if isinstance(at, int) and at < 0 else at)
    ids = g.cast(_not_negative(g, index, data, axis), "i64")
    if isinstance(index, Value) and index.name == POSITIONS and data.type.shape[axis].is_Integer:
        g.longest = min(g.longest, int(data.type.shape[axis]))
    if axis == 0 and len(data.type.shape) == 2 and data.name in g.builder.consts and data.type.dtype == "f32":
        return g.builder.add("nn.embedding", ids, data)
    return g.builder.add("core.take", data, ids, axis=axis)


def _not_negative(g: OnnxGraph, index: Item | None, data: Value, axis: int) -> Value:
    """Return indices as a value; those that count from the back, where they are known, from the front."""
    if isinstance(index, Numbers):
        length = data.type.shape[axis]
        index = Numbers.of([n + length if n < 0 else n for n in index.integers], index.dtype)
    return g.value(index)


@operator("GatherElements")
def _gather_elements(g: OnnxGraph, node: Node) -> Value:
    x, index = (g.value(item) for item in node.inputs)
    return g.call("aten.gather", x, node.integer("axis", 0), g.cast(index, "i64"))


@operator("GatherND")
def _gather_nd(g: OnnxGraph, node: Node) -> Any:
    x, index = node.inputs
    if node.integer("batch_dims", 0):
        raise MoecError("GatherND with batches")
    if (places := _places_in(index)) is not None:
        rows = take_rows(g, g.value(x), list(places))
        if rows is None:
            raise MoecError("GatherND by the places of two masks")
        return rows
    ids = g.value(index)
    if ids.type.shape[-1] != 1 and (whole := _whole_grid(g, g.value(x), ids)) is not None:
        return whole
    if ids.type.shape[-1] != 1:
        raise MoecError(f"GatherND by indices along {ids.type.shape[-1]} axes")
    return g.builder.add("core.take", g.value(x), g.cast(reshape(g, ids, ids.type.shape[:-1]), "i64"), axis=0)


def _whole_grid(g: OnnxGraph, x: Value, ids: Value) -> Value | None:
    """Return a tensor taken by the numbers of all its places, each axis along one of the index; None for other indices."""
    joined = g.producer(ids)
    if joined is None or joined.name != "core.concat" or len(joined.inputs) != len(x.type.shape):
        return None
    rest, axes = ids.type.shape[:-1], []
    for part, length in zip(joined.inputs, x.type.shape, strict=True):
        value, made = origin_of(g, part, ("core.expand", "core.reshape"))
        lined = [a for a, n in enumerate(rest) if n == length]
        if made is None or made.name != "core.iota" or value.type.shape != (length,) or len(lined) != 1:
            return None
        axes += lined
    if axes != sorted(set(axes)):
        return None
    opened = reshape(g, x, tuple(n if a in axes else size(1) for a, n in enumerate(rest)))
    return opened if opened.type.shape == rest else g.builder.add("core.expand", opened, shape=rest)


@operator("ScatterElements")
def _scatter_elements(g: OnnxGraph, node: Node) -> Any:
    x, index, updates = node.inputs
    axis, how = node.integer("axis", 0), node.text("reduction", "none")
    if how not in ("none", "add"):
        raise MoecError(f"ScatterElements with the reduction {how}")
    if isinstance(index, Place):
        if how != "add":
            raise MoecError("ScatterElements of rows that a mask chooses, without adding them")
        return g.call("aten.scatter_add", g.value(x), axis, index, updates)
    data, ids = g.value(x), g.cast(g.value(index), "i64")
    source = g.value(updates)
    if how == "add":
        return g.builder.add("core.scatter_add", data, ids, source, axis=normalize_axis(data, axis))
    return g.call("aten.scatter", data, axis, ids, source)


@operator("ScatterND")
def _scatter_nd(g: OnnxGraph, node: Node) -> Any:
    x, index, updates = node.inputs
    how, places = node.text("reduction", "none"), _places_in(index)
    if isinstance(updates, Elements) and places and _spread_from(g, places[0].mask) == updates.rows.mask:
        return write_rows(g, g.value(x), [Place(updates.rows.mask, 0)], updates.rows, how == "add")
    if places is None or not isinstance(updates, Rows) or how not in ("none", "add"):
        raise MoecError("ScatterND of other rows than a mask chooses")
    return write_rows(g, g.value(x), list(places), updates, how == "add")


def _spread_from(g: OnnxGraph, mask: Value) -> Value | None:
    """Return the mask of rows that a mask of elements repeats along the other axes; None where it does not."""
    spread = g.producer(mask)
    if spread is None or spread.name != "core.expand":
        return None
    column = g.producer(spread.inputs[0])
    if column is None or column.name != "core.reshape" or any(n != 1 for n in column.results[0].type.shape[1:]):
        return None
    return column.inputs[0] if column.inputs[0].type.shape == mask.type.shape[:1] else None


@operator("Trilu")
def _trilu(g: OnnxGraph, node: Node) -> Value:
    x = g.value(node.inputs[0])
    shift = node.numbers(1, "the diagonal").single if node.has(1) else 0
    rows, columns = (g.builder.add("core.iota", size=n) for n in x.type.shape[-2:])
    column = reshape(g, rows, (x.type.shape[-2], size(1)))
    other = g.call("aten.sub", columns, column)
    kept = g.call("aten.ge" if node.integer("upper", 1) else "aten.le", other, shift)
    return g.call("aten.where", kept, x, g.like(0, x))
