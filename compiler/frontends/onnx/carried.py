"""Keeps operators that no ops of the IR stand for as `onnx.node`, with the reason; ONNX targets write them as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import onnx
from onnx import AttributeProto, NodeProto, TypeProto, ValueInfoProto, helper, numpy_helper, shape_inference

from ...errors import MoecError
from ...ir.dims import Size, size_text
from ...ir.dtypes import DTYPES
from ...ir.module import Value
from ...ir.notes import Note
from ...ir.types import Attr, TensorType
from ...ops.onnx_node import OPSET
from ...weights.sources.onnx import ONNX_DTYPES
from .graph import OnnxGraph
from .node import Item, Node, computed_dtype
from .numbers import Numbers

_DOMAINS = ("", "com.microsoft")
_PLAIN = {AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING, AttributeProto.INTS, AttributeProto.FLOATS}
_NUMBERS = {name: number for number, name in ONNX_DTYPES.items()}
Declared = Callable[[str], TensorType | None]  # the type that the model gives to a name, if it does


def carry_node(g: OnnxGraph, node: Node, error: MoecError, declared: Declared) -> tuple[Item, ...]:
    """Write a node as it is; MoecError, with the reason why it is not raised, where its results have no type in programs."""
    place = ", ".join(g.builder.loc)
    failure = replace(
        error, what=f"{error.what}; {node.label} cannot be carried through either", model=error.model or place
    )
    if node.domain not in _DOMAINS or not node.inputs:
        raise failure
    given = [None if item is None else g.value(item) for item in node.inputs]
    try:
        kept = _in_opset(node, given)
        types = _infer_types(g, node, kept, given, declared)
        settings = tuple((a.name, _plain_value(a)) for a in sorted(kept.attribute, key=lambda a: a.name))
    except MoecError as why:
        raise replace(failure, what=f"{failure.what}: {why.what}") from None
    except Exception as why:  # onnx raises types that share no base for a node that is not as it should be
        lines = str(why).splitlines()
        raise replace(failure, what=f"{failure.what}: {lines[0] if lines else type(why).__name__}") from why
    results = g.builder.add_all(
        "onnx.node", *given, hints=[node.type.lower()] * len(types), kind=node.type, domain=node.domain,
        reason=error.what, settings=settings, dtypes=tuple(t.dtype for t in types), shapes=tuple(t.shape for t in types),
    )  # fmt: skip
    loc, label = g.builder.loc, f"onnx.node {node.label}"
    g.notes.append(Note(error.what, "main", loc, str(results[0]), f"no raising of {label}, which is carried through,"))
    return results


def _in_opset(node: Node, given: list[Value | None]) -> NodeProto:
    """Return the node with plain names and attributes, as the opset that carried nodes are written in has it."""
    made = NodeProto(op_type=node.type, domain=node.domain)
    made.input.extend("" if value is None else f"x{i}" for i, value in enumerate(given))
    made.output.extend(f"y{i}" for i in range(len(node.proto.output)))
    for name, attribute in node.attributes.items():
        made.attribute.append(attribute)
        made.attribute[-1].name = name
    if node.domain:
        return made
    versions = [onnx.defs.get_schema(node.type, opset, "").since_version for opset in (node.opset, OPSET)]
    if versions[0] == versions[1]:
        return made
    inputs = [
        helper.make_tensor_value_info(f"x{i}", _NUMBERS[v.type.dtype], [None] * len(v.type.shape))
        for i, v in enumerate(given)
        if v is not None
    ]
    outputs = [ValueInfoProto(name=name) for name in made.output]
    graph = helper.make_graph([made], "node", inputs, outputs)
    old = helper.make_model(graph, opset_imports=[helper.make_opsetid("", node.opset)])
    found = onnx.version_converter.convert_version(old, OPSET).graph.node
    if len(found) != 1 or found[0].op_type != node.type:
        raise MoecError(f"the operator is another one in opset {OPSET}")
    return found[0]


def _infer_types(
    g: OnnxGraph, node: Node, kept: NodeProto, given: list[Value | None], declared: Declared
) -> list[TensorType]:
    """Return the types of the results: those that ONNX infers, else those that the model gives them."""
    sizes = {size_text(s): s for v in given if v is not None for s in v.type.shape if not s.is_Integer}
    found: Mapping[str, TypeProto] = {}
    if not node.domain:
        types = {f"x{i}": _type_proto(v.type) for i, v in enumerate(given) if v is not None}
        known = {
            f"x{i}": numpy_helper.from_array(_array_of(item))
            for i, item in enumerate(node.inputs)
            if isinstance(item, Numbers) and all(isinstance(n, (int, float)) for n in item.sizes)
        }
        schema = onnx.defs.get_schema(node.type, OPSET, "")
        opsets = [helper.make_opsetid("", OPSET)]
        found = shape_inference.infer_node_outputs(schema, kept, types, known, opset_imports=opsets)
    results = []
    for inner, outer in zip(kept.output, node.proto.output, strict=True):
        type_ = _read_type(found.get(inner), sizes) or declared(outer)
        if type_ is None:
            raise MoecError("the sizes of its results are not known when compiling")
        results.append(type_)
    return results


def _array_of(numbers: Numbers):
    import numpy as np

    return np.array(numbers.sizes, dtype=DTYPES[numbers.dtype].numpy).reshape(numbers.array.shape)


def _type_proto(type_: TensorType) -> TypeProto:
    shape = [int(s) if s.is_Integer else size_text(s) for s in type_.shape]
    return helper.make_tensor_type_proto(_NUMBERS[type_.dtype], shape)


def _read_type(found: TypeProto | None, sizes: Mapping[str, Size]) -> TensorType | None:
    """Return a type that ONNX inferred; None where a size is none of those of the operands."""
    if found is None or not found.HasField("tensor_type") or not found.tensor_type.HasField("shape"):
        return None
    shape: list[int | Size] = []
    for axis in found.tensor_type.shape.dim:
        if axis.HasField("dim_value"):
            shape.append(axis.dim_value)
        elif axis.dim_param in sizes:
            shape.append(sizes[axis.dim_param])
        else:
            return None
    return TensorType.of(computed_dtype(found.tensor_type.elem_type, "a result"), *shape)


def _plain_value(attribute: AttributeProto) -> Attr:
    if attribute.type not in _PLAIN:
        raise MoecError(f"its attribute {attribute.name} is neither a number, a word nor a list of numbers")
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, (int, float)) else tuple(value)
