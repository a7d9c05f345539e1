"""The nodes of a model that moec's kernels compute: of the domain `moec`, each also a function of the model.

ONNX Runtime runs a registered kernel where there is one, and otherwise the function's body, which is the operator of
com.microsoft that the node replaces. So the same model runs with and without the library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from ..onnx.graph import CONTRIB

DOMAIN = "moec"
# what the C sources take: see complete_shape in source/host.c and read_activation in source/experts.c
_GROUPS = (16, 32, 64, 128, 256)
_MOST_GROUPS = 2048  # of a row
_ACTIVATIONS = {"swiglu", "silu", "relu", "gelu", "identity"}
_INT8 = 4  # the accuracy_level at which activations are rounded to int8

# inputs, and attributes by the type that they have
_INT, _FLOAT, _TEXT = AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING
_SIGNATURES = {
    "MatMulNBits": (6, {"K": _INT, "N": _INT, "bits": _INT, "block_size": _INT, "accuracy_level": _INT}),
    "QMoE": (15, {
        "k": _INT, "expert_weight_bits": _INT, "block_size": _INT, "accuracy_level": _INT,
        "normalize_routing_weights": _INT, "activation_type": _TEXT, "swiglu_fusion": _INT, "activation_alpha": _FLOAT,
        "activation_beta": _FLOAT, "swiglu_limit": _FLOAT,
    }),
}  # fmt: skip


def use_kernels(nodes: Iterable[NodeProto], initializers: Mapping[str, TensorProto]) -> list[FunctionProto]:
    """Move the nodes that the kernels compute to the domain `moec`; return the functions that stand for them."""
    used = set()
    for node in nodes:
        if node.domain == CONTRIB and node.op_type in _SIGNATURES and _is_supported(node, initializers):
            node.domain = DOMAIN
            used.add(node.op_type)
    return [_function_of_kind(kind) for kind in sorted(used)]


def _is_supported(node: NodeProto, initializers: Mapping[str, TensorProto]) -> bool:
    """Return whether the kernels have what a node asks for."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    bits, group = given.get("bits", given.get("expert_weight_bits")), given["block_size"]
    if given.get("accuracy_level") != _INT8 or bits not in (4, 8) or group not in _GROUPS:
        return False
    if node.op_type == "MatMulNBits":
        return given["K"] % group == 0 and given["K"] // group <= _MOST_GROUPS
    if given["activation_type"].decode() not in _ACTIVATIONS:
        return False
    scales = [initializers.get(node.input[i]) for i in (3, 6)]
    return all(s is not None and s.dims[-1] <= _MOST_GROUPS for s in scales)


def _function_of_kind(kind: str) -> FunctionProto:
    count, attributes = _SIGNATURES[kind]
    inputs = [f"input{i}" for i in range(count)]
    body = helper.make_node(kind, inputs, ["y"], domain=CONTRIB)
    for name, type_ in attributes.items():
        body.attribute.append(AttributeProto(name=name, type=type_, ref_attr_name=name))
    opsets = [helper.make_opsetid(CONTRIB, 1)]
    return helper.make_function(DOMAIN, kind, inputs, ["y"], [body], opsets, list(attributes))
