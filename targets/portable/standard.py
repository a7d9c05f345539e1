"""Operators of com.microsoft that the emission of target cpu uses, as operators of the standard that compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from onnx import GraphProto, NodeProto, helper

from ...compiler.errors import MoecError
from ..cpu.onnx.graph import CONTRIB, Graph

Form = Callable[[Graph, NodeProto], None]


def rewrite_nodes(graph: Graph) -> None:
    """Put standard operators in place of all others; MoecError for one that has no form here."""
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        if node.domain == CONTRIB and node.op_type in FORMS:
            FORMS[node.op_type](graph, node)
        else:
            graph.nodes.append(node)
    for node in _with_bodies(graph.nodes):
        if node.domain:
            raise MoecError(f"{node.op_type} of {node.domain} has no form in standard operators", model=node.name)


def _with_bodies(nodes: Any) -> Iterator[NodeProto]:
    """Yield nodes, and those of the bodies of loops and branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if isinstance(attribute.g, GraphProto):
                yield from _with_bodies(attribute.g.node)


def _options(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _product(graph: Graph, node: NodeProto) -> None:
    """Emit FusedMatMul with the second matrix transposed: a weight by a Transpose that runtimes fold, others by Einsum."""
    x, w = node.input
    alpha = _options(node).get("alpha", 1.0)
    if alpha != 1.0:
        (x,) = graph.node(node.name, "Mul", [x, graph.constant(alpha, "f32")])
    tensor = graph.initializers.get(w)
    if tensor is None or len(tensor.dims) != 2:
        graph.node(node.name, "Einsum", [x, w], list(node.output), node.doc_string, equation="...ik,...jk->...ij")
        return
    turned = graph.once(("transposed", w), lambda: graph.node(w, "Transpose", [w], perm=[1, 0])[0])
    graph.node(node.name, "MatMul", [x, turned], list(node.output), node.doc_string)


def _gated_sigmoid(graph: Graph, node: NodeProto) -> None:
    """Emit QuickGelu, x sigmoid(alpha x)."""
    (x,) = node.input
    alpha = _options(node)["alpha"]
    scaled = x if alpha == 1.0 else graph.node(node.name, "Mul", [x, graph.constant(alpha, "f32")])[0]
    (share,) = graph.node(node.name, "Sigmoid", [scaled])
    graph.node(node.name, "Mul", [x, share], list(node.output), node.doc_string)


def _norm_of_sum(graph: Graph, node: NodeProto) -> None:
    """Emit SkipSimplifiedLayerNormalization, whose first output is the norm and whose last is the sum."""
    x, skip, weight = node.input
    total = node.output[3]
    graph.node(node.name, "Add", [x, skip], [total])
    graph.node(
        node.name, "RMSNormalization", [total, weight], [node.output[0]], node.doc_string, axis=-1,
        epsilon=_options(node)["epsilon"],
    )  # fmt: skip


FORMS: Mapping[str, Form] = {
    "FusedMatMul": _product,
    "QuickGelu": _gated_sigmoid,
    "SkipSimplifiedLayerNormalization": _norm_of_sum,
}
