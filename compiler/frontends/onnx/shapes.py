"""The operators of ONNX on shapes, each declared once: views, cuts, joins, and what they make of a mask's places."""

from __future__ import annotations

from typing import Any

import sympy

from ...errors import MoecError
from ...ir.dims import Size, evaluate, size
from ...ir.dtypes import dtype_name
from ...ir.module import Value
from ...ops.define import broadcast_shapes
from ..aten.chosen_rows import Place, Rows
from ..aten.lower import Proxy, reshape, resolve_shape
from .attention import append_state
from .graph import OnnxGraph, operator
from .indexing import CHOSEN, Elements, Places
from .node import COMPUTED, Node
from .numbers import Numbers

_END = (1 << 31) - 1  # as the stop of a Slice: up to the end of the axis


@operator("Constant")
def _constant(g: OnnxGraph, node: Node) -> Any:
    attributes = node.attributes
    if "value" in attributes:
        if not attributes["value"].HasField("t"):
            raise MoecError("the attribute value of Constant is no tensor")
        return g.add_constant(attributes["value"].t)
    for name, dtype in (("value_int", "i64"), ("value_ints", "i64"), ("value_float", "f32"), ("value_floats", "f32")):
        if name in attributes:
            found = attributes[name]
            plural = name.endswith("s")
            values = list(found.ints or found.floats) if plural else found.i if dtype == "i64" else found.f
            return Numbers.of(values, dtype)
    raise MoecError(f"Constant of {', '.join(attributes) or 'nothing'}")


@operator("Shape")
def _shape(g: OnnxGraph, node: Node) -> Numbers:
    x = node.inputs[0]
    if isinstance(x, Place):
        return Numbers.of([CHOSEN], "i64")
    shape = list(g.value(x).type.shape)
    end = node.integer("end", len(shape))
    return Numbers.of(shape[slice(node.integer("start", 0), end)], "i64")


@operator("Size")
def _size(g: OnnxGraph, node: Node) -> Numbers:
    return Numbers.of(g.value(node.inputs[0]).type.elements, "i64")


@operator("Reshape")
def _reshape(g: OnnxGraph, node: Node) -> Any:
    x, wanted = g.operand(node.inputs[0], None), node.numbers(1, "the shape").sizes
    if isinstance(x, Rows) and wanted == [-1]:
        return Elements(x)
    if isinstance(x, Proxy):
        return g.call("aten.reshape", x, wanted)
    if not node.integer("allowzero", 0):
        wanted = [x.type.shape[i] if n == 0 and i < len(x.type.shape) else n for i, n in enumerate(wanted)]
    shape = resolve_shape(x, wanted)
    return reshape(g, _repeated_rows(g, x, shape) or x, shape)


def _repeated_rows(g: OnnxGraph, x: Value, shape: tuple[Size, ...]) -> Value | None:
    """Return rows [T*K, D] that are each of T rows K times, looked up by their numbers; None for another reshape.

    That is how experts get their tokens where each row is multiplied by a copy of its expert's weights.
    """
    spread = g.producer(x)
    if spread is None or spread.name != "core.expand" or len(x.type.shape) != 3 or len(shape) < 2:
        return None
    (tokens, times, width), column = x.type.shape, spread.inputs[0]
    if column.type.shape != (tokens, 1, width) or shape[0] != size(tokens * times) or tokens.is_Integer:
        return None
    made = g.producer(column)
    flat = (tokens, width)
    rows = made.inputs[0] if made and made.inputs[0].type.shape == flat else reshape(g, column, flat)
    numbers = reshape(g, g.builder.add("core.iota", size=tokens), (tokens, 1))
    places = reshape(g, g.builder.add("core.expand", numbers, shape=(tokens, times)), (tokens * times,))
    return g.builder.add("core.take", rows, places, axis=0)


@operator("Flatten")
def _flatten(g: OnnxGraph, node: Node) -> Value:
    x = g.value(node.inputs[0])
    axis = node.integer("axis", 1) % (len(x.type.shape) + 1)
    return reshape(g, x, (sympy.Mul(*x.type.shape[:axis]), sympy.Mul(*x.type.shape[axis:])))


@operator("Transpose")
def _transpose(g: OnnxGraph, node: Node) -> Any:
    x = node.inputs[0]
    if isinstance(x, Places):
        return x.turned()
    x = g.value(x)
    perm = node.integers("perm") or list(reversed(range(len(x.type.shape))))
    return g.builder.add("core.transpose", x, perm=tuple(perm))


@operator("Unsqueeze")
def _unsqueeze(g: OnnxGraph, node: Node) -> Any:
    x, axes = g.operand(node.inputs[0], None), node.axes(node.inputs[1] if len(node.inputs) > 1 else None) or []
    if isinstance(x, Proxy):
        for axis in axes:
            x = g.call("aten.unsqueeze", x, axis)
        return x
    rank = len(x.type.shape) + len(axes)
    places = {axis % rank for axis in axes}
    if len(places) < len(axes):
        raise MoecError(f"Unsqueeze of {x.type} at {axes}")
    kept = iter(x.type.shape)
    return reshape(g, x, tuple(size(1) if i in places else next(kept) for i in range(rank)), hint="unsqueeze")


@operator("Squeeze")
def _squeeze(g: OnnxGraph, node: Node) -> Any:
    x, axes = g.operand(node.inputs[0], None), node.axes(node.inputs[1] if len(node.inputs) > 1 else None)
    if isinstance(x, Places):
        return x.single()
    return g.call("aten.squeeze", x, axes)


@operator("Expand")
def _expand(g: OnnxGraph, node: Node) -> Any:
    x = g.operand(node.inputs[0], None)
    if isinstance(x, Rows) and not isinstance(node.inputs[1], Numbers):
        return x  # to as many rows as the mask chooses, which they are
    wanted = node.numbers(1, "the shape").sizes
    if isinstance(x, Proxy):
        return g.call("aten.expand", x, wanted)
    shape = broadcast_shapes(x.type.shape, tuple(size(n) for n in wanted))
    return x if shape == x.type.shape else g.builder.add("core.expand", x, shape=shape)


@operator("Concat")
def _concat(g: OnnxGraph, node: Node) -> Any:
    if node.inputs and all(isinstance(item, Place) for item in node.inputs):
        return Places.joined([item for item in node.inputs if isinstance(item, Place)])
    xs = [g.value(item) for item in node.inputs]
    axis = node.integer("axis")
    if len(xs) == 2 and xs[0].type.state:
        return append_state(g, xs[0], xs[1], axis % len(xs[0].type.shape))
    return g.call("aten.cat", xs, axis)


@operator("Split")
def _split(g: OnnxGraph, node: Node) -> Any:
    x, axis = g.value(node.inputs[0]), node.integer("axis", 0)
    length = x.type.shape[axis % len(x.type.shape)]
    if node.has(1):
        sizes: Any = node.numbers(1, "the sizes").sizes
    elif (sizes := node.integers("split")) is None:
        sizes = -(-int(length) // node.integer("num_outputs", len(node.proto.output)))
    parts = g.call("aten.split", x, sizes, axis)
    return parts


@operator("Slice")
def _slice(g: OnnxGraph, node: Node) -> Any:
    x = g.operand(node.inputs[0], None)
    starts, stops = (node.numbers(place, "a bound").sizes for place in (1, 2))
    axes = node.numbers(3, "the axes").integers if node.has(3) else list(range(len(starts)))
    steps = node.numbers(4, "the steps").integers if node.has(4) else [1] * len(starts)
    if isinstance(x, Places):
        return x.column(starts, stops, axes)
    for start, stop, axis, step in zip(starts, stops, axes, steps, strict=True):
        if step < 1:
            raise MoecError(f"Slice in steps of {step}")
        if isinstance(x, Value):
            _check_bounds(x.type.shape[axis % len(x.type.shape)], start, stop)
        x = g.call("aten.slice", x, axis, start, None if isinstance(stop, int) and stop >= _END else stop, step)
    return x


def _check_bounds(length: Size, *bounds: Any) -> None:
    """Raise MoecError for a bound that may lie outside of an axis whose length is not known when compiling."""
    if length.is_Integer:
        return
    least = evaluate(length, {s.name: 1 for s in length.free_symbols})
    for bound in bounds:
        if isinstance(bound, int) and bound < _END and abs(bound) > max(least, 1):
            raise MoecError(f"Slice at {bound} of an axis of {length}, which may be shorter")


@operator("Tile")
def _tile(g: OnnxGraph, node: Node) -> Any:
    return g.call("aten.repeat", g.value(node.inputs[0]), node.numbers(1, "the repeats").integers)


@operator("Pad")
def _pad(g: OnnxGraph, node: Node) -> Any:
    x, amounts = g.value(node.inputs[0]), node.numbers(1, "the widths").sizes
    rank = len(x.type.shape)
    axes = [a % rank for a in node.numbers(3, "the axes").integers] if node.has(3) else list(range(rank))
    if len(amounts) != 2 * len(axes):
        raise MoecError(f"Pad of {len(axes)} axes by {len(amounts)} widths")
    around = {axis: (amounts[i], amounts[i + len(axes)]) for i, axis in enumerate(axes)}
    spelled = [n for axis in reversed(range(rank)) for n in around.get(axis, (0, 0))]
    value = node.numbers(2, "the value").single if node.has(2) else 0
    return g.call("aten.pad", x, spelled, node.text("mode", "constant"), value)


@operator("ConstantOfShape")
def _constant_of_shape(g: OnnxGraph, node: Node) -> Value:
    value = node.tensor("value")
    if value is not None and value.size != 1:
        raise MoecError("ConstantOfShape of several numbers")
    number, dtype = (0.0, "f32") if value is None else (value.ravel()[0].item(), _dtype_of(value))
    return g.builder.add("core.full", shape=tuple(node.numbers(0, "the shape").sizes), value=number, dtype=dtype)


def _dtype_of(value: Any) -> str:
    name = dtype_name(value.dtype)
    return COMPUTED.get(name, name)
