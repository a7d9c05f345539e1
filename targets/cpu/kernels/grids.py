"""The functions that stand for moec's operators on weights in a grid where the library is not: plain ops that decode.

ONNX Runtime has no operator for such weights. `numbers` of an operator is f32[256, 2], what the two codes of a byte stand for;
of codes of 3 bits, whose operators have names of their own, f32[8], what a code stands for.
"""

from __future__ import annotations

from collections.abc import Iterable

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from .body import Body
from .nodes import DOMAIN

LINEAR = {4: "MatMulGrid", 3: "MatMulGrid3"}  # by the bits of a code
EXPERTS = {4: "GridExperts", 3: "GridExperts3"}
# attributes, which tell the kernels what the plain ops see from the shapes; those of _FLOATS are read by both
_SHAPE = ("K", "N", "bits", "block_size")
_ROUTED = ("k", "expert_weight_bits", "block_size", "activation_type", "swiglu_fusion")
_FLOATS = ("activation_alpha", "activation_beta", "swiglu_limit")


class _Body(Body):
    """A body with what decodes weights in a grid, whose codes have 3 or 4 bits."""

    def __init__(self, bits: int, prefix: str = "") -> None:
        super().__init__(prefix)
        self.bits = bits

    def decoded(self, codes: str, scales: str, numbers: str) -> str:
        """Return the numbers f32[N, K] of a weight."""
        pairs = self.looked_up(numbers, codes) if self.bits == 4 else self.joined(codes, numbers)
        groups = self.add("Concat", self.add("Shape", scales), self.integers(-1), axis=0)
        factors = self.add("Unsqueeze", self.add("Cast", scales, to=TensorProto.FLOAT), self.integers(-1))
        product = self.add("Mul", self.add("Reshape", pairs, groups), factors)
        return self.add("Reshape", product, self.integers(0, -1))

    def looked_up(self, table: str, codes: str) -> str:
        """Return the rows of a table that codes name."""
        return self.add("Gather", table, self.add("Cast", codes, to=TensorProto.INT32))

    def joined(self, codes: str, numbers: str) -> str:
        """Return the numbers of codes of 3 bits, whose highest bits lie behind the others and take half as many bytes."""
        rows = self.integers(0, -1)
        thirds = self.add("Split", codes, outputs=3, axis=1, num_outputs=3)
        low = self.looked_up(self.table(2, 1), self.add("Concat", *thirds[:2], axis=1))
        high = self.looked_up(self.table(1, 4), thirds[2])
        both = self.add("Add", self.add("Reshape", low, rows), self.add("Reshape", high, rows))
        return self.looked_up(numbers, both)

    def table(self, bits: int, times: int) -> str:
        """Return a constant f32[256, 8 / bits]: the codes of each byte, times a number."""
        codes = [(byte >> shift & (1 << bits) - 1) * times for byte in range(256) for shift in range(0, 8, bits)]
        return self.add("Constant", value=helper.make_tensor("value", TensorProto.FLOAT, [256, 8 // bits], codes))

    def linear(self, x: str, codes: str, scales: str, numbers: str) -> str:
        """Return the product with a weight."""
        return self.add("MatMul", x, self.add("Transpose", self.decoded(codes, scales, numbers), perm=[1, 0]))


def grid_functions(nodes: Iterable[NodeProto], opset: int) -> list[FunctionProto]:
    """Return the functions of the operators on grids that a model has."""
    kinds = {node.op_type for node in nodes if node.domain == DOMAIN}
    makers = ((LINEAR, _linear_function), (EXPERTS, _experts_function))
    return [make(bits, opset) for names, make in makers for bits, kind in names.items() if kind in kinds]


def _function(
    kind: str, inputs: list[str], body: _Body, result: str, attributes: Iterable[str], opset: int
) -> FunctionProto:
    body.nodes.append(helper.make_node("Identity", [result], ["y"]))
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, kind, inputs, ["y"], body.nodes, opsets, list(attributes))


def _linear_function(bits: int, opset: int) -> FunctionProto:
    inputs, body = ["x", "codes", "scales", "numbers"], _Body(bits)
    return _function(LINEAR[bits], inputs, body, body.linear(*inputs), _SHAPE, opset)


def _experts_function(bits: int, opset: int) -> FunctionProto:
    """Return the Loop over the distinct experts that were chosen; gate and up rows are interleaved."""
    inputs = ["x", "ids", "gates", "up", "up_scales", "down", "down_scales", "numbers"]
    body = _Body(bits)
    chosen = body.add("Gather", body.add("Shape", "ids"), body.integers(1, scalar=True), axis=0)
    ids = body.add("Reshape", "ids", body.integers(-1))
    gates = body.add("Reshape", "gates", body.integers(-1, 1))
    used = body.add("Unique", ids, sorted=1)
    zero = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    start = body.add("ConstantOfShape", body.add("Shape", "x"), value=zero)
    alpha, beta, limit = (body.setting(name, AttributeProto.FLOAT) for name in _FLOATS)
    below = body.add("Neg", limit)
    loop = _Body(bits, "loop_")
    expert = loop.add("Gather", used, "step", axis=0)
    hits = loop.add("Squeeze", loop.add("NonZero", loop.add("Equal", ids, expert)), loop.integers(0))
    rows = loop.add("Div", hits, chosen)
    weights = [loop.add("Gather", name, expert, axis=0) for name in inputs[3:7]]
    both = loop.linear(loop.add("Gather", "x", rows, axis=0), weights[0], weights[1], "numbers")
    halves = loop.add("Reshape", both, loop.integers(0, -1, 2))
    gate, up = loop.add("Split", halves, outputs=2, axis=2, num_outputs=2)
    gate, up = (loop.add("Squeeze", half, loop.integers(2)) for half in (gate, up))
    gate, up = loop.add("Min", gate, limit), loop.add("Max", loop.add("Min", up, limit), below)
    swish = loop.add("Mul", gate, loop.add("Sigmoid", loop.add("Mul", gate, alpha)))
    inner = loop.add("Mul", swish, loop.add("Add", up, beta))
    result = loop.add(
        "Mul", loop.linear(inner, weights[2], weights[3], "numbers"), loop.add("Gather", gates, hits, axis=0)
    )
    places = loop.add("Unsqueeze", rows, loop.integers(1))
    total = loop.add("ScatterND", "total", places, result, reduction="add")
    go = loop.add("Identity", "go")
    graph = helper.make_graph(
        loop.nodes, "expert",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("total", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info(go, TensorProto.BOOL, []),
            helper.make_tensor_value_info(total, TensorProto.FLOAT, None),
        ],
    )  # fmt: skip
    found = body.add("Loop", body.add("Size", used), "", start, body=graph)
    return _function(EXPERTS[bits], inputs, body, found, (*_ROUTED, *_FLOATS), opset)
