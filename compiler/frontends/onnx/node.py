"""A node of an ONNX graph as operators read it: what its inputs stand for, and typed attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, helper, numpy_helper

from ...errors import MoecError
from ...ir.module import Value
from ...weights.sources.onnx import ONNX_DTYPES, type_name
from ..aten.lower import Proxy
from .numbers import Numbers

Item = Value | Numbers | Proxy  # what a name of the graph stands for
COMPUTED = {"f16": "f32", "bf16": "f32"}  # half floats are computed in f32, as those of a checkpoint are


def computed_dtype(elem_type: int, what: str) -> str:
    """Return the dtype that values of a type of ONNX are computed in; MoecError for one that programs do not have."""
    dtype = ONNX_DTYPES.get(elem_type)
    if dtype is None:
        raise MoecError(f"{what} is {type_name(elem_type)}, which is not understood")
    return COMPUTED.get(dtype, dtype)


@dataclass(frozen=True)
class Node:
    """A node: its operator, inputs (None for one that is left out), and attributes with those of a function filled in."""

    proto: NodeProto
    inputs: tuple[Item | None, ...]
    attributes: Mapping[str, AttributeProto]
    opset: int

    @property
    def type(self) -> str:
        """The name of the operator."""
        return self.proto.op_type

    @property
    def domain(self) -> str:
        """The domain of the operator; empty for ONNX's own."""
        return "" if self.proto.domain == "ai.onnx" else self.proto.domain

    @property
    def label(self) -> str:
        """The operator with its domain."""
        return ".".join(filter(None, (self.domain, self.type)))

    def attribute(self, name: str, kind: Any, default: Any = None) -> Any:
        """Return an attribute, or the default; MoecError for one of another type, or a missing one without a default."""
        found = self.attributes.get(name)
        if found is None:
            if default is None:
                raise MoecError(f"{self.label} lacks the attribute {name}")
            return default
        if found.type != kind:
            raise MoecError(f"the attribute {name} of {self.label} has another type than it should")
        return helper.get_attribute_value(found)

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer."""
        return int(self.attribute(name, AttributeProto.INT, default))

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number."""
        return float(self.attribute(name, AttributeProto.FLOAT, default))

    def text(self, name: str, default: str | None = None) -> str:
        """Return a word."""
        found = self.attribute(name, AttributeProto.STRING, default)
        return found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)

    def integers(self, name: str) -> list[int] | None:
        """Return a list of integers; None where it is left out."""
        return list(self.attribute(name, AttributeProto.INTS)) if name in self.attributes else None

    def tensor(self, name: str) -> np.ndarray | None:
        """Return a small tensor; None where it is left out."""
        if name not in self.attributes:
            return None
        return numpy_helper.to_array(self.attribute(name, AttributeProto.TENSOR))

    def dtype(self, name: str) -> str:
        """Return a dtype that values are computed in."""
        return computed_dtype(self.integer(name), f"the attribute {name} of {self.label}")

    def axes(self, given: Item | None) -> list[int] | None:
        """Return the axes of a squeeze or a reduction, an input or (before opset 13) an attribute; None for all."""
        if given is not None:
            return numbers_of(given, f"the axes of {self.label}").integers
        return self.integers("axes")

    def numbers(self, place: int, what: str) -> Numbers:
        """Return an input that has to be known when compiling."""
        found = self.inputs[place] if place < len(self.inputs) else None
        return numbers_of(found, f"{what} of {self.label}")

    def has(self, place: int) -> bool:
        """Return whether an input is given."""
        return place < len(self.inputs) and self.inputs[place] is not None


def numbers_of(item: Item | None, what: str) -> Numbers:
    """Return an item that has to be known when compiling; MoecError for one that is computed, or missing."""
    if isinstance(item, Numbers):
        return item
    raise MoecError(f"{what} {'is missing' if item is None else 'is computed while the program runs'}")
