"""From an exported torch graph to IR ops, node by node; the handlers are in operators.py, shapes.py and the files beside them."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from ...errors import MoecError
from ...ir.dims import Size, size
from ...ir.dtypes import dtype_name
from ...ir.module import Value
from ...ops.builder import IRBuilder
from .export import Traced
from .uninitialised import Uninitialised

Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}


def aten(*names: str) -> Callable[[Handler], Handler]:
    """Declare the handler of operators by overload name (`aten.add.Tensor`) or packet name (`aten.add`)."""

    def declare(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return declare


class Proxy(ABC):
    """What stands for a tensor that the IR does not hold as it is; it says itself what operators make of it."""

    @abstractmethod
    def apply(self, g: Graph, name: str, handler: Handler, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operator whose handler is given; MoecError for one that does not go."""


@dataclass
class Graph:
    """A function while operators are written into it, with the scalars that it has so far."""

    builder: IRBuilder
    scalars: dict[tuple[Any, str], Value] = field(default_factory=dict)

    def scalar(self, number: Any, dtype: str) -> Value:
        """Return a constant, made once for each number and dtype."""
        kind = bool if dtype == "bool" else float if dtype.startswith(("f", "b")) else int
        key = (kind(number), dtype)
        if key not in self.scalars:
            self.scalars[key] = self.builder.add("core.constant", value=kind(number), dtype=dtype, hint="c")
        return self.scalars[key]

    def like(self, number: Any, other: Value) -> Value:
        """Return a number or a size as a value of another value's dtype; values are returned as they are."""
        if isinstance(number, sympy.Expr) and not number.is_number:
            return self.cast(self.size_value(number), other.type.dtype)
        return number if isinstance(number, Value) else self.scalar(number, other.type.dtype)

    def size_value(self, number: Size) -> Value:
        """Return a size as an i64 scalar: the last of as many numbers and one more."""
        counted = self.builder.add("core.iota", size=number + 1)
        last = self.builder.add("core.slice", counted, axis=0, start=number, stop=number + 1)
        return self.builder.add("core.reshape", last, shape=())

    def cast(self, x: Value, dtype: str) -> Value:
        """Convert x unless it has the dtype."""
        return x if x.type.dtype == dtype else self.builder.add("core.cast", x, to=dtype)


@dataclass
class TracedGraph(Graph):
    """A traced graph being rewritten: what each fx node became (a Value, a size, or a tuple of them)."""

    traced: Traced = field(kw_only=True)
    calls: Callable[[Graph, list[Value], int], tuple[Value, ...]] | None = None  # what moec.layer becomes
    values: dict[Any, Any] = field(default_factory=dict)


def lower_graph(graph: TracedGraph, inputs: dict[str, Any]) -> list[Any]:
    """Write every node of the graph through its handler; return what the graph's outputs became.

    `inputs` gives the value of each placeholder by its fx name.
    """
    outputs: list[Any] = []
    for node in graph.traced.program.graph.nodes:
        match node.op:
            case "placeholder":
                if node.users or node.name in inputs:
                    graph.values[node] = inputs[node.name]
            case "call_function":
                graph.values[node] = _lower_node(graph, node)
            case "output":
                outputs = [_argument_value(graph, a) for a in torch.utils._pytree.tree_leaves(node.args[0])]
            case _:
                raise MoecError(f"a traced {node.op} node is not understood", model=_module_path(node))
    return outputs


def _lower_node(graph: TracedGraph, node: Any) -> Any:
    place = _module_path(node)
    graph.builder.loc = (place,) if place else ()
    val = node.meta.get("val")
    if isinstance(val, torch.SymBool):
        return None  # what is said of sizes; nothing but assertions reads it
    if isinstance(val, (int, torch.SymInt)):
        return None if graph.traced.depends_on_data(val) else graph.traced.size(val)
    if node.target is operator.getitem:
        return _argument_value(graph, node.args[0])[node.args[1]]
    name = _operator_name(node.target)
    base, _, overload = name.rpartition(".")
    in_place = base.endswith("_") and not base.endswith("__")
    key = f"{base[:-1]}.{overload}" if in_place else name
    handler = HANDLERS.get(key) or HANDLERS.get(key.rpartition(".")[0])
    if handler is None:
        raise MoecError(
            f"the operator {name} is not understood", model=place, todo="moec list ops shows what the IR has"
        )
    raw = key.rpartition(".")[0] in (
        "aten.slice",
        "aten.alias",
        "aten.copy",
    )  # these may see a tensor without values yet
    args = [_argument_value(graph, a, raw) for a in node.args]
    kwargs = {k: _argument_value(graph, v) for k, v in node.kwargs.items()}
    proxy = next((a for a in args if isinstance(a, Proxy)), None)
    result = proxy.apply(graph, key, handler, args, kwargs) if proxy else handler(graph, *args, **kwargs)
    if in_place and not raw:
        _rebind_operand(graph, node, result, place)
    return result


def _rebind_operand(graph: TracedGraph, node: Any, result: Any, place: str) -> None:
    """Bind the operand of an in-place operator to its new value for the nodes after it."""
    target = node.args[0]
    views = ("view", "slice", "select", "transpose", "unsqueeze", "expand", "permute", "reshape", "split", "chunk")
    if target.op == "call_function" and any(v in _operator_name(target.target) for v in views):
        raise MoecError(f"{node.target} writes into a view, which is not understood", model=place)
    if target.op == "placeholder":
        raise MoecError(f"{node.target} writes into an input or a weight, which is not understood", model=place)
    graph.values[target] = result


def _operator_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return getattr(target, "__name__", str(target))


def _module_path(node: Any) -> str:
    """Return the module path of a node, without the wrapper's own name."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if not path.startswith("_")]
    return stack[-1].partition(".")[2] if stack else ""


def _argument_value(graph: TracedGraph, argument: Any, raw: bool = False) -> Any:
    if isinstance(argument, torch.fx.Node):
        value = graph.values[argument]
        return value.complete(graph.builder) if isinstance(value, Uninitialised) and not raw else value
    if isinstance(argument, (list, tuple)):
        return [_argument_value(graph, a) for a in argument]
    if isinstance(argument, torch.dtype):
        return dtype_name(argument)
    return argument


def normalize_axis(x: Value, number: int) -> int:
    """Return an axis counted from the front."""
    return number % len(x.type.shape)


def resolve_shape(x: Value, wanted: list[Any]) -> tuple[Size, ...]:
    """Return a target shape with -1 resolved."""
    sizes = [size(w) for w in wanted]
    if -1 in sizes:
        hole = sizes.index(sympy.Integer(-1))
        known = sympy.Mul(*[s for i, s in enumerate(sizes) if i != hole])
        sizes[hole] = sympy.expand(sympy.cancel(x.type.elements / known))
    return tuple(sympy.expand(s) for s in sizes)


def reshape(g: Graph, x: Value, shape: Any, hint: str = "") -> Value:
    """Reshape unless the shape is the same."""
    shape = tuple(sympy.expand(size(s)) for s in shape)
    return x if shape == x.type.shape else g.builder.add("core.reshape", x, shape=shape, hint=hint or "reshape")
