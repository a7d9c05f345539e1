"""Builds an ONNX graph: nodes, initializers, unique names, and sizes that are only known at run time."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import sympy
from onnx import TensorProto, helper

from ....compiler.errors import MoecError
from ....compiler.ir.dims import Size, evaluate, size_text
from ....compiler.ir.dtypes import DTYPES
from ....compiler.ir.module import Dim, Op, Value
from ....compiler.ir.types import TensorType

ONNX_TYPES = {
    "f32": TensorProto.FLOAT, "f64": TensorProto.DOUBLE, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16,
    "u8": TensorProto.UINT8, "i8": TensorProto.INT8, "i16": TensorProto.INT16, "i32": TensorProto.INT32,
    "i64": TensorProto.INT64, "bool": TensorProto.BOOL, "f8e4m3": TensorProto.FLOAT8E4M3FN,
    "f8e5m2": TensorProto.FLOAT8E5M2, "f8e8m0": TensorProto.FLOAT8E8M0,
}  # fmt: skip
CONTRIB = "com.microsoft"
END = np.iinfo(np.int64).max  # as the stop of a Slice: up to the end of the axis


class Graph:
    """Nodes and initializers so far. What is the same in every layer (shapes, masks) is emitted once, see `once`."""

    def __init__(self, params: Sequence[Value] = (), dims: Sequence[Dim] = ()) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.optional_inputs: list[onnx.ValueInfoProto] = []
        self.params = tuple(params)
        self.lows = {dim.name: dim.low for dim in dims}
        self.views: MutableMapping[str, tuple[str, tuple[Size, ...]]] = {}  # reshaped value -> what it was, its sizes
        self.sums: dict[str, tuple[str, str]] = {}  # result of an Add -> its terms, where both have the result's sizes
        self._once: MutableMapping[Any, Any] = {}
        self._taken: dict[str, int] = {}

    # --- names, nodes, constants -------------------------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """Return the name, or the name with the first free number behind it."""
        number = self._taken.get(name)
        if number is None:
            self._taken[name] = 0
            return name
        while f"{name}.{number}" in self._taken:
            number += 1
        self._taken[name] = number + 1
        self._taken[f"{name}.{number}"] = 0
        return f"{name}.{number}"

    def node(
        self,
        label: str,
        kind: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str] = 1,
        doc: str = "",
        **attrs: Any,
    ) -> list[str]:
        """Add a node and return its output names; `attrs` may hold `domain`."""
        name = self.fresh(f"{label}/{kind}")
        if isinstance(outputs, int):
            outputs = [name] if outputs == 1 else [f"{name}:{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, doc_string=doc or None, **attrs))
        return list(outputs)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what `make` returned the first time that this key was asked for."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def constant(self, value: Any, dtype: str = "i64") -> str:
        """Return the name of an inline initializer with these numbers; equal ones are shared."""
        array: np.ndarray = np.asarray(value, dtype=DTYPES[dtype].numpy)
        text = "_".join(str(v) for v in array.ravel()) if array.size <= 8 else "table"
        key = ("constant", dtype, array.shape, array.tobytes())

        def make() -> str:
            shape = "x".join(map(str, array.shape)) or "scalar"
            return self.initializer(f"constant/{dtype}.{shape}/{text}", dtype, array.shape, array.tobytes())

        return self.once(key, make)

    def initializer(self, name: str, dtype: str, shape: Sequence[int], raw: bytes) -> str:
        """Add a small initializer whose bytes are in the model file."""
        tensor = TensorProto(name=self.fresh(name), data_type=ONNX_TYPES[dtype], dims=shape, raw_data=raw)
        self.initializers[tensor.name] = tensor
        return tensor.name

    def optional_input(self, name: str, default: Sequence[int]) -> str:
        """Return an i64 input that has a value where the caller gives none: an initializer that is an input too."""

        def make() -> str:
            array = np.array(default, np.int64)
            self.optional_inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, array.shape))
            return self.initializer(name, "i64", array.shape, array.tobytes())

        return self.once(("optional input", name), make)

    def external(self, name: str, type_: TensorType, location: str, offset: int, length: int) -> str:
        """Add an initializer whose bytes are in the data file."""
        tensor = TensorProto(
            name=self.fresh(name), data_type=ONNX_TYPES[type_.dtype], dims=type_.sizes,
            data_location=TensorProto.EXTERNAL,
        )  # fmt: skip
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        self.initializers[tensor.name] = tensor
        return tensor.name

    def with_sizes(self, name: str, sizes: Sequence[int], data_type: int | None = None) -> str:
        """Return an initializer with the bytes of another one and other sizes, and where it is given another of ONNX's types."""

        def make() -> str:
            tensor = TensorProto()
            tensor.CopyFrom(self.initializers[name])
            tensor.name = self.fresh(name)
            tensor.dims[:] = sizes
            tensor.data_type = tensor.data_type if data_type is None else data_type
            self.initializers[tensor.name] = tensor
            return tensor.name

        return self.once(("sizes", name, tuple(sizes)), make)

    def rows_of(self, name: str, index: int, count: int) -> str:
        """Return an initializer with the bytes of one of `count` equal shares of the rows of another one."""

        def make() -> str:
            tensor = TensorProto()
            tensor.CopyFrom(self.initializers[name])
            tensor.name = self.fresh(f"{name}.{index}")
            tensor.dims[0] //= count
            if tensor.data_location == TensorProto.EXTERNAL:
                place = {entry.key: entry for entry in tensor.external_data}
                length = int(place["length"].value) // count
                place["offset"].value = str(int(place["offset"].value) + index * length)
                place["length"].value = str(length)
            else:
                length = len(tensor.raw_data) // count
                tensor.raw_data = tensor.raw_data[index * length : (index + 1) * length]
            self.initializers[tensor.name] = tensor
            return tensor.name

        return self.once(("rows", name, index, count), make)

    def take_sum(self, name: str) -> tuple[str, str] | None:
        """Take back the Add that makes a value and return its terms, if it is the last node of all."""
        terms = self.sums.get(name)
        if terms is None or not self.nodes or list(self.nodes[-1].output) != [name]:
            return None
        self.nodes.pop()
        return terms

    @contextmanager
    def body(self) -> Iterator[list[onnx.NodeProto]]:
        """Collect nodes for a subgraph; they see the values outside, and nothing outside sees theirs."""
        outer = self.nodes, self._once, self.views
        self.nodes, self._once, self.views = [], ChainMap({}, self._once), ChainMap({}, self.views)
        try:
            yield self.nodes
        finally:
            self.nodes, self._once, self.views = outer

    def prune(self, results: Sequence[str]) -> None:
        """Remove nodes and initializers that the results do not need."""
        needed, kept = set(results), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(_names_read(node))
        self.nodes = kept[::-1]
        self.initializers = {name: tensor for name, tensor in self.initializers.items() if name in needed}

    # --- sizes -------------------------------------------------------------------------------------------------

    def shape(self, sizes: Sequence[Size | int]) -> str:
        """Return an int64[n] with the sizes."""
        numbers = [int(s) if not isinstance(s, int) and s.is_Integer else s for s in sizes]
        if all(isinstance(n, int) for n in numbers):
            return self.constant(np.array(numbers, np.int64))
        key = tuple(n if isinstance(n, int) else size_text(n) for n in numbers)

        def make() -> str:
            parts = [self.constant([n]) if isinstance(n, int) else self.size(n) for n in numbers]
            return parts[0] if len(parts) == 1 else self.node("sizes", "Concat", parts, axis=0)[0]

        return self.once(("shape", key), make)

    def size(self, expression: Size | int) -> str:
        """Return an int64[1] with the value of a size."""
        if isinstance(expression, int) or expression.is_Integer:
            return self.constant([int(expression)])
        return self.once(("size", size_text(expression)), lambda: self._size(expression))

    def scalar(self, expression: Size | int, dtype: str = "i64") -> str:
        """Return a scalar with the value of a size."""
        if isinstance(expression, int) or expression.is_Integer:
            return self.constant(int(expression), dtype)

        def make() -> str:
            (scalar,) = self.node("sizes", "Squeeze", [self.size(expression), self.constant([0])])
            return scalar if dtype == "i64" else self.node("sizes", "Cast", [scalar], to=ONNX_TYPES[dtype])[0]

        return self.once(("scalar", dtype, size_text(expression)), make)

    def _size(self, e: Size) -> str:
        if found := _input_axis(self.params, e):
            param, axis = found
            return self.node("sizes", "Shape", [param.name], start=axis, end=axis + 1)[0]
        match e:
            case sympy.Symbol():
                total, rest = _solve_for_dim(self.params, e)
                return self.node("sizes", "Sub", [self.size(total), self.size(rest)])[0]
            case sympy.Add() if near := _near_axis(self.params, e):
                return self.node("sizes", "Add", [self.size(near), self.constant([int(e - near)])])[0]
            case sympy.Add() | sympy.Mul():
                numerator, denominator = sympy.fraction(sympy.together(e))
                if denominator != 1:
                    return self._fold("Div", [numerator, denominator])
                return self._fold("Add" if e.is_Add else "Mul", e.as_ordered_terms() if e.is_Add else e.args)
            case sympy.Pow() if e.exp.is_Integer and int(e.exp) > 0:
                return self._fold("Mul", [e.base] * int(e.exp))
            case sympy.floor():
                return self._fold("Div", sympy.fraction(sympy.together(e.args[0])))
            case sympy.ceiling():
                a, b = sympy.fraction(sympy.together(e.args[0]))
                return self._fold("Div", [sympy.expand(a + b - 1), b])
            case sympy.Mod():
                return self._fold("Mod", e.args)
            case sympy.Max() | sympy.Min():
                return self._fold(type(e).__name__, sorted(e.args, key=sympy.default_sort_key))
        raise MoecError(f"the size {size_text(e)} cannot be computed in ONNX")

    def _fold(self, kind: str, parts: Sequence[Size]) -> str:
        result = self.size(parts[0])
        for part in parts[1:]:
            (result,) = self.node("sizes", kind, [result, self.size(part)])
        return result

    def positive(self, expression: Size) -> bool:
        """Return whether a size is at least 1 at run time, as far as the dims' ranges say so."""
        return _is_positive(expression, tuple(sorted(self.lows.items())))


def _names_read(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _names_read(inner)


@lru_cache(maxsize=65536)
def _is_positive(expression: Size, lows: tuple[tuple[str, int], ...]) -> bool:
    if any(c < 0 for c in expression.as_coefficients_dict().values()):
        return False
    known = dict(lows)
    return all(s.name in known for s in expression.free_symbols) and evaluate(expression, known) > 0


def _input_axis(params: Sequence[Value], size: Size) -> tuple[Value, int] | None:
    """Return the parameter axis that has this size; for a state's axis only where no other input tells the size.

    A runtime may pass a cache buffer that is longer than the past, so P follows from the inputs of size P + S and S.
    """
    for param in sorted(params, key=lambda p: p.type.state):
        if size in param.type.shape and (not param.type.state or not _difference_of_sizes(params, size)):
            return param, param.type.shape.index(size)
    return None


def _near_axis(params: Sequence[Value], size: Size) -> Size | None:
    """Return an input's size that differs from this one by a number."""
    return next((s for p in params for s in p.type.shape if (size - s).is_Integer), None)


def _difference_of_sizes(params: Sequence[Value], symbol: Size) -> tuple[Size, Size] | None:
    """Return (P + S, S) for P where both are sizes of inputs that are no states."""
    plain = [size for p in params if not p.type.state for size in p.type.shape]
    alone = {size for size in plain if isinstance(size, sympy.Symbol)}
    for size in plain:
        rest = size - symbol
        if symbol in size.free_symbols and rest != 0 and rest.free_symbols <= alone - {symbol}:
            return size, rest
    return None


def _solve_for_dim(params: Sequence[Value], symbol: sympy.Symbol) -> tuple[Size, Size]:
    found = _difference_of_sizes(params, symbol)
    if found is None:
        raise MoecError(f"the dim {symbol} cannot be read off the inputs of @main", todo="give an input that size")
    return found


class Context:
    """The context of an op's emitter: the graph, the names of the function's values, and a label for new names."""

    def __init__(self, graph: Graph, names: dict[str, str], label: str, doc: str = "") -> None:
        self.graph, self.names, self.label, self.doc = graph, names, label, doc

    def value(self, value: Value | None) -> str:
        """Return the ONNX name of a value; the empty name for an absent operand."""
        return "" if value is None else self.names[value.name]

    def inputs(self, op: Op) -> list[str]:
        """Return the ONNX names of the operands."""
        return [self.value(v) for v in op.operands]

    def node(self, kind: str, *inputs: str, **attrs: Any) -> str:
        """Add a node with one output and return its name."""
        return self.graph.node(self.label, kind, inputs, 1, self.doc, **attrs)[0]

    def nodes(self, kind: str, *inputs: str, outputs: int, **attrs: Any) -> list[str]:
        """Add a node with several outputs and return their names."""
        return self.graph.node(self.label, kind, inputs, outputs, self.doc, **attrs)

    def finish(self, op: Op, kind: str, *inputs: str, **attrs: Any) -> None:
        """Add the node whose outputs are the op's results."""
        self.graph.node(self.label, kind, inputs, [self.value(v) for v in op.results], self.doc, **attrs)

    def alias(self, value: Value, name: str) -> None:
        """Map a result to an existing ONNX value, without a node."""
        self.names[value.name] = name

    def once(self, key: Any, label: str, make: Callable[[Context], str]) -> str:
        """Return a value that all layers share: made at its first use, under its own label."""
        return self.graph.once(key, lambda: make(Context(self.graph, {}, label)))

    def reshape(self, name: str, source: Sequence[Size], target: Sequence[Size]) -> str:
        """Return the value with sizes `target`, right for every value of the dims; a reshape of a reshape is one."""
        graph = self.graph
        name, source = graph.views.get(name, (name, tuple(source)))
        if source == tuple(target):
            return name
        wanted = [0 if i < len(source) and source[i] == s and not s.is_Integer else s for i, s in enumerate(target)]
        unknown = [i for i, s in enumerate(wanted) if not isinstance(s, int) and not s.is_Integer]
        if len(unknown) == 1 and all(graph.positive(s) for i, s in enumerate(target) if i != unknown[0]):
            wanted[unknown.pop()] = -1  # right only where the other sizes are above 0
        if unknown:  # a computed size may be 0, which would mean "as in the input"
            result = self.node("Reshape", name, graph.shape(target), allowzero=1)
        else:
            result = self.node("Reshape", name, graph.constant([int(s) for s in wanted]))
        graph.views[result] = (name, source)
        return result


Kernel = Callable[[Context, Op], None]
