"""From an ONNX model to a module of one function: its inputs, its weights by the names of its initializers, its results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from onnx import ModelProto, TypeProto

from ...errors import MoecError
from ...ir.dce import eliminate_dead_code
from ...ir.dims import Size, dim, size
from ...ir.fragments import parse_size
from ...ir.module import Dim, Function, Module, Value
from ...ir.notes import Note
from ...ir.types import TensorType
from ...ops.builder import IRBuilder
from ...weights.sources.onnx import OnnxSource, constants_of
from ..transformers.model_errors import CODE_ERRORS
from . import arithmetic, attention, contrib, grids, indexing, layers, shapes  # noqa: F401  (these fill the table of operators)
from .carried import carry_node
from .graph import OnnxGraph, identifier
from .interface import NEW, PAST, STORED, Cache, find_states, order_states, shared_sizes
from .model_file import open_model
from .node import computed_dtype

LONGEST = 1 << 20  # the range of a size that the model does not bound
_OLDEST, _NEWEST = 13, 26  # of ONNX's operators, as the table says what they do
_DEFAULTS = ("", "ai.onnx")


class Imported(NamedTuple):
    """The module (stage graph) of a model, where its weights are read, what was not raised and why.

    `states` are its caches by the names of its inputs.
    """

    module: Module
    weights: OnnxSource
    notes: tuple[Note, ...]
    states: Mapping[str, Cache]


def import_file(path: Path, name: str) -> Imported:
    """Return what an ONNX file is as a module."""
    model, content = open_model(path)
    return import_model(model, OnnxSource(path, content), name)


def import_model(model: ModelProto, source: OnnxSource, name: str) -> Imported:
    """Return what a model is as a module; MoecError for what can neither be raised to ops of the IR nor carried through."""
    try:
        return _import_graph(model, source, name)
    except MoecError as error:
        raise replace(error, where=error.where or name) from None
    except CODE_ERRORS as error:  # texts that are no UTF-8, and what else protobuf lets pass
        lines = str(error).splitlines()
        raise MoecError(
            f"the model is not as it should be: {lines[0] if lines else type(error).__name__}", name
        ) from error


def _import_graph(model: ModelProto, source: OnnxSource, name: str) -> Imported:
    graph = model.graph
    opsets = {("" if o.domain in _DEFAULTS else o.domain): o.version for o in model.opset_import}
    if not _OLDEST <= opsets.get("", 1) <= _NEWEST:
        what = f"the model is of opset {opsets.get('', 1)}; {_OLDEST} to {_NEWEST} are understood"
        raise MoecError(what, todo="convert it with onnx.version_converter")
    tensors = constants_of(graph)
    dims = _Dims()
    inputs = [info for info in graph.input if info.name not in tensors]
    for info in inputs:
        dims.declare(info.type)
    types = {info.name: dims.type_of(info.type, info.name) for info in inputs}
    declared = {info.name: info.type for info in (*graph.value_info, *graph.output)}

    def type_declared(wanted: str) -> TensorType | None:
        return dims.known_type(declared[wanted], wanted) if wanted in declared else None

    g = OnnxGraph(
        IRBuilder("main"), source=source, opsets=opsets, functions={(f.domain, f.name): f for f in model.functions},
        carry=lambda g, node, error: carry_node(g, node, error, type_declared),
    )  # fmt: skip
    states = find_states(graph, types)
    types, dims.renamed = shared_sizes(graph, types, states)
    scales = {cache.present for cache in states.values() if cache.scales}
    for name_, type_ in types.items():
        cache = states.get(name_)
        if cache is not None and cache.scales:
            g.items[name_] = None  # caches are numbers, whatever they are stored as
        else:
            dtype = "f32" if cache is not None and cache.node.op_type in STORED else type_.dtype
            g.items[name_] = g.builder.param(identifier(name_), replace(type_, dtype=dtype, state=cache is not None))
    outputs = [info.name for info in graph.output if info.name not in scales]
    results = {name: g.builder.names.fresh(identifier(name)) for name in outputs}
    for name_, tensor in tensors.items():
        g.items[name_] = g.add_tensor(tensor, name_)
    g.write_nodes(graph.node, g.items, {})
    main = eliminate_dead_code(order_states(_name_results(g, results), g, states, results))
    return Imported(Module("graph", dims.ranges(main, g.longest), (main,), name), source, tuple(g.notes), states)


def _name_results(g: OnnxGraph, names: Mapping[str, str]) -> Function:
    """Return the function with its results under names: those in programs by those that the model gives them."""
    if lacking := [name for name in names if name not in g.items]:
        raise MoecError(f"no node makes the output {lacking[0]}")
    results = []
    for name in names:
        value = g.value(g.items[name])
        taken = value in g.builder.params or value.name in g.builder.consts or value in results
        results.append(g.builder.add("core.reshape", value, shape=value.type.shape) if taken else value)
    renamed = {value.name: name for value, name in zip(results, names.values(), strict=True)}
    main = g.builder.build(results).renamed(renamed)
    return replace(main, results=tuple(Value(renamed[v.name], v.type) for v in results))


class _Dims:
    """The dims of a model by the names that its inputs give to sizes."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}  # as the model writes it -> the dim's name
        self.renamed: dict[Size, Size] = {}  # what the interface of a language model calls sizes

    def declare(self, type_: TypeProto) -> None:
        """Take the names of sizes that stand alone on an axis."""
        for axis in type_.tensor_type.shape.dim:
            if re.fullmatch(r"[A-Za-z_][\w.]*", axis.dim_param, re.ASCII):
                self.names.setdefault(axis.dim_param, identifier(axis.dim_param))

    def type_of(self, type_: TypeProto, name: str) -> TensorType:
        """Return the type of an input; an axis of unknown size is a dim of its own."""
        tensor = type_.tensor_type
        if type_.WhichOneof("value") != "tensor_type" or not tensor.HasField("shape"):
            raise MoecError(f"the input {name} is no tensor, or its axes are not known")
        sizes = [self._size(axis.dim_param, axis.dim_value, f"{name}_{i}") for i, axis in enumerate(tensor.shape.dim)]
        return TensorType.of(computed_dtype(tensor.elem_type, f"the input {name}"), *sizes)

    def known_type(self, type_: TypeProto, name: str) -> TensorType | None:
        """Return the type that the model gives to a value; None where a size is not one of the inputs'."""
        tensor = type_.tensor_type
        if not tensor.HasField("shape") or not tensor.elem_type:
            return None
        sizes = [int(a.dim_value) if a.HasField("dim_value") else self._parsed(a.dim_param) for a in tensor.shape.dim]
        known = [s for s in sizes if s is not None]
        found = [size(s).subs(self.renamed, simultaneous=True) for s in known]
        return TensorType.of(computed_dtype(tensor.elem_type, name), *found) if len(known) == len(sizes) else None

    def _size(self, param: str, value: int, otherwise: str) -> int | Size:
        if not param and value > 0:
            return value
        found = self._parsed(param) if param else None
        if found is None:
            self.names.setdefault(param or otherwise, identifier(param or otherwise))
            found = dim(self.names[param or otherwise])
        return found

    def _parsed(self, param: str) -> Size | None:
        if param in self.names:
            return dim(self.names[param])
        try:
            return parse_size(param[:200], set(self.names.values()))
        except MoecError:
            return None

    def ranges(self, main: Function, longest: int) -> tuple[Dim, ...]:
        """Return the dims that the function's inputs have."""
        used = dict.fromkeys(
            name for p in main.params for size in p.type.shape for name in sorted(s.name for s in size.free_symbols)
        )
        pasts = {size for p in main.params if p.type.state for size in p.type.shape[1:]}  # nothing is past at first
        limits = dict.fromkeys((NEW, PAST), longest)
        return tuple(Dim(name, 0 if dim(name) in pasts else 1, limits.get(name, LONGEST)) for name in used)


def source_of(model: ModelProto) -> OnnxSource:
    """Return the initializers of a model in memory."""
    return OnnxSource(None, model.SerializeToString(deterministic=True) if model.ByteSize() < (1 << 31) else b"")
