"""The nodes of a model that moec's kernels compute: of the domain `moec`, each also a function of the model.

ONNX Runtime runs a registered kernel where there is one, and otherwise the function's body, which is the operator of
com.microsoft that the node replaces. So the same model runs with and without the library. An operator that the library
gains is a row of `OPERATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from ..capabilities import MOST_GROUPS
from ..onnx.graph import CONTRIB

DOMAIN = "moec"
# what the C sources take: see complete_shape in source/host.c and read_activation in source/experts.c
_GROUPS = (16, 32, 64, 128, 256)
_ACTIVATIONS = {"swiglu", "silu", "relu", "gelu", "identity"}
_INT8 = 4  # the accuracy_level at which activations are rounded to int8
_INT, _FLOAT, _TEXT = AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING

Settings: TypeAlias = Mapping[str, Any]  # a node's attributes
Initializers: TypeAlias = Mapping[str, TensorProto]


@dataclass(frozen=True)
class Operator:
    """An operator of the library: its inputs, its attributes by their type, and why it does not take a node (None: it does).

    One that reads no weights comes along where others of a model do; a model with none of those is left to ONNX Runtime.
    """

    inputs: int
    attributes: Mapping[str, Any]
    why_not: Callable[[NodeProto, Settings, Initializers], str | None]
    outputs: int = 1
    weights: bool = True


def _why_not_linear(node: NodeProto, given: Settings, initializers: Initializers) -> str | None:
    if reason := _why_not_weight(given["bits"], given):
        return reason
    if given["K"] % given["block_size"] or given["K"] // given["block_size"] > MOST_GROUPS:
        return f"groups of {given['block_size']} do not divide a row, or are more than {MOST_GROUPS}"
    return None


def _why_not_experts(node: NodeProto, given: Settings, initializers: Initializers) -> str | None:
    if reason := _why_not_weight(given["expert_weight_bits"], given):
        return reason
    if (name := given["activation_type"].decode()) not in _ACTIVATIONS:
        return f"the activation {name} is not among {', '.join(sorted(_ACTIVATIONS))}"
    scales = [initializers.get(node.input[i]) for i in (3, 6)]
    if not all(s is not None and s.dims[-1] <= MOST_GROUPS for s in scales):
        return f"a row has more than {MOST_GROUPS} groups"
    return None


def _why_not_weight(bits: int, given: Settings) -> str | None:
    if bits not in (4, 8) or given["block_size"] not in _GROUPS:
        return f"weights of {bits} bits in groups of {given['block_size']}"
    if given.get("accuracy_level") != _INT8:
        return "activations stay in f32 there"
    return None


def _takes_every_node(node: NodeProto, given: Settings, initializers: Initializers) -> None:
    """Return None: the operator has everything that nodes are emitted with."""


OPERATORS = {
    "GroupQueryAttention": Operator(17, {
        "num_heads": _INT, "kv_num_heads": _INT, "do_rotary": _INT, "scale": _FLOAT, "local_window_size": _INT,
        "softcap": _FLOAT,
    }, _takes_every_node, outputs=3, weights=False),
    "MatMulNBits": Operator(
        6, {"K": _INT, "N": _INT, "bits": _INT, "block_size": _INT, "accuracy_level": _INT}, _why_not_linear
    ),
    "QMoE": Operator(15, {
        "k": _INT, "expert_weight_bits": _INT, "block_size": _INT, "accuracy_level": _INT,
        "normalize_routing_weights": _INT, "activation_type": _TEXT, "swiglu_fusion": _INT, "activation_alpha": _FLOAT,
        "activation_beta": _FLOAT, "swiglu_limit": _FLOAT,
    }, _why_not_experts),
}  # fmt: skip


@dataclass(frozen=True)
class Division:
    """Which nodes the kernels compute, and for how many others of their operators ONNX Runtime does, by the reason."""

    taken: tuple[NodeProto, ...]
    left: Mapping[str, int]


def divide_nodes(nodes: Iterable[NodeProto], initializers: Initializers) -> Division:
    """Return which nodes the kernels compute; none is changed."""
    taken, left = [], dict[str, int]()
    for node in nodes:
        if node.domain == DOMAIN:  # emitted as the kernels' own: see grids.py
            taken.append(node)
        if node.domain != CONTRIB or node.op_type not in OPERATORS:
            continue
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        reason = OPERATORS[node.op_type].why_not(node, given, initializers)
        if reason is None:
            taken.append(node)
        else:
            left[reason] = left.get(reason, 0) + 1
    weighty = any(node.domain == DOMAIN or OPERATORS[node.op_type].weights for node in taken)
    return Division(tuple(taken) if weighty else (), left)


def use_kernels(taken: Iterable[NodeProto]) -> list[FunctionProto]:
    """Move nodes to the domain `moec`; return the functions that stand for them where the library is not."""
    kinds = set()
    for node in taken:
        if node.domain == CONTRIB:
            node.domain = DOMAIN
            kinds.add(node.op_type)
    return [_function_of_kind(kind) for kind in sorted(kinds)]


def _function_of_kind(kind: str) -> FunctionProto:
    operator = OPERATORS[kind]
    inputs = [f"input{i}" for i in range(operator.inputs)]
    outputs = [f"output{i}" for i in range(operator.outputs)]
    body = helper.make_node(kind, inputs, outputs, domain=CONTRIB)
    for name, type_ in operator.attributes.items():
        body.attribute.append(AttributeProto(name=name, type=type_, ref_attr_name=name))
    opsets = [helper.make_opsetid(CONTRIB, 1)]
    return helper.make_function(DOMAIN, kind, inputs, outputs, [body], opsets, list(operator.attributes))
