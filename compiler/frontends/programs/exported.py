"""From an exported torch program to a module of one function: its inputs, its weights by name, its results.

Nothing is known of the model: there are no layers that repeat, and no states. The ops are those that the code calls;
the passes after this find the experts, the attention and the norms among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from ...errors import MoecError
from ...ir.dce import eliminate_dead_code
from ...ir.dims import Size, dim
from ...ir.dtypes import dtype_name, find_dtype
from ...ir.module import Dim, Function, Module, Value
from ...ir.recipes import Recipe, Tensor
from ...ir.types import TensorType
from ...ops.builder import IRBuilder
from ..aten import einsum, moec_ops, operators  # noqa: F401  (these fill the table of handlers)
from ..aten.export import Traced
from ..aten.lower import TracedGraph, lower_graph
from ..transformers.model_errors import CODE_ERRORS

LONGEST = 1 << 20  # the range of a size that the program does not bound
RESULT = "output"


def import_program(program: ExportedProgram, source: str) -> tuple[Module, dict[str, torch.Tensor]]:
    """Return the module (stage graph) of an exported program and the tensors that its weights are read from, by name.

    The weights keep their names in the model; results are called `output`, or `output_0` and so on where there are
    several. MoecError for a program that writes into its buffers, and for what is not understood.
    """
    signature = program.graph_signature
    if written := sorted({*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()}):
        todo = "take it as an input and return it: the runtime keeps no state between two calls"
        raise MoecError(f"the program writes into {written[0]}", where=source, todo=todo)
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in set(signature.user_inputs)]
    symbols = _name_sizes(inputs)
    builder = IRBuilder("main")
    traced = Traced(program, symbols)
    values: dict[str, Any] = {node.name: builder.param(node.name, _input_type(node, traced)) for node in inputs}
    tensors = _named_tensors(program)
    values |= _add_weights(builder, program, tensors)
    try:
        results = lower_graph(TracedGraph(builder, traced=traced), values)
    except MoecError as error:
        raise replace(error, where=error.where or source) from None
    except CODE_ERRORS as error:  # an operator's arguments are not what torch gives it
        what = "the program cannot be read: an operator's arguments are not what torch gives it"
        raise MoecError(what, where=source, model=".".join(builder.loc), todo="export it again") from error
    main = eliminate_dead_code(_name_results(builder.build(results)))
    dims = tuple(_dim_of(program, symbol, named.name) for symbol, named in symbols.items())
    read = {const.recipe.name for const in main.consts if isinstance(const.recipe, Tensor)}
    return Module("graph", dims, (main,), source), {name: tensors[name] for name in sorted(read)}


def _name_sizes(inputs: Iterable[Any]) -> dict[sympy.Symbol, sympy.Symbol]:
    """Return a dim for each symbol of the inputs' shapes, named after the input and the axis where it is seen first."""
    found: dict[sympy.Symbol, sympy.Symbol] = {}
    for node in inputs:
        shape = getattr(node.meta["val"], "shape", ())
        for axis, size in enumerate(shape):
            if isinstance(size, int):
                continue
            for symbol in sorted(size.node.expr.free_symbols, key=str):
                found.setdefault(symbol, dim(f"{node.name}_{axis}"))
    return found


def _dim_of(program: ExportedProgram, symbol: sympy.Symbol, name: str) -> Dim:
    """Return a dim with the range that torch found; it takes sizes to be 2 or larger where nothing says more."""
    bounds = program.range_constraints.get(symbol)
    low = int(bounds.lower) if bounds is not None else 0
    high = int(bounds.upper) if bounds is not None and bounds.upper < LONGEST else LONGEST
    return Dim(name, 1 if low <= 2 else low, high)


def _input_type(node: Any, traced: Traced) -> TensorType:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        what = f"the input {node.name} is {'None' if value is None else type(value).__name__}, not a tensor"
        raise MoecError(what, todo="leave it out of the inputs, or write it into the module")
    dtype = find_dtype(value.dtype)
    if dtype is None:
        raise MoecError(f"the input {node.name} is {value.dtype}, which is not understood")
    shape: tuple[Size, ...] = traced.shape(value)
    return TensorType(dtype, shape)


def _named_tensors(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Return parameters, buffers and constants by name; a tensor that has several names is under each of them."""
    constants = {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    return {name: tensor.detach() for name, tensor in {**program.state_dict, **constants}.items()}


def _add_weights(builder: IRBuilder, program: ExportedProgram, tensors: Mapping[str, torch.Tensor]) -> dict[str, Value]:
    """Add a const for each weight that the program reads; return them by the names of their placeholders."""
    signature = program.graph_signature
    used = {n.name for n in program.graph.nodes if n.op == "placeholder" and n.users}
    named = {
        **signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants,
    }  # fmt: skip
    return {
        node: builder.const(name.replace(".", "_"), _recipe_of(name, tensors))
        for node, name in named.items()
        if node in used
    }


def _recipe_of(name: str, tensors: Mapping[str, torch.Tensor]) -> Recipe:
    tensor = tensors.get(name)
    if tensor is None:
        raise MoecError(f"the program has no tensor {name}", todo="export it again, with its weights")
    if find_dtype(tensor.dtype) is None:
        raise MoecError(f"the weight {name} is {tensor.dtype}, which is not understood", model=name)
    return Tensor(name, TensorType.of(dtype_name(tensor.dtype), *tensor.shape))


def _name_results(main: Function) -> Function:
    """Return the function with results under public names; one that is returned twice, or as it came in, is copied."""
    names = [RESULT] if len(main.results) == 1 else [f"{RESULT}_{i}" for i in range(len(main.results))]
    own = [v.name for v in main.results]
    if len(set(own)) < len(own) or not set(own) <= set(main.producers):
        raise MoecError("a result of the program is one of its inputs, a weight, or another result", where="@main")
    renamed = main.renamed(dict(zip(own, names, strict=True)))
    results = tuple(Value(n, v.type) for n, v in zip(names, main.results, strict=True))
    return replace(renamed, results=results)
