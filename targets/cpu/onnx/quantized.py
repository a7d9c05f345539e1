"""Emits ops on quantized weights: QMoE, MatMulNBits, GatherBlockQuantized of com.microsoft, or plain ops that decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from ....compiler.formats.format import Format
from ....compiler.formats.table import find_format, format_of
from ....compiler.ir.dims import size
from ....compiler.ir.module import Op
from ....compiler.ir.types import Attrs
from ..kernels.grids import EXPERTS, LINEAR
from ..kernels.nodes import DOMAIN
from .graph import CONTRIB, Context, Kernel
from .moe import activation_options, expert_loop


def emit_decode(ctx: Context, op: Op) -> None:
    """Emit what gives the numbers that codes stand for."""
    codes, scales = ctx.inputs(op)
    format = format_of(op.settings.text("format"))
    ctx.alias(op.results[0], _decode_by_lookup(ctx, format, codes, scales, len(op.inputs[0].type.shape)))


def _decode_by_lookup(ctx: Context, format: Format, codes: str, scales: str, rank: int) -> str:
    """Add lookups of the numbers of whole bytes of codes, and their products with the scales."""
    graph = ctx.graph
    lead = [0] * (rank - 1)  # as in the input

    def looked_up(codes: str, bits: int, values: Sequence[float]) -> str:
        table = [[values[byte >> shift & (1 << bits) - 1] for shift in range(0, 8, bits)] for byte in range(256)]
        found = ctx.node("Gather", graph.constant(table, "f32"), ctx.node("Cast", codes, to=TensorProto.INT32))
        return found if bits == format.bits else ctx.node("Reshape", found, graph.constant([*lead, -1]))

    if format.bits == 3:  # the highest bits lie behind the others (see packing.py): as many bytes as half of those
        *others, highest = ctx.nodes("Split", codes, outputs=3, axis=rank - 1, num_outputs=3)
        lower = looked_up(ctx.node("Concat", *others, axis=rank - 1), 2, range(4))
        whole = ctx.node("Add", lower, looked_up(highest, 1, (0, 4)))
        numbers = ctx.node(
            "Gather", graph.constant(format.values, "f32"), ctx.node("Cast", whole, to=TensorProto.INT32)
        )
    else:
        numbers = looked_up(codes, format.bits, format.values)
    grouped = ctx.node("Reshape", numbers, graph.constant([*lead, -1, format.group]))
    if format.scale == "f8e8m0":
        powers = graph.constant([2.0 ** (byte - 127) for byte in range(255)] + [np.nan], "f32")
        scales = ctx.node("Gather", powers, ctx.node("Cast", scales, to=TensorProto.INT32))
    else:
        scales = ctx.node("Cast", scales, to=TensorProto.FLOAT)
    product = ctx.node("Mul", grouped, ctx.node("Unsqueeze", scales, graph.constant([-1])))
    return ctx.node("Reshape", product, graph.constant([*lead, -1]))


def matmul_nbits(ctx: Context, op: Op) -> None:
    """Emit MatMulNBits; it wants the codes as [N, groups, bytes of a group] and no second axis of the others."""
    x, codes, scales, zeros, bias = ctx.inputs(op)
    a = op.settings
    out, groups = op["scales"].type.sizes
    codes = ctx.graph.with_sizes(codes, [out, groups, a.integer("group") * a.integer("bits") // 8])
    inputs = [x, codes, scales, zeros, "", bias]
    while not inputs[-1]:
        inputs.pop()
    ctx.finish(op, "MatMulNBits", *inputs, **_product_options(a, out, groups))


def block_matmul_nbits(ctx: Context, op: Op) -> None:
    """Emit a MatMulNBits for each block, on its rows of the codes as they lie in the data file."""
    x, *parts = ctx.inputs(op)
    a, graph = op.settings, ctx.graph
    batch, new, blocks, width = op["x"].type.shape
    rows, groups = op["scales"].type.sizes
    count, each = int(blocks), rows // int(blocks)
    flat = ctx.reshape(x, (batch, new, blocks, width), (batch * new, blocks, width))
    by_block = ctx.nodes("Split", flat, outputs=count, axis=1, num_outputs=count) if count > 1 else [flat]
    products = []
    for i, block in enumerate(by_block):
        codes, scales, *zeros = (graph.rows_of(part, i, count) for part in parts if part)
        codes = graph.with_sizes(codes, [each, groups, a.integer("group") * a.integer("bits") // 8])
        products.append(ctx.node("MatMulNBits", block, codes, scales, *zeros, **_product_options(a, each, groups)))
    joined = ctx.node("Concat", *products, axis=1) if count > 1 else products[0]
    ctx.alias(op.results[0], ctx.reshape(joined, (batch * new, blocks, size(each)), (batch, new, size(rows))))


def _product_options(a: Attrs, rows: int, groups: int) -> dict[str, Any]:
    return {
        "domain": CONTRIB, "K": groups * a.integer("group"), "N": rows, "bits": a.integer("bits"),
        "block_size": a.integer("group"), "accuracy_level": a.integer("accuracy"),
    }  # fmt: skip


def gather_nbits(ctx: Context, op: Op) -> None:
    """Emit GatherBlockQuantized of rows."""
    ids, codes, scales, zeros = ctx.inputs(op)
    ctx.finish(
        op, "GatherBlockQuantized", *_lookup_inputs(codes, ids, scales, zeros), **_lookup_options(ctx, op, axis=1)
    )


def _lookup_inputs(codes: str, ids: str, scales: str, zeros: str) -> list[str]:
    return [codes, ids, scales, *([zeros] if zeros else [])]


def _lookup_options(ctx: Context, op: Op, axis: int) -> dict[str, Any]:
    a = op.settings
    return {
        "domain": CONTRIB, "bits": a.integer("bits"), "block_size": a.integer("group"), "gather_axis": 0,
        "quantize_axis": axis,
    }  # fmt: skip


def emit_qmoe(ctx: Context, op: Op) -> None:
    """Emit QMoE; scores that choose are its input 1, weights of the chosen its input 14."""
    x, choice, mixing, up, up_scales, up_zeros, up_bias, down, down_scales, down_zeros, down_bias = ctx.inputs(op)
    a = op.settings
    inputs = [
        x,
        choice,
        up,
        up_scales,
        up_bias,
        down,
        down_scales,
        down_bias,
        "",
        "",
        "",
        up_zeros,
        down_zeros,
        "",
        mixing,
    ]
    while not inputs[-1]:
        inputs.pop()
    # without weights of its own the op mixes by the softmax of the chosen, whatever normalize_routing_weights says
    ctx.finish(
        op, "QMoE", *inputs, domain=CONTRIB, k=a.integer("k"), expert_weight_bits=a.integer("bits"),
        block_size=a.integer("group"), accuracy_level=a.integer("accuracy"),
        normalize_routing_weights=0 if mixing else 1, **activation_options(a.activation("act")),
    )  # fmt: skip


def experts_nbits(ctx: Context, op: Op) -> None:
    """Emit the Loop over the experts that were chosen, each with its weights dequantized."""
    names = ctx.inputs(op)
    options = _lookup_options(ctx, op, axis=2)
    format = find_format(op.settings.text("format"))

    def weight(part: int, expert: str) -> str:
        codes, scales, zeros = names[part : part + 3]
        if format:
            one_codes, one_scales = (ctx.node("Gather", n, expert, axis=0) for n in (codes, scales))
            return _decode_by_lookup(ctx, format, one_codes, one_scales, rank=2)
        one = ctx.node("Unsqueeze", expert, ctx.graph.constant([0]))
        numbers = ctx.node("GatherBlockQuantized", *_lookup_inputs(codes, one, scales, zeros), **options)
        return ctx.node("Squeeze", numbers, ctx.graph.constant([0]))

    expert_loop(ctx, op, up=lambda e: weight(3, e), down=lambda e: weight(7, e), biases=(names[6], names[10]))


def _numbers_of_codes(ctx: Context, format: Format) -> str:
    """Return what the two codes of each byte stand for, f32[256, 2], or each code of 3 bits, f32[8]."""
    if format.bits == 3:
        return ctx.graph.constant(format.values, "f32")
    pairs = [[format.values[byte & 15], format.values[byte >> 4]] for byte in range(256)]
    return ctx.graph.constant(pairs, "f32")


def grid_linear(ctx: Context, op: Op) -> None:
    """Emit moec's operator on a weight in a grid."""
    format = format_of(op.settings.text("format"))
    rows, groups = op["scales"].type.sizes
    ctx.finish(
        op, LINEAR[format.bits], *ctx.inputs(op), _numbers_of_codes(ctx, format), domain=DOMAIN, K=groups * format.group, N=rows,
        bits=format.bits, block_size=format.group,
    )  # fmt: skip


def grid_experts(ctx: Context, op: Op) -> None:
    """Emit moec's operator on experts whose weights are in a grid."""
    format = format_of(op.settings.text("format"))
    options = {"swiglu_limit": float("inf"), **activation_options(op.settings.activation("act"))}
    ctx.finish(
        op, EXPERTS[format.bits], *ctx.inputs(op), _numbers_of_codes(ctx, format), domain=DOMAIN, k=int(op["ids"].type.shape[1]),
        expert_weight_bits=format.bits, block_size=format.group, **options,
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {
    "ort.grid_linear": grid_linear,
    "ort.grid_experts": grid_experts,
    "ort.decode": emit_decode,
    "ort.matmul_nbits": matmul_nbits,
    "ort.block_matmul_nbits": block_matmul_nbits,
    "ort.gather_nbits": gather_nbits,
    "ort.qmoe": emit_qmoe,
    "ort.experts_nbits": experts_nbits,
}
