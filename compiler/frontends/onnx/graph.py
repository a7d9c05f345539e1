"""Writes the nodes of an ONNX graph as ops, one after the other; the operators are in the files beside this one."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto

from ...errors import MoecError
from ...ir.module import Op, Value
from ...ir.notes import Note
from ...ir.recipes import Literal, Recipe, Tensor
from ...ir.types import TensorType
from ...weights.sources.onnx import OnnxSource
from ...weights.steps.table import step
from ..aten import einsum, operators  # noqa: F401  (these fill the table of handlers)
from ..aten.lower import HANDLERS, Graph, Proxy
from ..transformers.model_errors import CODE_ERRORS
from .folded import fold_node
from .node import COMPUTED, Item, Node
from .numbers import MOST, Numbers

Operator = Callable[["OnnxGraph", Node], Any]
OPERATORS: dict[str, Operator] = {}
MOST_NODES = 1 << 20  # written in all, those of functions for each call
OWN = "moec"  # the domain of operators that moec writes with functions, whose bodies say the same in many nodes
_DEEPEST = 32  # functions that call functions
_HOLE = re.compile(r"\{\d+\.\.\d+\}|\{\w+\}")


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Declare what writes operators, by name; one of another domain than ONNX's own as `com.microsoft.QMoE`."""

    def declare(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return declare


@dataclass
class OnnxGraph(Graph):
    """A function while nodes are written into it: `items` is what the names of the graph stand for."""

    source: OnnxSource = field(kw_only=True)
    opsets: Mapping[str, int] = field(default_factory=dict)
    functions: Mapping[tuple[str, str], FunctionProto] = field(default_factory=dict)
    carry: Callable[[OnnxGraph, Node, MoecError], tuple[Item, ...]] = field(kw_only=True)
    notes: list[Note] = field(default_factory=list)
    items: dict[str, Item | None] = field(default_factory=dict)
    weights: dict[str, Value] = field(default_factory=dict)
    made_of: dict[Recipe, Value] = field(default_factory=dict)  # weights made of codes
    angles: dict[tuple[Value, Value], Value] = field(default_factory=dict)  # by table and places
    turned: dict[str, Value] = field(default_factory=dict)  # matrices by the names of what they are the transposes of
    written: int = 0
    longest: int = 1 << 20  # positions that the tables of angles have, or what a size is at most
    made_by: dict[str, Op] = field(default_factory=dict)  # of the first `indexed` ops
    indexed: int = 0

    # --- what names stand for ----------------------------------------------------------------------------------

    def value(self, item: Item | None) -> Value:
        """Return an item as a value; numbers become constants."""
        if isinstance(item, Value):
            return item
        if isinstance(item, Numbers):
            return self._constant(item)
        raise MoecError("an input is missing" if item is None else "rows that a mask chooses are used as a tensor")

    def _constant(self, numbers: Numbers) -> Value:
        """Return numbers as a value: a scalar, a count from 0, a weight written into the program, or computed of sizes."""
        found, shape = numbers.sizes, numbers.array.shape
        if not shape:
            number = found[0]
            if isinstance(number, sympy.Expr) and not number.is_number:
                return self.cast(self.size_value(number), numbers.dtype)
            return self.scalar(number, numbers.dtype)
        if len(found) > 1 and len(shape) == 1 and numbers.dtype == "i64" and found == list(range(len(found))):
            return self.builder.add("core.iota", size=len(found))
        if not any(isinstance(n, sympy.Expr) for n in found):
            kind = bool if numbers.dtype == "bool" else float if numbers.dtype.startswith("f") else int
            literal = Literal(TensorType.of(numbers.dtype, *shape), tuple(kind(n) for n in found))
            return self.builder.const("numbers", literal)
        values = [self.cast(self.size_value(sympy.sympify(n)), numbers.dtype) for n in found]
        parts = [self.builder.add("core.reshape", value, shape=(1,)) for value in values]
        joined = parts[0] if len(parts) == 1 else self.builder.add("core.concat", *parts, axis=0)
        return joined if len(shape) == 1 else self.builder.add("core.reshape", joined, shape=shape)

    def operand(self, item: Item | None, other: Item | None) -> Any:
        """Return an item beside another one as aten's handlers take it: a single number as such, where axes allow it."""
        if isinstance(item, Numbers) and item.array.size == 1 and isinstance(other, (Value, Proxy)):
            rank = len(other.type.shape) if isinstance(other, Value) else 1
            if item.array.ndim <= rank:
                return item.single
        return item if isinstance(item, Proxy) else self.value(item)

    def _weight(self, name: str, type_: TensorType) -> Value:
        """Return an initializer as a weight, in f32 where it is a half float."""
        recipe: Recipe = Tensor(tensor_name(name), type_)
        if type_.dtype in COMPUTED:
            recipe = step("cast", recipe, to=COMPUTED[type_.dtype])
        return self.builder.const(identifier(name), recipe)

    def add_tensor(self, tensor: TensorProto, name: str) -> Item:
        """Take a constant of the model: numbers where it has a few integers, or one number of another kind, else a weight."""
        return self._item_of(name, self.source.add(tensor, name))

    def add_constant(self, tensor: TensorProto) -> Item:
        """Take a constant of a node, named by its content: that of a function is taken once for all calls."""
        name = f"constant/{hashlib.sha256(tensor.SerializeToString(deterministic=True)).hexdigest()[:16]}"
        info = self.source.tensors.get(name)
        return self._item_of(name, info.type if info else self.source.add(tensor, name, keep=True))

    def _item_of(self, name: str, type_: TensorType) -> Item:
        elements = int(type_.elements)
        counted = type_.dtype in ("i64", "i32") and elements <= MOST and len(type_.shape) <= 2
        if counted or (elements == 1 and type_.dtype in ("bool", "f32", "f64", *COMPUTED)):
            values = self.source.read(name)
            return Numbers.of(values.tolist(), COMPUTED.get(type_.dtype, type_.dtype))
        if name not in self.weights:
            self.weights[name] = self._weight(name, type_)
        return self.weights[name]

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Write an operator as its namesake of aten is written; rows that a mask chooses say themselves what becomes of them."""
        handler = HANDLERS.get(name) or HANDLERS[name.rpartition(".")[0]]
        inner = [a for argument in arguments for a in (argument if isinstance(argument, list) else [argument])]
        proxy = next((a for a in inner if isinstance(a, Proxy)), None)
        if proxy is not None:
            return proxy.apply(self, name, handler, list(arguments), options)
        return handler(self, *arguments, **options)

    def producer(self, value: Any) -> Any:
        """Return the op that makes a value; None for what is given from outside."""
        for op in self.builder.ops[self.indexed :]:
            self.made_by.update(dict.fromkeys((result.name for result in op.results), op))
        self.indexed = len(self.builder.ops)
        return self.made_by.get(value.name) if isinstance(value, Value) else None

    # --- nodes -------------------------------------------------------------------------------------------------

    def write_nodes(
        self,
        nodes: Iterable[NodeProto],
        items: dict[str, Item | None],
        given: Mapping[str, AttributeProto],
        depth: int = 0,
    ) -> None:
        """Write nodes; `items` is what names stand for and takes their results, `given` the attributes of a function."""
        for proto in nodes:
            self.written += 1
            if self.written > MOST_NODES:
                raise MoecError(
                    f"the model has more than {MOST_NODES} nodes", todo="export it without so many functions"
                )
            place = place_of(proto)
            if place or not depth:
                self.builder.loc = (place,) if place else ()
            if lacking := [name for name in proto.input if name and name not in items]:
                raise MoecError(f"{lacking[0]} is read before a node makes it", model=place or proto.op_type)
            bound = {a.name: given.get(a.ref_attr_name) if a.ref_attr_name else a for a in proto.attribute}
            attributes = {name: attribute for name, attribute in bound.items() if attribute is not None}
            opset = self.opsets.get("" if proto.domain == "ai.onnx" else proto.domain, 1)
            node = Node(proto, tuple(items[name] if name else None for name in proto.input), attributes, opset)
            results = self._write_node(node, depth)
            if len(results) < len([name for name in proto.output if name]):
                raise MoecError(f"{node.label} has {len(results)} results, the model wants more", model=place)
            made = zip(proto.output, results, strict=False)  # a result that nothing stands for must not be read
            items.update({name: item for name, item in made if name and item is not None})

    def _write_node(self, node: Node, depth: int) -> tuple[Item | None, ...]:
        if all(item is None or isinstance(item, Numbers) for item in node.inputs):
            with _reported(node, self.builder.loc):
                folded = fold_node(node, [item for item in node.inputs if not isinstance(item, (Value, Proxy))])
            if folded is not None:
                return (folded,)
        function = self.functions.get((node.proto.domain, node.type))
        if function is not None and not (node.domain == OWN and node.label in OPERATORS):
            return self._write_function(node, function, depth)
        before, scalars = len(self.builder.ops), dict(self.scalars)
        try:
            with _reported(node, self.builder.loc):
                return self._write_operator(node)
        except MoecError as error:
            gone = {result.name for op in self.builder.ops[before:] for result in op.results}
            del self.builder.ops[before:]
            self.scalars, self.indexed = scalars, min(self.indexed, before)
            self.angles = {key: value for key, value in self.angles.items() if value.name not in gone}
            return self.carry(self, node, error)

    def _write_operator(self, node: Node) -> tuple[Item | None, ...]:
        write = OPERATORS.get(node.label)
        if write is None:
            raise MoecError(f"no op of the IR stands for the operator {node.label}")
        found = write(self, node)
        return found if isinstance(found, tuple) else (found,)

    def _write_function(self, node: Node, function: FunctionProto, depth: int) -> tuple[Item | None, ...]:
        """Write the nodes of a local function in the place of its call."""
        if depth >= _DEEPEST:
            raise MoecError(f"the function {function.name} calls functions more than {_DEEPEST} deep", model=node.label)
        if len(node.inputs) > len(function.input):
            raise MoecError(
                f"the function {function.name} takes {len(function.input)} inputs, {len(node.inputs)} given"
            )
        items = dict.fromkeys(function.input) | dict(zip(function.input, node.inputs, strict=False))
        defaults = {a.name: a for a in function.attribute_proto}
        outer, self.opsets = self.opsets, {**self.opsets, **{o.domain: o.version for o in function.opset_import}}
        loc = self.builder.loc
        self.write_nodes(function.node, items, {**defaults, **node.attributes}, depth + 1)
        self.opsets, self.builder.loc = outer, loc
        if lacking := [name for name in function.output if name not in items]:
            raise MoecError(f"the function {function.name} makes no {lacking[0]}", model=node.label)
        return tuple(items[name] for name in function.output)


@contextmanager
def _reported(node: Node, loc: tuple[str, ...]) -> Iterator[None]:
    """Turn what a malformed node makes Python raise into a MoecError that names the node."""
    try:
        yield
    except CODE_ERRORS as error:
        lines = str(error).splitlines()
        what = f"the node {node.label} is not as it should be: {lines[0] if lines else type(error).__name__}"
        raise MoecError(what, model=", ".join(loc)) from error


def place_of(proto: NodeProto) -> str:
    """Return where in the source model a node comes from: what torch's exporter says of it, else its name's path."""
    for entry in proto.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes" and len(entry.value) < 4096:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                break
            named = [s for s in scopes[:-1] if isinstance(s, str) and s] if isinstance(scopes, list) else []
            return named[-1] if named else ""
    path = proto.name.strip("/").rpartition("/")[0] if "/" in proto.name else ""
    return path.replace("/", ".").removeprefix("model.model.")[:200]


def tensor_name(name: str) -> str:
    """Return how a recipe names an initializer: with braces it would be a template, with a slash without its prefix."""
    if _HOLE.search(name):
        raise MoecError(f"the initializer {name[:80]} has braces in its name", todo="rename it")
    return f"/{name}" if name.startswith("/") else name


def identifier(name: str) -> str:
    """Return a name as programs write it: of letters, digits, dots and underscores."""
    made = re.sub(r"[^\w.]+", "_", name, flags=re.ASCII).strip("_.")[:80]
    return made if made and not made[0].isdigit() else f"_{made}" if made else "value"
