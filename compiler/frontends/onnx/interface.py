"""The inputs and outputs of an ONNX model that are the caches of a language model, and the sizes that they share.

Exporters name the sizes of a cache, of the mask and of what is new apart. A mask has a place for each past and each new token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from onnx import AttributeProto, GraphProto, NodeProto

from ...errors import MoecError
from ...ir.dims import Size, dim, size
from ...ir.module import Function
from ...ir.types import TensorType
from .graph import OWN, OnnxGraph

IDS, EMBEDDED, MASK = "input_ids", "inputs_embeds", "attention_mask"
BATCH, NEW, PAST = "B", "S", "P"  # what a step's sizes are called in programs, see the session of a target
# moec's own attention by what its caches are stored as (see targets/cpu/kernels/caches.py); those of int8 have scales beside them
STORED = {"GroupQueryAttentionF16": "f16", "GroupQueryAttentionBF16": "bf16", "GroupQueryAttentionInt8": "int8"}
_SCALED = 2  # after so many caches of one of these come as many scales
_JOINING = ("Concat", "GroupQueryAttention", "Attention", *STORED)  # what appends to caches
_LONG_WALK = 64


@dataclass(frozen=True)
class Cache:
    """A cache: the output that it comes back as, the axis that grows, and the node that appends to it.

    One that holds the `scales` of another is no state of the program, where caches are numbers.
    """

    present: str
    axis: int
    node: NodeProto
    scales: bool = False


def find_states(graph: GraphProto, types: Mapping[str, TensorType]) -> dict[str, Cache]:
    """Return the caches among the inputs: what a node joins with what is new and gives back."""
    given = {info.name for info in graph.output}
    found: dict[str, Cache] = {}
    for node in graph.node:
        pasts = [name for name in node.input if name in types and len(types[name].shape) >= 2]
        presents = [name for name in node.output if name in given]
        if node.op_type not in _JOINING or not pasts or len(pasts) != len(presents):
            continue
        axis = _attribute(node, "axis", 0) if node.op_type == "Concat" else 2
        for i, (past, present) in enumerate(zip(pasts, presents, strict=True)):
            if node.op_type != "Concat" or list(node.input[:1]) == pasts:
                scales = node.op_type in STORED and i >= _SCALED
                found[past] = Cache(present, axis % len(types[past].shape), node, scales)
    return found if len({cache.present for cache in found.values()}) == len(found) else {}


def stored_type(states: Mapping[str, Cache]) -> str | None:
    """Return what all caches of a model of moec's own are stored as, as `--kv` names it; None for those of other models."""
    nodes = [cache.node for cache in states.values()]
    found = {STORED.get(node.op_type, "f32") if node.domain == OWN else None for node in nodes}
    return found.pop() if len(found) == 1 else None


def _attribute(node: NodeProto, name: str, default: int) -> int:
    found = (int(a.i) for a in node.attribute if a.name == name and a.type == AttributeProto.INT)
    return next(found, default)


def shared_sizes(
    graph: GraphProto, types: Mapping[str, TensorType], states: Mapping[str, Cache]
) -> tuple[dict[str, TensorType], dict[Size, Size]]:
    """Return the types of a language model's inputs over B, S and P, and what sizes became; another model's as they are.

    All caches have the same past, the mask one place for each past and each new token, and the last axis of a cache is
    the width of a head.
    """
    tokens = types.get(IDS) or types.get(EMBEDDED)
    if not states or tokens is None or len(tokens.shape) < 2:
        return dict(types), {}
    batch, new = tokens.shape[:2]
    renamed: dict[Size, Size] = {s: dim(name) for s, name in ((batch, BATCH), (new, NEW)) if s.is_Symbol}
    pasts = [types[name].shape[cache.axis] for name, cache in states.items()]
    renamed |= {past: dim(PAST) for past in pasts if past.is_Symbol}
    mask = types.get(MASK)
    if mask is not None and len(mask.shape) > 1 and mask.shape[-1].is_Symbol and mask.shape[-1] not in renamed:
        renamed[mask.shape[-1]] = dim(PAST) + renamed.get(new, new)
    if mask is not None and mask.shape[0].is_Symbol:
        renamed.setdefault(mask.shape[0], renamed.get(batch, batch))
    found = {}
    for name, type_ in types.items():
        shape = [s.subs(renamed, simultaneous=True) for s in type_.shape]
        if (cache := states.get(name)) is not None and shape[-1].is_Symbol and cache.axis != len(shape) - 1:
            shape[-1] = size(_head_width(graph, cache.node))
        found[name] = replace(type_, shape=tuple(shape))
    return found, renamed


def _head_width(graph: GraphProto, node: NodeProto) -> int:
    """Return the width of an attention operator's heads, read off the linear that makes its queries."""
    heads, groups = _attribute(node, "num_heads", 0), _attribute(node, "kv_num_heads", 0)
    packed = len(node.input) < 2 or not node.input[1]
    count = heads + 2 * groups if packed else heads
    width = _linear_width(graph, node.input[0])
    if not count or not width or width % count:
        raise MoecError(f"the width of the caches of {node.op_type} is not known", todo="export them with their sizes")
    return width // count


def _linear_width(graph: GraphProto, name: str) -> int:
    made = {output: node for node in graph.node for output in node.output}
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    for _ in range(_LONG_WALK):
        node = made.get(name)
        if node is None or not node.input:
            return 0
        if node.op_type == "MatMulNBits":
            return _attribute(node, "N", 0)
        if node.op_type in ("MatMul", "Gemm") and len(node.input) > 1 and node.input[1] in weights:
            axis = 1 - _attribute(node, "transB", 0) if node.op_type == "Gemm" else 1
            dims = weights[node.input[1]]
            return int(dims[axis]) if len(dims) == 2 else 0
        name = node.input[0]
    return 0


def order_states(main: Function, g: OnnxGraph, states: Mapping[str, Cache], names: Mapping[str, str]) -> Function:
    """Return the function with its states last, in the order in which they come back; MoecError for one that does not."""
    pasts = {names[cache.present]: g.value(g.items[before]) for before, cache in states.items() if not cache.scales}
    presents = [value for value in main.results if value.type.state]
    if {v.name for v in presents} != set(pasts):
        lacking = next(iter(pasts.keys() ^ {v.name for v in presents}))
        raise MoecError(f"the cache {lacking} does not come back as it was given, with what is new")
    params = [p for p in main.params if not p.type.state] + [pasts[v.name] for v in presents]
    results = [v for v in main.results if not v.type.state] + presents
    return replace(main, params=tuple(params), results=tuple(results))
