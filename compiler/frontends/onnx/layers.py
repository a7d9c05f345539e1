"""The operators of ONNX, and of ONNX Runtime, that are layers: norms and activations, each declared once."""

from __future__ import annotations

from typing import Any

from ...errors import MoecError
from ...ir.module import Value
from .graph import OnnxGraph, operator
from .node import Node


def bias_of(g: OnnxGraph, node: Node, place: int) -> Value | None:
    """Return an input that may be left out."""
    return g.value(node.inputs[place]) if node.has(place) else None


@operator("LayerNormalization")
def _layer_norm(g: OnnxGraph, node: Node) -> Any:
    x = g.value(node.inputs[0])
    _check_last_axis(node, len(x.type.shape))
    return g.builder.add(
        "nn.layer_norm", x, g.value(node.inputs[1]), bias_of(g, node, 2), eps=node.number("epsilon", 1e-5)
    )


@operator("RMSNormalization", "SimplifiedLayerNormalization", "com.microsoft.SimplifiedLayerNormalization")
def _rms_norm(g: OnnxGraph, node: Node) -> Any:
    x = g.value(node.inputs[0])
    _check_last_axis(node, len(x.type.shape))
    return g.builder.add("nn.rms_norm", x, g.value(node.inputs[1]), eps=node.number("epsilon", 1e-5))


def _check_last_axis(node: Node, rank: int) -> None:
    if node.integer("axis", -1) % rank != rank - 1:
        raise MoecError(f"{node.label} over more than the last axis")


@operator("com.microsoft.QuickGelu")
def _quick_gelu(g: OnnxGraph, node: Node) -> Any:
    x, alpha = g.value(node.inputs[0]), node.number("alpha", 1.702)
    if alpha == 1:
        return g.call("aten.silu", x)
    return g.call("aten.mul", x, g.call("aten.sigmoid", g.call("aten.mul", x, alpha)))


@operator("com.microsoft.FusedMatMul")
def _fused_matmul(g: OnnxGraph, node: Node) -> Any:
    x, y = (g.value(item) for item in node.inputs)
    if node.integer("transA", 0) or node.integer("transBatchA", 0) or node.integer("transBatchB", 0):
        raise MoecError("FusedMatMul of a transposed first matrix, or of batches")
    if node.integer("transB", 0):
        if len(y.type.shape) == 2:
            product = g.call("aten.linear", x, y)
        else:
            product = g.call("aten.matmul", x, g.call("aten.transpose", y, -1, -2))
    else:
        product = g.call("aten.matmul", x, y)
    alpha = node.number("alpha", 1.0)
    return product if alpha == 1 else g.call("aten.mul", product, alpha)
