"""The operators of ONNX Runtime (com.microsoft) on quantized weights and experts, each declared once.

Their codes, scales and zero points become recipes of `dequantize`: the pass keep-codes stores them as they are.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ...errors import MoecError
from ...ir.activation import Activation
from ...ir.module import Value
from ...ir.recipes import Recipe, tensors_of
from ...weights.steps.table import step
from ..aten.lower import reshape
from .graph import OnnxGraph, identifier, operator
from .layers import bias_of
from .node import Item, Node

_LEAST_BLOCK = 16
_UNUSED = -1e29  # a score that is lower is that of an expert which was not chosen


def recipe_of(g: OnnxGraph, item: Item | None, what: str) -> Recipe:
    """Return the recipe of a weight; MoecError for what is computed."""
    if not isinstance(item, Value) or item.name not in g.builder.consts:
        raise MoecError(f"{what} {'is missing' if item is None else 'is no initializer'}")
    return g.builder.consts[item.name].recipe


def _shaped(recipe: Recipe, *sizes: int) -> Recipe:
    return recipe if recipe.type.sizes == sizes else step("reshape", recipe, shape=sizes)


def _dequantized(g: OnnxGraph, items: tuple[Item | None, ...], bits: int, block: int, width: int, label: str) -> Recipe:
    """Return the numbers of codes [.., rows, groups, bytes] of `width` columns, with scales and zero points of each group."""
    codes, scales = recipe_of(g, items[0], f"the codes of {label}"), recipe_of(g, items[1], f"the scales of {label}")
    if bits not in (2, 4, 8) or block < _LEAST_BLOCK or codes.type.dtype != "u8":
        raise MoecError(f"{label} in {bits} bits and blocks of {block}, codes {codes.type}")
    groups = -(-width // block)
    packed = groups * block * bits // 8
    *lead, rows = (
        codes.type.sizes[:-2] if codes.type.sizes[-2:] == (groups, block * bits // 8) else codes.type.sizes[:-1]
    )
    codes = unpacked(_shaped(codes, *lead, rows, packed), bits, groups * block)
    if groups * block != width:
        codes = step("slice", codes, axis=len(lead) + 1, start=0, stop=width)
    parts = [codes, _shaped(scales, *lead, rows, groups)]
    if items[2] is not None:
        zeros = recipe_of(g, items[2], f"the zero points of {label}")
        if zeros.type.dtype != "u8":
            raise MoecError(f"{label} with zero points {zeros.type}")
        parts.append(unpacked(_shaped(zeros, *lead, rows, -(-groups * bits // 8)), bits, groups))
    return step("dequantize", *parts, block=(*(1 for _ in lead), 1, block), bits=bits)


def unpacked(recipe: Recipe, bits: int, size: int) -> Recipe:
    """Return codes that lie in bytes along the last axis, `size` of them."""
    if bits == 8:
        return recipe
    return step("unpack", recipe, bits=bits, axis=len(recipe.type.shape) - 1, size=size)


@operator("com.microsoft.MatMulNBits")
def _matmul_nbits(g: OnnxGraph, node: Node) -> Any:
    if node.has(4):
        raise MoecError("MatMulNBits with groups in another order (g_idx)")
    x, width = g.operand(node.inputs[0], None), node.integer("K")
    parts = _optional(node, 1, 2, 3)
    recipe = _dequantized(g, parts, node.integer("bits", 4), node.integer("block_size"), width, "MatMulNBits")
    if recipe.type.sizes != (node.integer("N"), width):
        raise MoecError(f"MatMulNBits of {recipe.type}, N = {node.integer('N')}")
    bias = g.value(node.inputs[5]) if node.has(5) else None
    return g.call("aten.linear", x, const_of_recipe(g, recipe), bias)


def _optional(node: Node, *places: int) -> tuple[Item | None, ...]:
    return tuple(node.inputs[place] if node.has(place) else None for place in places)


def const_of_recipe(g: OnnxGraph, recipe: Recipe) -> Value:
    """Return a weight made of codes, once for all its readers, named as the codes are."""
    found = g.made_of.get(recipe)
    if found is None:
        name = identifier(next(tensors_of(recipe)).name)
        found = g.made_of[recipe] = g.builder.const(re.sub(r"[._]codes$", "", name), recipe)
    return found


@operator("com.microsoft.GatherBlockQuantized")
def _gather_block_quantized(g: OnnxGraph, node: Node) -> Any:
    codes, index = node.inputs[0], g.value(node.inputs[1])
    bits, rank = node.integer("bits", 4), 2
    if node.integer("gather_axis", 0) or node.integer("quantize_axis", 1) not in (1, -1):
        raise MoecError("GatherBlockQuantized along other axes than rows of a matrix")
    recipe = recipe_of(g, codes, "the codes of GatherBlockQuantized")
    if len(recipe.type.shape) != rank or recipe.type.dtype != "u8":
        raise MoecError(f"GatherBlockQuantized of {recipe.type}")
    width = recipe.type.sizes[1] * 8 // bits
    whole = _dequantized(g, (codes, *_optional(node, 2, 3)), bits, node.integer("block_size", 128), width, node.type)
    return g.builder.add("nn.embedding", g.cast(index, "i64"), const_of_recipe(g, whole))


@operator("com.microsoft.QMoE")
def _qmoe(g: OnnxGraph, node: Node) -> Any:
    if node.text("quant_type", "int") != "int" or node.integer("weights_prepacked", 0) > 0:
        raise MoecError("QMoE of other codes than integers as they are")
    if node.has(8) or node.has(13):
        raise MoecError("QMoE with gates in a matrix of their own (fc3)")
    x, bits = g.value(node.inputs[0]), node.integer("expert_weight_bits", 4)
    up_codes = recipe_of(g, node.inputs[2], "the codes of QMoE")
    widths = [int(x.type.shape[-1]), 0]
    act = activation_of(node)
    widths[1] = up_codes.type.sizes[1] // (2 if act.gated else 1)
    weights = []
    for places, width in (((2, 3, 11), widths[0]), ((5, 6, 12), widths[1])):
        block = node.integer("block_size", 0) or width
        recipe = _dequantized(g, _optional(node, *places), bits, block, width, "QMoE")
        weights.append(const_of_recipe(g, recipe))
    return _experts(g, node, x, act, weights, [4, 7], 14)


@operator("com.microsoft.MoE")
def _moe(g: OnnxGraph, node: Node) -> Any:
    if node.has(6):
        raise MoecError("MoE with gates in a matrix of their own (fc3)")
    weights = [g.value(node.inputs[place]) for place in (2, 4)]
    return _experts(g, node, g.value(node.inputs[0]), activation_of(node), weights, [3, 5], None)


def activation_of(node: Node) -> Activation:
    """Return what is computed between the matrices of an expert."""
    kind, fusion = node.text("activation_type", "relu"), node.integer("swiglu_fusion", 0)
    if kind == "swiglu" and fusion in (1, 2):
        alpha, beta = node.number("activation_alpha", 1.0), node.number("activation_beta", 0.0)
        limit = node.number("swiglu_limit", math.inf)
        layout = "interleaved" if fusion == 1 else "concat"
        return Activation("silu", True, layout, alpha, beta, limit if limit > 0 else math.inf)
    kinds = {"relu": "relu", "silu": "silu", "gelu": "gelu_tanh", "identity": "identity"}
    if kind not in kinds:
        raise MoecError(f"{node.type} with the activation {kind}, swiglu_fusion = {fusion}")
    return Activation(kinds[kind], gated=False)


def _experts(
    g: OnnxGraph, node: Node, x: Value, act: Activation, weights: list[Value], biases: list[int], mixing: int | None
) -> Value:
    """Write the routing and the experts; without weights of its own the operator mixes by the softmax of the chosen."""
    tokens, k = reshape(g, x, (x.type.elements / x.type.shape[-1], x.type.shape[-1])), node.integer("k", 1)
    scores = g.value(node.inputs[1])
    up_bias, down_bias = (g.value(node.inputs[place]) if node.has(place) else None for place in biases)
    ids, gates = _spread_choice(g, scores) or _choice(g, node, scores, k, mixing)
    y = g.builder.add("moe.experts", tokens, ids, gates, *weights, up_bias, down_bias, act=act)
    return reshape(g, y, x.type.shape)


def _spread_choice(g: OnnxGraph, scores: Value) -> tuple[Value, Value] | None:
    """Return ids and gates whose logarithms are spread over very low scores: a choice that is made already, as moec writes it."""
    spread = g.producer(scores)
    if spread is None or spread.name != "core.scatter":
        return None
    low, ids, source = spread.inputs
    filled, logs = g.producer(low), g.producer(source)
    if filled is None or filled.name != "core.full" or logs is None or logs.name != "core.log":
        return None
    if float(filled.settings.number("value")) > _UNUSED:
        return None
    gates = logs.inputs[0]
    made = g.producer(gates)
    if made is None or made.name != "core.softmax":  # what is mixed by adds up to 1
        total = g.builder.add("core.sum", gates, axes=(1,), keepdim=True)
        gates = g.builder.add("core.div", gates, total)
    return ids, gates


def _choice(g: OnnxGraph, node: Node, scores: Value, k: int, mixing: int | None) -> tuple[Value, Value]:
    best, ids = g.builder.add_all("core.topk", scores, k=k, axis=1)
    if mixing is not None and node.has(mixing):
        gates = g.builder.add("core.gather", g.value(node.inputs[mixing]), ids, axis=1)
        if node.integer("normalize_routing_weights", 0):
            total = g.builder.add("core.sum", gates, axes=(1,), keepdim=True)
            gates = g.builder.add("core.div", gates, total)
    elif not node.integer("normalize_routing_weights", 0) and mixing is None:
        gates = g.builder.add("core.gather", g.builder.add("core.softmax", scores, axis=1), ids, axis=1)
    else:
        gates = g.builder.add("core.softmax", best, axis=1)
    return ids, gates


@operator("com.microsoft.SkipSimplifiedLayerNormalization", "com.microsoft.SkipLayerNormalization")
def _skip_norm(g: OnnxGraph, node: Node) -> Any:
    simplified = node.type.startswith("SkipSimplified")
    x = g.call("aten.add", g.value(node.inputs[0]), g.value(node.inputs[1]))
    weight, eps = g.value(node.inputs[2]), node.number("epsilon", 1e-5 if simplified else 1e-12)
    last = 3 if simplified else 4
    if node.has(last):
        x = g.call("aten.add", x, g.value(node.inputs[last]))
    if simplified:
        y = g.builder.add("nn.rms_norm", x, weight, eps=eps)
    else:
        y = g.builder.add("nn.layer_norm", x, weight, bias_of(g, node, 3), eps=eps)
    return y, None, None, x
