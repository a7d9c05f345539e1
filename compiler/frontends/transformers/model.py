"""From a transformers causal LM on the meta device to a module: rehearse, trace each kind of layer, then the whole.

No model is known by name here. The inputs are `input_ids`, `attention_mask`, `position_ids` and one past key and
value a layer; the results are `logits` and the present keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import MoecError
from ...ir.dce import eliminate_dead_code
from ...ir.dtypes import dtype_name, find_dtype
from ...ir.module import Dim, Function, Module, Value
from ...ir.recipes import Literal, Recipe
from ...ir.types import TensorType
from ...ops.builder import IRBuilder
from ...weights.steps.table import step
from ..aten import moec_ops, operators  # noqa: F401  (these fill the table of handlers)
from ..aten.export import DIM_EXPRESSIONS, Traced, trace_module
from ..aten.lower import Graph, TracedGraph, lower_graph
from ..replaced.replace import replace_model_code
from ..replaced.stand_ins import StandIn
from ..skeleton import Skeleton
from .cache import PAST, SIZES, cache_argument, cache_class, past_like
from .capture import start_trace
from .kinds import group_kinds
from .layer_program import LayerProgram, argument_names, layer_inputs, state_names
from .layers import LayerCall, example_inputs, find_layers, record_layer_calls, stub_layers
from .names import apart_from_layer, check_numbers, names_before, relative_to_layer
from .tracing import Tracing, current_trace

Mapper = Callable[[list[str]], Mapping[str, Recipe]]  # parameter names of the model -> recipes

MAX_LITERAL = 65536  # elements of a computed buffer that are written into the program


@dataclass(frozen=True)
class Import:
    """What every step of one import needs."""

    skeleton: Skeleton
    layers_name: str
    layers: list[LayerCall]
    kinds: list[LayerCall]
    recipes: Mapping[str, Recipe]
    tracing: Tracing
    missing: Callable[[str], MoecError]


def _missing_tensor(name: str) -> MoecError:
    return MoecError(f"the checkpoint has no tensor for {name}", todo="do config.json and the weights belong together?")


def import_model(
    skeleton: Skeleton,
    mapper: Mapper,
    source: str,
    names: list[StandIn] | None = None,
    stored_as: Callable[[int], Hashable] | None = None,
    missing: Callable[[str], MoecError] = _missing_tensor,
) -> Module:
    """Return the module (stage graph) of a model; MoecError names what is not understood.

    `names` gets the functions of the model's code that were replaced, see replace.py. `stored_as` says of a layer how its
    weights are stored: layers that differ in it are kinds of their own. `missing` returns the error for a parameter
    without a recipe.
    """
    model = skeleton.model
    with start_trace() as session, replace_model_code(model) as found, torch.no_grad():
        if names is not None:
            names += found
        layers_name, modules = find_layers(model)
        layers = record_layer_calls(model, modules, session)
        kinds = group_kinds(layers_name, layers, skeleton.buffers, stored_as)
        recipes = _map_weights(model, mapper, layers_name, layers, kinds)
        job = Import(skeleton, layers_name, layers, kinds, recipes, session, missing)
        functions = [_layer_function(job, kind) for kind in kinds]
        main = _main_function(job, modules, functions)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 131072
    dims = (Dim("B", 1, 1024), Dim("S", 1, int(positions)), Dim("P", 0, int(positions)))
    return Module("graph", dims, (*functions, main), source)


def _map_weights(
    model: Any, mapper: Mapper, prefix: str, layers: list[LayerCall], kinds: list[LayerCall]
) -> Mapping[str, Recipe]:
    """Map the parameters outside the layers and of the first layer of each kind; the others differ in a number."""
    representatives = {f"{prefix}.{k.index}." for k in kinds}
    wanted = [
        name
        for name in model.state_dict()
        if not name.startswith(f"{prefix}.") or any(name.startswith(r) for r in representatives)
    ]
    return mapper(wanted)


# --- one layer -------------------------------------------------------------------------------------------------


def _layer_function(job: Import, kind: LayerCall) -> Function:
    """Trace one kind of layer and return its function: (tensor arguments, past states) -> (results, states)."""
    name = f"layer_{job.kinds.index(kind)}" if len(job.kinds) > 1 else "layer"
    job.tracing.window = kind.window
    inputs = layer_inputs(kind)
    place = f"{job.layers_name}.{kind.index}"
    traced = trace_module(LayerProgram(kind), inputs, place)
    builder = IRBuilder(name)
    values: dict[str, Any] = {}
    names = [*argument_names(kind), *state_names(kind)]
    for i, (node, label, tensor) in enumerate(
        zip(traced.program.graph_signature.user_inputs, names, inputs, strict=True)
    ):
        state = label.startswith("past_") or i in kind.earlier
        values[str(node)] = builder.param(label, _type_of(tensor, state))
    prefix = _add_weights(job, builder, traced, values, "layer.", f"{place}.", kind.index)
    try:
        results = lower_graph(TracedGraph(builder, traced=traced), values)
    except MoecError as error:
        raise replace(error, model=".".join(filter(None, (place, error.model)))) from None
    return eliminate_dead_code(builder.build(results, prefix), params=True)


def _type_of(tensor: Tensor, state: bool = False) -> TensorType:
    """Return the IR type of a rehearsal tensor: its primes become dims."""
    dtype = find_dtype(tensor.dtype)
    if dtype is None:
        raise MoecError(f"a layer is called with a tensor of {tensor.dtype}, which is not understood")
    shape = [DIM_EXPRESSIONS[SIZES[n]] if n in SIZES else n for n in tensor.shape]
    return TensorType.of(dtype, *shape, state=state)


def _add_weights(
    job: Import, builder: IRBuilder, traced: Traced, values: dict[str, Any], wrapper: str, place: str, layer: int | None
) -> str:
    """Add a const for every weight that the trace reads; return the common prefix of their names."""
    signature = traced.program.graph_signature
    used = {n.name for n in traced.program.graph.nodes if n.op == "placeholder" and n.users}
    prefix = ""
    for node, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        if node not in used:
            continue
        own = target.removeprefix(wrapper)
        recipe = _parameter_recipe(job, place + own)
        if layer is not None and not isinstance(recipe, Literal):
            located = relative_to_layer(recipe, layer)
            apart = apart_from_layer(recipe, layer) if located is None or prefix not in ("", located[0]) else None
            if apart is not None:
                located = prefix, apart
            elif located is None or prefix not in ("", located[0]):
                raise MoecError(f"the checkpoint names of {place}{own} do not hold the layer's number where others do")
            prefix, recipe = located
        values[node] = builder.const(_short_name(own), recipe)
    for node, target in signature.inputs_to_lifted_tensor_constants.items():
        if node in used:
            values[node] = builder.const(
                _short_name(target), _literal_of_buffer(target, traced.program.constants[target])
            )
    return prefix


def _parameter_recipe(job: Import, name: str) -> Recipe:
    """Return how a parameter or buffer is made, in the dtype that the traced program computes in."""
    if name in job.skeleton.buffers:
        return _literal_of_buffer(name, job.skeleton.buffers[name])
    stored = next((n for n in (name, *job.skeleton.tied.get(name, ())) if n in job.recipes), None)
    if stored is None:
        raise job.missing(name)
    recipe = job.recipes[stored]
    state = job.skeleton.model.state_dict(keep_vars=True)[name]
    wanted = dtype_name(state.dtype)
    check_numbers(recipe, state.dtype.is_floating_point)
    return recipe if recipe.type.dtype == wanted else step("cast", recipe, to=wanted)


def _literal_of_buffer(name: str, tensor: Tensor) -> Literal:
    """Return a tensor that the model computes, or writes down in its code, as numbers of the program."""
    if tensor.is_meta or tensor.numel() > MAX_LITERAL:
        raise MoecError(f"the buffer {name} has {tensor.numel()} elements, too many to write into the program")
    return Literal(TensorType.of(dtype_name(tensor.dtype), *tensor.shape), tuple(tensor.flatten().tolist()))


def _short_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return "_".join(p for p in parts[-2:] if not p.isdigit()).replace(".", "_")


# --- the whole program -----------------------------------------------------------------------------------------


class _MainProgram(torch.nn.Module):
    """The model around its stubbed layers, as a function of a list of tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tensors: list[Tensor]) -> Tensor:
        ids, mask, positions, past = tensors
        cache = cache_class()(length=past.shape[2])
        given = cache_argument(self.model, cache)
        current_trace().called = 0
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **given).logits


def _main_function(job: Import, modules: Any, functions: list[Function]) -> Function:
    inputs = example_inputs()
    past = torch.empty(next(iter(inputs.values())).shape[0], 1, PAST, 1, device="meta")  # carries the dim P
    with stub_layers(job.layers, modules):
        traced = trace_module(_MainProgram(job.skeleton.model), [*inputs.values(), past], "the model around its layers")
    builder = IRBuilder("main")
    values: dict[str, Any] = {}
    user_inputs = [str(n) for n in traced.program.graph_signature.user_inputs]
    for node, (name, tensor) in zip(user_inputs, inputs.items(), strict=False):
        values[node] = builder.param(name, _type_of(tensor))
    values[user_inputs[-1]] = None
    states = _state_params(job, builder)
    _add_weights(job, builder, traced, values, "model.", "", None)
    presents: dict[str, Value] = {}

    def call(graph: Graph, tensors: list[Value], place: int) -> tuple[Value, ...]:
        layer = job.layers[place]
        index = layer.index
        callee = functions[layer.kind]
        keys = [f"{number}.{label}" for number, label in layer.states]
        hints = [f"hidden.{index}", *(f"aux_{i}.{index}" for i in range(1, len(layer.results)))]
        hints += [f"present.{key}" for key in keys]
        operands = _call_operands(callee, layer, [*tensors, *(states[key] for key in keys)])
        numbers = {
            "layer": index,
            **({"before": index - 1} if any(names_before(c.recipe) for c in callee.consts) else {}),
        }
        results = graph.builder.call(callee, operands, hints, **numbers)
        presents.update({key: value for key, value in zip(keys, results[len(layer.results) :], strict=True)})
        return results[: len(layer.results)]

    (logits,) = lower_graph(TracedGraph(builder, traced=traced, calls=call), values)
    logits, builder.ops[-1] = _rename_result(builder, logits, "logits")
    ordered = [presents[key] for key in states]
    return eliminate_dead_code(builder.build([logits, *ordered]))


def _call_operands(callee: Function, layer: LayerCall, given: list[Value]) -> list[Value]:
    """Return the operands that the callee still has after unused parameters were pruned."""
    names = [*argument_names(layer), *state_names(layer)]
    by_name = dict(zip(names, given, strict=True))
    return [by_name[p.name] for p in callee.params]


def _state_params(job: Import, builder: IRBuilder) -> dict[str, Value]:
    """Add the past states: all keys, then all values, then others. Their names are ONNX Runtime GenAI's."""
    states = {key: s for layer in job.layers for key, s in layer.states.items()}
    order = [*dict.fromkeys(("key", "value", *(label for _, label in states)))]
    found: dict[str, Value] = {}
    for number, label in sorted(states, key=lambda key: (order.index(key[1]), key[0])):
        past = past_like(label, states[number, label])
        found[f"{number}.{label}"] = builder.param(f"past_key_values.{number}.{label}", _type_of(past, state=True))
    return found


def _rename_result(builder: IRBuilder, value: Value, name: str) -> tuple[Value, Any]:
    """Rename the program's result to its public name; it must be the last op's only result."""
    last = builder.ops[-1]
    if last.results != (value,):
        raise MoecError("the model does not end with its logits")
    renamed = Value(builder.names.fresh(name), value.type)
    return renamed, replace(last, results=(renamed,))
