"""Quantized weights in standard operators: integers of 4 and 8 bits in groups along the last axis.

Codes lie in the data file as for target cpu. Where a whole weight is read they are an initializer of 4 or 8 bits, which
DequantizeLinear reads; of rows or experts that are chosen the bytes are gathered, since Gather has no integers of 4 bits,
and plain operators take them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto

from ...compiler.errors import MoecError
from ...compiler.formats.format import Format
from ...compiler.formats.table import find_format, format_of
from ...compiler.ir.module import Op, Value
from ...compiler.ir.recipes import Literal, Recipe
from ...compiler.ir.types import TensorType
from ...compiler.rewrite.editor import Editor
from ...compiler.weights.steps.table import step
from ..cpu.lower.quantized import stored_parts
from ..cpu.onnx.graph import Context, Kernel

_TYPES = {4: TensorProto.UINT4, 8: TensorProto.UINT8}  # by the bits of a code
_WEIGHTS = {
    "core.linear": ("w",), "nn.embedding": ("table",), "nn.gated_mlp": ("up", "down"), "moe.experts": ("up", "down"),
}  # fmt: skip
Parts = tuple[str, str, str]  # the ONNX names of codes, scales and zero points


def why_not_held(op: Op, format: Format) -> str | None:
    """Return why an op of stage moe cannot have its weights in a format; None if it can."""
    if op.name not in _WEIGHTS:
        return f"the weights of {op.name} are floats in standard operators"
    if format.element != "int" or format.bits not in _TYPES:
        return f"standard operators read integers of 4 and 8 bits, not {format.name}"
    groups = [int(op[name].type.shape[-1]) // format.group for name in _WEIGHTS[op.name]]
    if any(n * format.bits % 8 for n in groups):
        return f"the zero points of {max(groups)} groups of a row do not fill whole bytes"
    return None


# --- lowering ----------------------------------------------------------------------------------------------------


def linear_of_codes(editor: Editor, op: Op) -> Op:
    """Return a linear with a quantized weight as the op that reads its parts; others as they are."""
    if find_format(op["w"].type.dtype) is None:
        return op
    parts, options = _parts_of(editor, op["w"])
    return op.become("ort.matmul_nbits", op["x"], *parts, *op.operands[2:], **options, accuracy=0)


def embedding_of_codes(editor: Editor, op: Op) -> Op:
    """Return a lookup in a quantized table as the op that reads its parts; others as they are."""
    if find_format(op["table"].type.dtype) is None:
        return op
    parts, options = _parts_of(editor, op["table"])
    return op.become("ort.gather_nbits", op["ids"], *parts, **options)


def experts_of_codes(editor: Editor, op: Op) -> Op:
    """Return routed experts with quantized weights as the op that reads their parts; others as they are."""
    if find_format(op["up"].type.dtype) is None:
        return op
    (up, options), (down, _) = (_parts_of(editor, op[name]) for name in ("up", "down"))
    given = (op["x"], op["ids"], op["gates"], *up, op.get("up_bias"), *down, op.get("down_bias"))
    return op.become("ort.experts_nbits", *given, **op.attributes, **options)


def _parts_of(editor: Editor, weight: Value) -> tuple[tuple[Value, Value, Value], dict[str, int]]:
    """Return codes, scales and zero points of a weight; those of symmetric codes are the middle of their range."""
    format = format_of(weight.type.dtype)
    codes, scales, zeros = stored_parts(editor, weight)
    if zeros is None:
        half = 1 << (format.bits - 1)
        byte = half if format.bits == 8 else half << 4 | half
        sizes = (*scales.type.sizes[:-1], scales.type.sizes[-1] * format.bits // 8)
        zeros = editor.weight(_filled(byte, sizes), f"{weight.name}.zeros")
    return (codes, scales, zeros), {"bits": format.bits, "group": format.group}


def _filled(byte: int, sizes: Sequence[int]) -> Recipe:
    recipe: Recipe = Literal(TensorType.of("u8", *(1 for _ in sizes)), (byte,))
    for axis, size in enumerate(sizes):
        recipe = step("repeat", recipe, axis=axis, times=size)
    return recipe


# --- emission ----------------------------------------------------------------------------------------------------


def all_numbers(ctx: Context, parts: Parts, sizes: Sequence[int], bits: int, group: int) -> str:
    """Return the numbers of a whole weight of these sizes."""
    codes, scales, zeros = parts

    def make(shared: Context) -> str:
        graph, type_ = shared.graph, _TYPES[bits]
        whole = graph.with_sizes(codes, sizes, type_)
        points = graph.with_sizes(zeros, (*sizes[:-1], sizes[-1] // group), type_)
        return shared.node("DequantizeLinear", whole, scales, points, axis=len(sizes) - 1, block_size=group)

    return ctx.once(("dequantized", codes), codes, make)


def chosen_numbers(ctx: Context, parts: Parts, index: str, rank: int, bits: int, group: int) -> str:
    """Return the numbers, of `rank` axes, of what an index chooses along the first axis: only that is read."""
    codes, scales, zeros = (ctx.node("Gather", part, index, axis=0) for part in parts)
    constant, last, lead = ctx.graph.constant, ctx.graph.constant([rank]), [0] * (rank - 1)
    # OpenVINO's DequantizeLinear wants to know all sizes
    numbers, points = (_opened(ctx, part, rank, bits) for part in (codes, zeros))
    grouped = ctx.node("Reshape", numbers, constant([*lead, -1, group]))
    centred = ctx.node("Sub", grouped, ctx.node("Unsqueeze", points, last))
    scaled = ctx.node("Mul", centred, ctx.node("Unsqueeze", scales, last))
    return ctx.node("Reshape", scaled, constant([*lead, -1]))


def _opened(ctx: Context, codes: str, rank: int, bits: int) -> str:
    """Return codes as floats; of two in a byte the first is the low one.

    Floats hold bytes exactly. OpenVINO shifts bytes to the right by a division, which it rounds.
    """
    bytes_ = ctx.node("Cast", codes, to=TensorProto.FLOAT)
    if bits == 8:
        return bytes_
    graph, last = ctx.graph, ctx.graph.constant([rank])
    high = ctx.node("Floor", ctx.node("Mul", bytes_, graph.constant(1 / 16, "f32")))
    low = ctx.node("Sub", bytes_, ctx.node("Mul", high, graph.constant(16, "f32")))
    pairs = ctx.node("Concat", ctx.node("Unsqueeze", low, last), ctx.node("Unsqueeze", high, last), axis=rank)
    return ctx.node("Reshape", pairs, graph.constant([*[0] * (rank - 1), -1]))


def _emit_linear(ctx: Context, op: Op) -> None:
    """Emit the product with a weight that is dequantized and turned."""
    x, *parts, bias = ctx.inputs(op)
    rows, groups = op["scales"].type.sizes
    bits, group = op.settings.integer("bits"), op.settings.integer("group")
    weight = all_numbers(ctx, _three(parts), (rows, groups * group), bits, group)
    turned = ctx.once(("transposed", weight), weight, lambda shared: shared.node("Transpose", weight, perm=[1, 0]))
    if bias:
        ctx.finish(op, "Add", ctx.node("MatMul", x, turned), bias)
    else:
        ctx.finish(op, "MatMul", x, turned)


def _emit_lookup(ctx: Context, op: Op) -> None:
    """Emit a lookup of rows, which are dequantized."""
    ids, *parts = ctx.inputs(op)
    rank, bits, group = len(op.results[0].type.shape), op.settings.integer("bits"), op.settings.integer("group")
    ctx.alias(op.results[0], chosen_numbers(ctx, _three(parts), ids, rank, bits, group))


def _three(parts: Sequence[str]) -> Parts:
    codes, scales, zeros = parts
    if not zeros:
        raise MoecError("a weight without zero points has no form in standard operators")
    return codes, scales, zeros


KERNELS: dict[str, Kernel] = {"ort.matmul_nbits": _emit_linear, "ort.gather_nbits": _emit_lookup}
