"""Emits the core ops as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import sympy

from ....compiler.ir.module import Op
from .graph import CONTRIB, END, ONNX_TYPES, Context, Kernel

KERNELS: dict[str, Kernel] = {}


def emits(*names: str) -> Callable[[Kernel], Kernel]:
    """Enter a function into KERNELS under the names of the ops that it emits."""

    def enter(function: Kernel) -> Kernel:
        KERNELS.update(dict.fromkeys(names, function))
        return function

    return enter


# --- elementwise: ops that ONNX has under another name ---------------------------------------------------------

_SAME: dict[str, str] = {
    "core.add": "Add", "core.sub": "Sub", "core.mul": "Mul", "core.div": "Div", "core.pow": "Pow",
    "core.maximum": "Max", "core.minimum": "Min", "core.matmul": "MatMul",
    "core.eq": "Equal", "core.lt": "Less", "core.le": "LessOrEqual", "core.gt": "Greater", "core.ge": "GreaterOrEqual",
    "core.logical_and": "And", "core.logical_or": "Or", "core.logical_not": "Not",
    "core.neg": "Neg", "core.exp": "Exp", "core.log": "Log", "core.sqrt": "Sqrt", "core.sin": "Sin",
    "core.cos": "Cos", "core.tanh": "Tanh",  "core.softplus": "Softplus",
    "core.abs": "Abs", "core.erf": "Erf", "core.reciprocal": "Reciprocal",
}  # fmt: skip


@emits(*_SAME)
def emit_same_op(ctx: Context, op: Op) -> None:
    """Emit the one ONNX op of the same meaning."""
    if op.name == "core.add" and op.inputs[0].type == op.inputs[1].type:
        first, second = ctx.inputs(op)
        ctx.graph.sums[ctx.value(op.results[0])] = first, second
    ctx.finish(op, _SAME[op.name], *ctx.inputs(op))


@emits("core.ne")
def not_equal(ctx: Context, op: Op) -> None:
    """Emit not (x == y)."""
    ctx.finish(op, "Not", ctx.node("Equal", *ctx.inputs(op)))


@emits("core.rsqrt")
def emit_rsqrt(ctx: Context, op: Op) -> None:
    """Emit 1 / sqrt(x)."""
    ctx.finish(op, "Reciprocal", ctx.node("Sqrt", *ctx.inputs(op)))


@emits("core.sigmoid")
def emit_sigmoid(ctx: Context, op: Op) -> None:
    """Emit the sigmoid in the way that is right for small numbers too."""
    (x,) = ctx.inputs(op)
    ctx.alias(op.results[0], sigmoid_of(ctx, x, op.results[0].type.dtype))


def sigmoid_of(ctx: Context, x: str, dtype: str) -> str:
    """Add 1 / (1 + exp(-x)): ONNX Runtime's Sigmoid is right to 1e-7 only, which is wrong for a router's small scores."""
    one = ctx.graph.constant(1, dtype)
    return ctx.node("Reciprocal", ctx.node("Add", ctx.node("Exp", ctx.node("Neg", x)), one))


@emits("core.silu")
def emit_silu(ctx: Context, op: Op) -> None:
    """Emit x sigmoid(x), for float32 as the one op that ONNX Runtime has."""
    (x,) = ctx.inputs(op)
    if op.results[0].type.dtype == "f32":
        ctx.finish(op, "QuickGelu", x, domain=CONTRIB, alpha=1.0)
    else:
        ctx.finish(op, "Mul", x, ctx.node("Sigmoid", x))


@emits("ort.quick_gelu")
def quick_gelu(ctx: Context, op: Op) -> None:
    """Emit com.microsoft.QuickGelu."""
    ctx.finish(op, "QuickGelu", *ctx.inputs(op), domain=CONTRIB, alpha=op.settings["alpha"])


@emits("core.relu", "core.floor")
def float_only(ctx: Context, op: Op) -> None:
    """Emit Relu or Floor; ONNX Runtime has them for floats only."""
    (x,) = ctx.inputs(op)
    if op.results[0].type.dtype in ("f32", "f64"):
        ctx.finish(op, "Relu" if op.name == "core.relu" else "Floor", x)
    elif op.name == "core.relu":
        ctx.finish(op, "Max", x, ctx.graph.constant(0, op.results[0].type.dtype))
    else:
        ctx.finish(op, "Identity", x)


@emits("core.gelu")
def emit_gelu(ctx: Context, op: Op) -> None:
    """Emit Gelu with erf or tanh."""
    ctx.finish(op, "Gelu", *ctx.inputs(op), approximate=op.settings.text("approximate"))


@emits("core.clamp")
def emit_clamp(ctx: Context, op: Op) -> None:
    """Emit Clip; a bound of inf is left out."""
    dtype = op.results[0].type.dtype
    attributes = op.settings
    bounds = [float(attributes.number(name)) for name in ("min", "max")]
    names = ["" if np.isinf(b) else ctx.graph.constant(b if dtype[0] == "f" else int(b), dtype) for b in bounds]
    ctx.finish(op, "Clip", *ctx.inputs(op), *names)


@emits("core.where")
def emit_where(ctx: Context, op: Op) -> None:
    """Emit Where; ONNX Runtime lacks it for truth values."""
    condition, x, y = ctx.inputs(op)
    if op.results[0].type.dtype == "bool":
        ctx.finish(op, "Or", ctx.node("And", condition, x), ctx.node("And", ctx.node("Not", condition), y))
    else:
        ctx.finish(op, "Where", condition, x, y)


@emits("core.cast")
def emit_cast(ctx: Context, op: Op) -> None:
    """Emit Cast."""
    ctx.finish(op, "Cast", *ctx.inputs(op), to=ONNX_TYPES[str(op.attributes["to"])])


@emits("onnx.node")
def emit_node(ctx: Context, op: Op) -> None:
    """Emit a node that an ONNX model brought, as it was there."""
    settings = op.settings
    attributes = dict(settings["settings"]) if isinstance(settings["settings"], tuple) else {}
    ctx.finish(op, settings.text("kind"), *ctx.inputs(op), domain=settings.text("domain"), **attributes)


# --- constants -------------------------------------------------------------------------------------------------


@emits("core.constant")
def emit_constant(ctx: Context, op: Op) -> None:
    """Emit a scalar."""
    ctx.finish(op, "Identity", ctx.graph.constant(op.attributes["value"], op.results[0].type.dtype))


@emits("core.iota")
def emit_iota(ctx: Context, op: Op) -> None:
    """Emit Range."""
    graph = ctx.graph
    ctx.finish(op, "Range", graph.constant(0), graph.scalar(op.attributes["size"]), graph.constant(1))


@emits("core.full")
def emit_full(ctx: Context, op: Op) -> None:
    """Emit a scalar expanded to the shape."""
    type_ = op.results[0].type
    ctx.finish(op, "Expand", ctx.graph.constant(op.attributes["value"], type_.dtype), ctx.graph.shape(type_.shape))


# --- matrices --------------------------------------------------------------------------------------------------


def emit_linear(ctx: Context, x: str, w: str, b: str, outputs: list[str]) -> None:
    """Add x wᵀ + b for a weight [out, in], read as it lies: a table tied to the embedding is stored once."""
    if not b:
        ctx.graph.node(ctx.label, "FusedMatMul", [x, w], outputs, ctx.doc, domain=CONTRIB, transB=1)
    else:
        product = ctx.node("FusedMatMul", x, w, domain=CONTRIB, transB=1)
        ctx.graph.node(ctx.label, "Add", [product, b], outputs, ctx.doc)


@emits("core.linear")
def core_linear(ctx: Context, op: Op) -> None:
    """Emit Gemm for rank 2, else FusedMatMul and Add."""
    x, w, b = ctx.inputs(op)
    if len(op.results[0].type.shape) == 2:
        ctx.finish(op, "Gemm", x, w, *([b] if b else []), transB=1)
    else:
        emit_linear(ctx, x, w, b, [ctx.value(op.results[0])])


# --- shapes ----------------------------------------------------------------------------------------------------


@emits("core.reshape")
def emit_reshape(ctx: Context, op: Op) -> None:
    """Emit Reshape."""
    (source,) = op.inputs
    ctx.alias(op.results[0], ctx.reshape(ctx.value(source), source.type.shape, op.results[0].type.shape))


@emits("core.transpose")
def emit_transpose(ctx: Context, op: Op) -> None:
    """Emit Transpose."""
    ctx.finish(op, "Transpose", *ctx.inputs(op), perm=op.attributes.integers("perm"))


@emits("core.expand")
def emit_expand(ctx: Context, op: Op) -> None:
    """Emit Expand; axes that keep their size need not be computed."""
    (source,) = op.inputs
    target = op.results[0].type.shape
    given = (sympy.Integer(1),) * (len(target) - len(source.type.shape)) + source.type.shape
    wanted = [1 if a == b else b for a, b in zip(given, target, strict=True)]
    ctx.finish(op, "Expand", ctx.value(source), ctx.graph.shape(wanted))


@emits("core.slice")
def emit_slice(ctx: Context, op: Op) -> None:
    """Emit Slice."""
    attributes = op.settings
    axis, step = attributes.integer("axis"), attributes["step"]
    (source,) = op.inputs
    stop = END if attributes["stop"] == source.type.shape[axis] else attributes["stop"]
    bounds = [ctx.graph.size(attributes["start"]), ctx.graph.size(stop)]
    ctx.finish(op, "Slice", ctx.value(source), *bounds, ctx.graph.constant([axis]), ctx.graph.constant([step]))


@emits("ort.split")
def emit_split(ctx: Context, op: Op) -> None:
    """Emit Split."""
    sizes = ctx.graph.constant(op.attributes.integers("sizes"))
    ctx.finish(op, "Split", *ctx.inputs(op), sizes, axis=op.attributes["axis"])


@emits("core.concat", "nn.cache_append")
def emit_concat(ctx: Context, op: Op) -> None:
    """Emit Concat."""
    ctx.finish(op, "Concat", *ctx.inputs(op), axis=op.attributes["axis"])


# --- reductions ------------------------------------------------------------------------------------------------


@emits("core.sum", "core.mean", "core.amax")
def emit_reduction(ctx: Context, op: Op) -> None:
    """Emit a reduction."""
    kind = {"core.sum": "ReduceSum", "core.mean": "ReduceMean", "core.amax": "ReduceMax"}[op.name]
    axes = ctx.graph.constant(op.attributes.integers("axes"))
    ctx.finish(op, kind, *ctx.inputs(op), axes, keepdims=int(op.settings.flag("keepdim")))


@emits("core.softmax")
def emit_softmax(ctx: Context, op: Op) -> None:
    """Emit Softmax."""
    ctx.finish(op, "Softmax", *ctx.inputs(op), axis=op.attributes["axis"])


@emits("core.cumsum")
def emit_cumsum(ctx: Context, op: Op) -> None:
    """Emit CumSum."""
    ctx.finish(op, "CumSum", *ctx.inputs(op), ctx.graph.constant(op.attributes["axis"]))


@emits("core.topk")
def emit_topk(ctx: Context, op: Op) -> None:
    """Emit TopK; of equal elements ONNX Runtime takes those with the lowest indices."""
    k = ctx.graph.constant([op.attributes["k"]])
    ctx.finish(op, "TopK", *ctx.inputs(op), k, axis=op.attributes["axis"], largest=1, sorted=1)


@emits("core.argsort")
def emit_argsort(ctx: Context, op: Op) -> None:
    """Emit TopK over the whole axis; it is stable in ONNX Runtime."""
    axis = op.attributes.integer("axis")
    largest = int(op.settings.flag("descending"))
    inputs = [*ctx.inputs(op), ctx.graph.size(op.results[0].type.shape[axis])]
    outputs = [ctx.graph.fresh(f"{ctx.label}/sorted"), ctx.value(op.results[0])]
    ctx.graph.node(ctx.label, "TopK", inputs, outputs, ctx.doc, axis=axis, largest=largest, sorted=1)


# --- indexing --------------------------------------------------------------------------------------------------


@emits("core.gather")
def emit_gather(ctx: Context, op: Op) -> None:
    """Emit GatherElements."""
    ctx.finish(op, "GatherElements", *ctx.inputs(op), axis=op.attributes["axis"])


@emits("core.scatter")
def emit_scatter(ctx: Context, op: Op) -> None:
    """Emit ScatterElements."""
    ctx.finish(op, "ScatterElements", *ctx.inputs(op), axis=op.attributes["axis"])


@emits("core.scatter_add")
def scatter_add(ctx: Context, op: Op) -> None:
    """Emit ScatterElements that adds."""
    ctx.finish(op, "ScatterElements", *ctx.inputs(op), axis=op.attributes["axis"], reduction="add")


@emits("core.take")
def emit_take(ctx: Context, op: Op) -> None:
    """Emit Gather."""
    ctx.finish(op, "Gather", *ctx.inputs(op), axis=op.attributes["axis"])
