"""Programs of one op for the probe: emitted as lowering would, or bent afterwards into what moec never writes.

Each comes with inputs and what the op's reference makes of them. Weights are in the program, since the runtime
rearranges those when it opens a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ....compiler.formats.format import Format, Parts
from ....compiler.formats.packing import pack_bits
from ....compiler.ir.dims import dim
from ....compiler.ir.module import Const, Dim, Module, Value
from ....compiler.ir.recipes import Tensor
from ....compiler.ir.types import TensorType
from ....compiler.ops import OPS
from ....compiler.ops.builder import IRBuilder
from ....compiler.weights.sources.source import ModuleSource
from ..onnx.emit import IR_VERSION, MODEL, OPSET, emit_model
from ..onnx.graph import CONTRIB

Edit = Callable[[onnx.ModelProto], None]
DIMS = (Dim("T", 1, 4096), Dim("S", 1, 4096), Dim("P", 0, 4096))
T, S, P = dim("T"), dim("S"), dim("P")
TOKENS = (1, 7, 40)  # one token takes other kernels than several


@dataclass(frozen=True)
class Case:
    """A program written into a folder: inputs by name and what is wanted of them.

    With `rows` the first rows of all inputs, run alone, give the first rows of what is wanted. To take the speed there
    are `steps`, inputs of one token, each of which reads `bytes_read` of weights.
    """

    feeds: dict[str, torch.Tensor] = field(default_factory=dict)
    wants: Sequence[torch.Tensor] = ()
    rows: bool = False
    steps: Sequence[dict[str, torch.Tensor]] = ()
    bytes_read: int = 0


# --- weights ---------------------------------------------------------------------------------------------------


def random_quantized_parts(format: Format, *sizes: int, seed: int) -> dict[str, torch.Tensor | None]:
    """Return codes, scales and zero points of random integer weights with a standard deviation near 1 / sqrt(K)."""
    generator = torch.Generator().manual_seed(seed)
    *rows, width = sizes
    half = 1 << (format.bits - 1)
    spread = 0.35 * half
    groups = (*rows, width // format.group)
    codes = torch.randn(sizes, generator=generator).mul_(spread).add_(half).round_().clamp_(0, 2 * half - 1)
    scales = (torch.rand(groups, generator=generator) + 0.5) / (spread * width**0.5)
    zeros = torch.randint(half - half // 4 - 1, half + half // 4 + 1, groups, generator=generator)
    return {
        "codes": pack_bits(codes.to(torch.uint8), format.bits),
        "scales": scales,
        "zeros": pack_bits(zeros.to(torch.uint8), format.bits) if format.zeros else None,
    }


def large_parts(format: Format, *sizes: int) -> dict[str, torch.Tensor | None]:
    """Return parts with meaningless codes, made quickly."""
    *rows, width = sizes
    groups = width // format.group
    some = torch.randint(0, 256, (1 << 16,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    count = torch.Size((*rows, width * format.bits // 8))
    codes = some.repeat(count.numel() // some.numel() + 1)[: count.numel()].reshape(count)
    zeros = torch.full((*rows, -(-groups * format.bits // 8)), 0x88, dtype=torch.uint8)
    return {"codes": codes, "scales": torch.full((*rows, groups), 0.01), "zeros": zeros if format.zeros else None}


# --- programs --------------------------------------------------------------------------------------------------


def write_program(
    name: str, inputs: Mapping[str, TensorType], weights: Mapping[str, torch.Tensor | None], folder: Path, **attrs: Any
) -> None:
    """Write a program of one op into a folder.

    Inputs and weights are by the names of the op's operands; an operand that is neither (or a weight of None) is absent.
    """
    there = {n: t for n, t in weights.items() if t is not None}
    source = ModuleSource(there)
    values = {n: Value(n, t) for n, t in inputs.items()} | {n: Value(n, source.tensors[n].type) for n in there}
    consts = (Const(values[n], Tensor(n, values[n].type)) for n in there)
    operands = (values.get(o.name) for o in OPS[name].signature.operands)
    builder = IRBuilder("main", (values[n] for n in inputs), consts)
    hints = [f"y{i}" for i, _ in enumerate(OPS[name].signature.results)]
    function = builder.build(builder.add_all(name, *operands, hints=hints, **attrs))
    emit_model(Module("kernel", DIMS, (function,)), source, folder)


def run_reference(name: str, given: Mapping[str, torch.Tensor | None], **attrs: Any) -> Sequence[torch.Tensor]:
    """Return what an op's reference makes of operands by name."""
    result = OPS[name].reference(*(given.get(o.name) for o in OPS[name].signature.operands), **attrs)
    return result if isinstance(result, tuple) else (result,)


# --- programs that moec has no op for ------------------------------------------------------------------------------


def write_node(
    node: NodeProto, inputs: Mapping[str, Sequence[Any]], sizes: Sequence[Any], tensors: Sequence[TensorProto],
    folder: Path,
) -> None:  # fmt: skip
    """Write a program of one node by hand; `inputs` are (element type, *sizes) by name, `sizes` those of the f32 output."""
    given = [helper.make_tensor_value_info(n, kind, shape) for n, (kind, *shape) in inputs.items()]
    output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, sizes)
    graph = helper.make_graph([node], "main", given, [output], tensors)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), folder / MODEL)


def stored_tensors(name: str, parts: Parts, format: Format) -> list[TensorProto]:
    """Return codes and scales of floating-point weights in ONNX's element types for them."""
    codes = numpy_helper.from_array(parts["codes"].numpy(), f"{name}.codes")
    if format.element == "e4m3":
        codes.data_type = TensorProto.FLOAT8E4M3FN
    raw = parts["scales"].view(torch.uint8) if format.scale != "f32" else parts["scales"]
    scales = numpy_helper.from_array(raw.numpy(), f"{name}.scales")
    if format.scale != "f32":
        scales.data_type = {"f8e8m0": TensorProto.FLOAT8E8M0, "f8e4m3": TensorProto.FLOAT8E4M3FN}[format.scale]
    return [codes, scales]


# --- bending what was written ----------------------------------------------------------------------------------


def edit_model(folder: Path, *edits: Edit) -> None:
    """Change the model in a folder."""
    if edits:
        model = onnx.load(folder / MODEL, load_external_data=False)
        for edit in edits:
            edit(model)
        onnx.save(model, folder / MODEL)


def main_node(model: onnx.ModelProto) -> NodeProto:
    """Return the one node of com.microsoft."""
    (node,) = (n for n in model.graph.node if n.domain)
    return node


def set_attributes(**values: Any) -> Edit:
    """Return an edit that sets attributes; None takes one away."""

    def edit(model: onnx.ModelProto) -> None:
        node = main_node(model)
        kept = [a for a in node.attribute if a.name not in values]
        kept += [helper.make_attribute(name, value) for name, value in values.items() if value is not None]
        del node.attribute[:]
        node.attribute.extend(kept)

    return edit


def weight_inputs(places: Mapping[int, str], weights: Mapping[str, torch.Tensor]) -> Edit:
    """Return an edit that puts weights where the node has no inputs yet."""

    def edit(model: onnx.ModelProto) -> None:
        node = main_node(model)
        node.input.extend([""] * (max(places) + 1 - len(node.input)))
        for place, name in places.items():
            node.input[place] = name
            model.graph.initializer.append(numpy_helper.from_array(weights[name].numpy(), name))

    return edit


def without_last_axis(*inputs: int) -> Edit:
    """Return an edit that takes away the last axis, of size 1, of weights."""

    def edit(model: onnx.ModelProto) -> None:
        names = {main_node(model).input[i] for i in inputs}
        for tensor in model.graph.initializer:
            if tensor.name in names:
                del tensor.dims[-1]

    return edit


def cast_inputs(dtype: str) -> Edit:
    """Return an edit that gives the node its f32 inputs in another float dtype."""
    kind = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[dtype]

    def edit(model: onnx.ModelProto) -> None:
        node, graph = main_node(model), model.graph
        integers = {i.name for i in graph.initializer if i.data_type != TensorProto.FLOAT}
        place = list(graph.node).index(node)
        before, after = [], []
        for k, name in enumerate(node.input):
            if name and name not in integers:
                before.append(helper.make_node("Cast", [name], [f"{name}.{dtype}"], to=kind))
                node.input[k] = before[-1].output[0]
        for k, name in enumerate(node.output):
            after.append(helper.make_node("Cast", [f"{name}.{dtype}"], [name], to=TensorProto.FLOAT))
            node.output[k] = after[-1].input[0]
        nodes = [*graph.node]
        nodes[place + 1 : place + 1] = after
        nodes[place:place] = before
        del graph.node[:]
        graph.node.extend(nodes)

    return edit
