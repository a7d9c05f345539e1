"""The body of a function of the model: nodes that stand for an operator of moec's where the library is not."""

from __future__ import annotations

from typing import Any

from onnx import AttributeProto, NodeProto, helper


class Body:
    """The nodes of a function or of a loop in one, as they are added."""

    def __init__(self, prefix: str = "") -> None:
        """Start without nodes; the names of values begin with the prefix."""
        self.nodes: list[NodeProto] = []
        self.prefix = prefix

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; return the name of its output, or of its outputs."""
        names = [f"{self.prefix}v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def integers(self, *values: int, scalar: bool = False) -> str:
        """Return a constant i64."""
        return self.add("Constant", **({"value_int": values[0]} if scalar else {"value_ints": list(values)}))

    def setting(self, name: str, type: AttributeProto.AttributeType) -> str:
        """Return a number that the node has as an attribute."""
        found = self.add("Constant", value_int=0)
        value = "value_float" if type == AttributeProto.FLOAT else "value_int"
        attribute = self.nodes[-1].attribute[0]
        attribute.Clear()
        attribute.name, attribute.type, attribute.ref_attr_name = value, type, name
        return found
