"""The operators of ONNX that compute elements, matrices and reductions, each declared once."""

from __future__ import annotations

from functools import reduce
from typing import Any

import sympy

from ...errors import MoecError
from ...ir.dims import size
from ...ir.module import Value
from ...weights.steps.table import step
from ..aten.lower import Proxy
from .graph import OnnxGraph, Operator, operator
from .node import Item, Node
from .numbers import Numbers

# operators that aten has under another name, with the same operands
_BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Pow": "pow", "Equal": "eq", "Less": "lt", "LessOrEqual": "le",
    "Greater": "gt", "GreaterOrEqual": "ge", "And": "logical_and", "Or": "logical_or",
}  # fmt: skip
_UNARY = {
    "Neg": "neg", "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Sin": "sin", "Cos": "cos", "Tanh": "tanh",
    "Sigmoid": "sigmoid", "Relu": "relu", "Abs": "abs", "Floor": "floor", "Erf": "erf", "Reciprocal": "reciprocal",
    "Not": "logical_not", "Softplus": "softplus", "Swish": "silu",
}  # fmt: skip
_REDUCED = {"ReduceSum": "sum", "ReduceMean": "mean", "ReduceMax": "amax", "ReduceL2": "linalg_vector_norm"}


def _binary_operator(name: str) -> Operator:
    def write(g: OnnxGraph, node: Node) -> Any:
        x, y = node.inputs
        a, b = g.operand(x, y), g.operand(y, x)
        if name == "mul" and (gated := _gate_by_sigmoid(g, a, b)) is not None:
            return gated
        if name == "add" and (biased := _add_bias(g, a, b) or _add_bias(g, b, a)) is not None:
            return biased
        return g.call(f"aten.{name}", a, b)

    return write


for _type, _name in _BINARY.items():
    operator(_type)(_binary_operator(_name))


def _gate_by_sigmoid(g: OnnxGraph, x: Any, y: Any) -> Any:
    """Return silu(x) for x sigmoid(x), which exporters spell out; None for another product."""
    for a, b in ((x, y), (y, x)):
        value = b.value if isinstance(b, Proxy) and hasattr(b, "value") else b
        made = g.producer(value)
        if made is not None and made.name == "core.sigmoid" and made.inputs[0] == getattr(a, "value", a):
            return g.call("aten.silu", a)
    return None


def _add_bias(g: OnnxGraph, x: Any, bias: Any) -> Value | None:
    """Return a linear with a bias for one to which a weight is added; None for another sum."""
    made = g.producer(x)
    if made is None or made.name != "core.linear" or made.get("b") is not None or not isinstance(bias, Value):
        return None
    if bias.name not in g.builder.consts or bias.type.shape != made["w"].type.shape[:1]:
        return None
    return g.builder.add("core.linear", made["x"], made["w"], bias)


def _unary_operator(name: str) -> Operator:
    def write(g: OnnxGraph, node: Node) -> Any:
        if node.type == "Swish" and node.number("alpha", 1.0) != 1.0:
            raise MoecError(f"Swish with alpha = {node.number('alpha')}")
        (x,) = node.inputs
        return g.call(f"aten.{name}", g.operand(x, None))

    return write


for _type, _name in _UNARY.items():
    operator(_type)(_unary_operator(_name))


@operator("Div")
def _divide(g: OnnxGraph, node: Node) -> Any:
    x, y = node.inputs
    dtypes = {item.type.dtype if isinstance(item, Value) else getattr(item, "dtype", "f32") for item in (x, y)}
    if not all(dtype.startswith("f") for dtype in dtypes):
        raise MoecError("Div of integers, which rounds towards 0")
    return g.call("aten.div", g.operand(x, y), g.operand(y, x))


@operator("Max", "Min")
def _extreme(g: OnnxGraph, node: Node) -> Any:
    name = "aten.maximum" if node.type == "Max" else "aten.minimum"
    if len(node.inputs) == 2:
        numbers = [item.single for item in node.inputs if isinstance(item, Numbers) and item.array.size == 1]
        values = [item for item in node.inputs if not isinstance(item, Numbers)]
        if len(numbers) == len(values) == 1 and isinstance(numbers[0], float):
            bounds = {"min" if node.type == "Max" else "max": numbers[0]}
            return g.call("aten.clamp", g.operand(values[0], None), **bounds)
    return reduce(lambda x, y: g.call(name, x, g.operand(y, x)), node.inputs[1:], g.operand(node.inputs[0], None))


@operator("Clip")
def _clip(g: OnnxGraph, node: Node) -> Any:
    x, bounds = g.operand(node.inputs[0], None), [None, None]
    for place in (1, 2):
        if node.has(place):
            bounds[place - 1] = g.operand(node.inputs[place], x)
    return g.call("aten.clamp", x, *bounds)


@operator("Where")
def _where(g: OnnxGraph, node: Node) -> Any:
    condition, x, y = node.inputs
    c = g.operand(condition, None)
    if not isinstance(x, Value) and not isinstance(y, Value):
        return g.call("aten.where", c, g.value(x), g.value(y))
    return g.call("aten.where", c, g.operand(x, y), g.operand(y, x))


@operator("Cast", "CastLike")
def _cast(g: OnnxGraph, node: Node) -> Any:
    dtype = node.dtype("to") if node.type == "Cast" else g.value(node.inputs[1]).type.dtype
    return g.call("aten.to", g.operand(node.inputs[0], None), dtype=dtype)


@operator("Gelu")
def _gelu(g: OnnxGraph, node: Node) -> Any:
    return g.call("aten.gelu", g.operand(node.inputs[0], None), approximate=node.text("approximate", "none"))


@operator("Identity", "Dropout")
def _unchanged(g: OnnxGraph, node: Node) -> Item:
    if node.type == "Dropout" and node.has(2) and node.numbers(2, "training_mode").single:
        raise MoecError("Dropout in training")
    found = node.inputs[0]
    if found is None:
        raise MoecError(f"{node.type} has no input")
    return found


@operator("MatMul")
def _matmul(g: OnnxGraph, node: Node) -> Any:
    x, y = (g.operand(item, None) for item in node.inputs)
    if isinstance(y, Value) and len(y.type.shape) == 2 and y.name in g.builder.consts:
        return g.call("aten.linear", x, transposed(g, y))
    ranks = [len(v.type.shape) for v in (x, y) if isinstance(v, Value)]
    if 1 in ranks:
        raise MoecError("MatMul of a vector")
    return g.call("aten.matmul", x, y)


def transposed(g: OnnxGraph, w: Value) -> Value:
    """Return a matrix the other way round; a weight is one of its own, made once for all its readers."""
    if w.name not in g.builder.consts:
        return g.builder.add("core.transpose", w, perm=(1, 0))
    if w.name not in g.turned:
        recipe = step("transpose", g.builder.consts[w.name].recipe, perm=(1, 0))
        g.turned[w.name] = g.builder.const(w.name, recipe)
    return g.turned[w.name]


@operator("Gemm")
def _gemm(g: OnnxGraph, node: Node) -> Any:
    x, w = g.operand(node.inputs[0], None), g.value(node.inputs[1])
    if node.integer("transA", 0):
        x = transposed(g, g.value(x))
    if len(w.type.shape) != 2:
        raise MoecError(f"Gemm of {w.type}, which is no matrix")
    if not node.integer("transB", 0):
        w = transposed(g, w)
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    bias = g.value(node.inputs[2]) if node.has(2) and beta else None
    if bias is not None and alpha == beta == 1 and bias.type.shape == w.type.shape[:1]:
        return g.call("aten.linear", x, w, bias)
    y = g.call("aten.linear", x, w)
    y = y if alpha == 1 else g.call("aten.mul", y, alpha)
    if bias is None:
        return y
    return g.call("aten.add", y, bias if beta == 1 else g.call("aten.mul", bias, beta))


@operator("Einsum")
def _einsum(g: OnnxGraph, node: Node) -> Any:
    return g.call("aten.einsum", node.text("equation"), [g.value(item) for item in node.inputs])


def _reduction_operator(name: str) -> Operator:
    def write(g: OnnxGraph, node: Node) -> Any:
        x = g.operand(node.inputs[0], None)
        axes = node.axes(node.inputs[1] if len(node.inputs) > 1 else None)
        keep = bool(node.integer("keepdims", 1))
        if not axes and node.integer("noop_with_empty_axes", 0):
            return x
        dims = {"dim": axes} if axes else {}
        return g.call(f"aten.{name}", x, keepdim=keep, **dims)

    return write


for _type, _name in _REDUCED.items():
    operator(_type)(_reduction_operator(_name))


@operator("Softmax")
def _softmax(g: OnnxGraph, node: Node) -> Any:
    return g.call("aten.softmax", g.operand(node.inputs[0], None), node.integer("axis", -1))


@operator("CumSum")
def _cumsum(g: OnnxGraph, node: Node) -> Any:
    if node.integer("exclusive", 0) or node.integer("reverse", 0):
        raise MoecError("CumSum that is exclusive or from the back")
    return g.call("aten.cumsum", g.value(node.inputs[0]), node.numbers(1, "the axis").single)


@operator("TopK")
def _topk(g: OnnxGraph, node: Node) -> Any:
    if not node.integer("largest", 1):
        raise MoecError("TopK of the smallest")
    return g.call("aten.topk", g.value(node.inputs[0]), node.numbers(1, "k").single, node.integer("axis", -1))


@operator("ArgMax")
def _argmax(g: OnnxGraph, node: Node) -> Any:
    if node.integer("select_last_index", 0):
        raise MoecError("ArgMax that takes the last of equal elements")
    return g.call("aten.argmax", g.value(node.inputs[0]), node.integer("axis", 0), bool(node.integer("keepdims", 1)))


@operator("OneHot")
def _one_hot(g: OnnxGraph, node: Node) -> Any:
    ids, depth = g.value(node.inputs[0]), node.numbers(1, "the depth").single
    values = node.inputs[2]
    if not isinstance(values, Numbers) or values.sizes != [0, 1] or node.integer("axis", -1) != -1:
        raise MoecError("OneHot of other numbers than 0 and 1, or along another axis than a new last one")
    return g.cast(g.call("aten.one_hot", g.cast(ids, "i64"), depth), values.dtype)


@operator("Range")
def _range(g: OnnxGraph, node: Node) -> Any:
    start, stop, step = (node.numbers(place, "a bound").single for place in range(3))
    if step != 1 or not all(isinstance(n, (int, sympy.Expr)) for n in (start, stop)):
        raise MoecError(f"Range from {start} to {stop} in steps of {step}")
    counted = g.builder.add("core.iota", size=size(stop) - size(start))
    return counted if start == 0 else g.call("aten.add", counted, g.size_value(size(start)))
