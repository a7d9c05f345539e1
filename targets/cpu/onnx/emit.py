"""Write a module of stage kernel as model.onnx and model.onnx.data.

Calls are inlined: a layer's function is emitted once for each call, its names after the prefix `layer.3/`. Weights
go from the source to the data file a tile at a time; small ones are in the model. The same module and weights give
the same bytes.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from onnx import FunctionProto, ModelProto, ValueInfoProto, helper

from ....compiler.errors import MoecError, write_error
from ....compiler.ir.dims import size_text
from ....compiler.ir.module import Function, Module, Op, Value, call_bindings
from ....compiler.ir.recipes import Recipe, bind_recipe
from ....compiler.ops.onnx_node import OPSET
from ....compiler.version import __version__
from ....compiler.weights.evaluate import evaluate_recipe
from ....compiler.weights.memory import TILE_BYTES
from ....compiler.weights.sink import DataFile, tile_threads
from ....compiler.weights.sources.source import WeightSource
from ....compiler.weights.steps.quantized import is_part
from ...target import Emitted
from .. import ops, ops_quantized
from ..kernels.caches import cache_functions
from ..kernels.grids import grid_functions
from ..kernels.nodes import DOMAIN
from ..kernels.place import Placed, place_kernels
from ..lower.logits import LOGITS
from ..options import OwnKernels
from . import attention as onnx_attention
from . import compressed as onnx_compressed
from . import core as onnx_core
from . import dispatch as onnx_dispatch
from . import moe as onnx_moe
from . import nn as onnx_nn
from . import quantized as onnx_quantized
from . import recurrent as onnx_recurrent
from . import route as onnx_route
from .genai import write_genai_config
from .graph import CONTRIB, ONNX_TYPES, Context, Graph, Kernel

KERNELS: dict[str, Kernel] = {
    **onnx_core.KERNELS, **onnx_nn.KERNELS, **onnx_attention.KERNELS, **onnx_moe.KERNELS, **onnx_dispatch.KERNELS,
    **onnx_quantized.KERNELS, **onnx_route.KERNELS, **onnx_compressed.KERNELS, **onnx_recurrent.KERNELS,
}  # fmt: skip

assert ops and ops_quantized  # what is emitted is declared there
MODEL, DATA = "model.onnx", "model.onnx.data"
IR_VERSION = 11  # of opset 23, with which RMSNormalization and RotaryEmbedding came
INLINE_BYTES = 1024  # smaller weights are in the model file
_LARGEST_PROTO = (1 << 31) - 1
_DTYPES = {"bool", "u8", "i8", "i32", "i64", "f32", "f64"}  # what the CPU's kernels compute with
_CONVERT = {
    "core.cast",
    "nn.embedding",
    "onnx.node",
    "ort.decode",
    "ort.experts_nbits",
    "ort.grid_linear",
    "ort.grid_experts",
    "ort.stored_attention",
}  # Cast and Gather take every dtype


def why_unsupported(op: Op) -> str | None:
    """Return None if the target runs the op, else why not, with the ops that come near."""
    if op.name == "call":
        return None
    if op.name not in KERNELS:
        near = difflib.get_close_matches(op.name, KERNELS, n=3, cutoff=0.5)
        near = near or sorted(n for n in KERNELS if n.split(".")[0] == op.name.split(".")[0])
        return f"the target cpu has no kernel for {op.name}; it has {', '.join(near or sorted(KERNELS))}"
    if op.name in _CONVERT:
        return None
    strange = sorted({v.type.dtype for v in (*op.inputs, *op.results)} - _DTYPES)
    if strange:
        return f"the kernel of {op.name} does not take {', '.join(strange)}; it takes {', '.join(sorted(_DTYPES))}"
    return None


def check_supported(module: Module) -> None:
    """Raise MoecError at the first op that the target does not run."""
    for function in module.functions:
        for op in function.ops:
            if reason := why_unsupported(op):
                place = f"%{op.results[0].name} in @{function.name}" if op.results else f"@{function.name}"
                raise MoecError(reason, where=place, model=", ".join(op.loc))


@dataclass(frozen=True)
class OtherNodes:
    """What a target has other nodes for: ops that it emits by itself, and what it puts in place of nodes in the end."""

    kernels: Mapping[str, Kernel]
    rewrite: Callable[[Graph], None]


def emit_model(
    module: Module,
    source: WeightSource,
    folder: Path,
    tile_bytes: int = TILE_BYTES,
    progress: Callable[[int], None] | None = None,
    kernels: OwnKernels | None = None,
    other: OtherNodes | None = None,
) -> Emitted:
    """Write model.onnx, model.onnx.data and genai_config.json (where GenAI can run it) into a folder.

    With `kernels` the nodes that moec's own kernels compute are theirs, and the libraries with them lie beside the
    model. Returns the sha256 of the model, its data and the libraries by name, and what there is to say of the kernels.

    `other` are the nodes of a target other than cpu; what GenAI reads is then left out.
    `progress` is told the bytes of weights written so far. Raises MoecError for an op without a kernel, for weights
    that cannot be read and for a full disk. There is no data file when no weight is large.
    """
    check_supported(module)
    main = module.main
    graph = Graph(main.params, module.dims)
    for value in (*main.params, *main.results):
        graph.fresh(value.name)
    with DataFile(folder / DATA, tile_bytes, progress, tile_threads(source)) as data:
        writer = _Writer(module, graph, source, data, {**KERNELS, **(other.kernels if other else {})})
        writer.inline(main, [p.name for p in main.params], [r.name for r in main.results], "", {})
    graph.prune([r.name for r in main.results])
    if other:
        other.rewrite(graph)
    placed = place_kernels(kernels, graph.nodes, graph.initializers, folder) if kernels else Placed()
    own = (*grid_functions(graph.nodes, OPSET), *cache_functions(graph.nodes, OPSET))
    model = _make_model(module, graph, (*placed.functions, *own), other is None)
    files = {MODEL: _write_model(folder / MODEL, model), **placed.files}
    if data.size:
        files[DATA] = data.sha256
    else:
        (folder / DATA).unlink()
    if other is None:
        write_genai_config(module, folder, placed.library)
    return Emitted(files, placed.notes, placed.entry)


@dataclass
class _Writer:
    """Inlines functions into a graph and puts their weights into the data file."""

    module: Module
    graph: Graph
    source: WeightSource
    data: DataFile
    kernels: Mapping[str, Kernel]
    weights: dict[Recipe, str] = field(default_factory=dict)  # bound recipe -> initializer

    def inline(
        self, function: Function, inputs: Sequence[str], outputs: Sequence[str], prefix: str, bound: Mapping[str, str]
    ) -> None:
        """Emit a function's ops; `inputs` and `outputs` are the ONNX names of its parameters and results."""
        names = {p.name: name for p, name in zip(function.params, inputs, strict=True)}
        for const in function.consts:
            if const.value.name in function.uses:
                recipe = bind_recipe(const.recipe, function.weights, bound)
                names[const.value.name] = self.weight(recipe, prefix + const.value.name)
        wanted: dict[str, str] = {}
        for value, name in zip(function.results, outputs, strict=True):
            wanted.setdefault(value.name, name)
        for op in function.ops:
            for value in op.results:
                names[value.name] = wanted.get(value.name) or self.graph.fresh(prefix + value.name)
            if op.callee:
                self.call(op, names, prefix, bound)
            else:
                label = prefix + (op.results[0].name if op.results else op.name)
                self.kernels[op.name](Context(self.graph, names, label, _bound_place(op, bound)), op)
        for value, name in zip(function.results, outputs, strict=True):
            if names[value.name] != name:  # a parameter, a weight, or a value that is returned twice
                self.graph.node(name, "Identity", [names[value.name]], [name])

    def call(self, op: Op, names: Mapping[str, str], prefix: str, bound: Mapping[str, str]) -> None:
        """Emit the called function under a prefix made of what the call binds."""
        inputs = [names[v.name] for v in op.inputs]
        outputs = [names[v.name] for v in op.results]
        label = ".".join(f"{name}.{value}" for name, value in call_bindings(op).items()) or op.callee
        inner = self.graph.fresh(prefix + label) + "/"
        self.inline(self.module.by_name[op.callee], inputs, outputs, inner, {**bound, **call_bindings(op)})

    def weight(self, recipe: Recipe, name: str) -> str:
        """Return the initializer of a bound recipe, written at its first use."""
        if recipe not in self.weights:
            self.weights[recipe] = self._weight(recipe, name)
        return self.weights[recipe]

    def _weight(self, recipe: Recipe, name: str) -> str:
        type_ = recipe.type
        # the parts of a quantized weight come from one pass over it, large or small
        if int(type_.bytes) >= INLINE_BYTES or is_part(recipe):
            offset, length = self.data.append(recipe, self.source)
            return self.graph.external(name, type_, DATA, offset, length)
        raw = evaluate_recipe(recipe, self.source).reshape(-1).view(torch.uint8).numpy().tobytes()
        return self.graph.initializer(name, type_.dtype, type_.sizes, raw)


def _bound_place(op: Op, bound: Mapping[str, str]) -> str:
    place = ", ".join(op.loc)
    for name, value in bound.items():
        place = place.replace("{" + name + "}", value)
    return place


def _make_model(module: Module, graph: Graph, functions: Sequence[FunctionProto], contributed: bool) -> ModelProto:
    inputs, outputs = ([_value_info(v) for v in values] for values in (module.main.params, module.main.results))
    if graph.optional_inputs:  # then the logits may have fewer tokens than the input
        inputs += graph.optional_inputs
        outputs = [_value_info(v, kept=v.name == LOGITS) for v in module.main.results]
    whole = helper.make_graph(graph.nodes, "main", inputs, outputs, list(graph.initializers.values()))
    opsets = [helper.make_opsetid("", OPSET)]
    if contributed:
        opsets.append(helper.make_opsetid(CONTRIB, 1))
    if functions:
        opsets.append(helper.make_opsetid(DOMAIN, 1))
    return helper.make_model(
        whole, opset_imports=opsets, ir_version=IR_VERSION, producer_name="moec", producer_version=__version__,
        functions=functions,
    )  # fmt: skip


def _value_info(value: Value, kept: bool = False) -> ValueInfoProto:
    shape = [int(s) if s.is_Integer else size_text(s) for s in value.type.shape]
    if kept:
        shape[1] = "kept"
    return helper.make_tensor_value_info(value.name, ONNX_TYPES[value.type.dtype], shape)


def _write_model(path: Path, model: ModelProto) -> str:
    size = model.ByteSize()
    if size > _LARGEST_PROTO:
        raise MoecError(f"{path.name} would have {size} bytes; a protobuf message ends at 2 GB", str(path))
    raw = model.SerializeToString(deterministic=True)
    try:
        path.write_bytes(raw)
    except OSError as error:
        raise write_error(error, path) from error
    return hashlib.sha256(raw).hexdigest()


__all__ = ["KERNELS", "check_supported", "emit_model", "why_unsupported"]
