"""The attention operators of ONNX Runtime and of ONNX, each declared once: rotary embedding, caches, masks."""

from __future__ import annotations

from typing import Any

import sympy

from ...errors import MoecError
from ...ir.dims import size
from ...ir.module import Value
from ..aten.lower import reshape
from .graph import OWN, OnnxGraph, operator
from .interface import STORED
from .masks import causal_mask, mask_of_bias, mask_of_lengths
from .node import Item, Node
from .origins import count_of

_NO_SHARE = -1e29  # a sink that is less takes no share beside any score


@operator("com.microsoft.GroupQueryAttention", *(f"{OWN}.{name}" for name in STORED))
def _group_query_attention(g: OnnxGraph, node: Node) -> Any:
    if any(node.has(place) for place in (12, 13, 14, 15)) or node.integer("smooth_softmax", 0) > 0:
        raise MoecError("GroupQueryAttention with quantized caches, norms of its own or a smooth softmax")
    heads, groups = node.integer("num_heads"), node.integer("kv_num_heads")
    past_key, past_value = (g.value(node.inputs[place]) for place in (3, 4))
    q, k, v = _split_heads(g, node, heads, groups, int(past_key.type.shape[3]))
    batch, total = q.type.shape[0], past_key.type.shape[2] + q.type.shape[2]
    mask = mask_of_bias(g, g.value(node.inputs[10])) if node.has(10) else mask_of_lengths(g, g.value(node.inputs[5]))
    if mask.type.shape != (batch, total):
        raise MoecError(f"GroupQueryAttention of {total} slots with a mask {mask.type}")
    if node.integer("do_rotary", 0):
        angles = _angles(g, node, mask, q.type.shape[2])
        q, k = (_turned(g, x, *angles) for x in (q, k))
    present = [append_state(g, past, new, 2) for past, new in ((past_key, k), (past_value, v))]
    sinks = _sinks(g, node)
    scale = node.number("scale", 0.0) or int(past_key.type.shape[3]) ** -0.5
    window, softcap = max(node.integer("local_window_size", -1), 0), node.number("softcap", 0.0)
    y = g.builder.add("nn.attention", q, *present, mask, sinks, scale=scale, window=window, softcap=softcap)
    scales = [None] * (len(node.proto.output) - 3)  # where caches are in int8
    return (reshape(g, y, (*y.type.shape[:2], y.type.shape[2] * y.type.shape[3])), *present, *scales)


def _sinks(g: OnnxGraph, node: Node) -> Value | None:
    """Return the sinks of attention; None for those that take no share, which keep ONNX Runtime from NaN in padded rows."""
    if not node.has(11):
        return None
    sinks = g.value(node.inputs[11])
    name = next((name for name, weight in g.weights.items() if weight is sinks), None)
    return None if name is not None and bool((g.source.read(name) < _NO_SHARE).all()) else sinks


def append_state(g: OnnxGraph, past: Value, new: Value, axis: int) -> Value:
    """Return a cache with what is new; MoecError for a past that is no state of the model."""
    if not past.type.state:
        raise MoecError("a cache that the model does not give back")
    return g.builder.add("nn.cache_append", past, new, axis=axis)


def _split_heads(g: OnnxGraph, node: Node, heads: int, groups: int, width: int) -> list[Value]:
    """Return q, k and v as [B, H, S, D]; q alone may hold all three."""
    parts: list[Item | None] = list(node.inputs[:3])
    if parts[1] is None:
        parts = list(g.call("aten.split", g.value(parts[0]), [heads * width, groups * width, groups * width], 2))
    found = []
    for part, count in zip(parts, (heads, groups, groups), strict=True):
        x = g.value(part)
        opened = reshape(g, x, (*x.type.shape[:2], count, width))
        found.append(g.builder.add("core.transpose", opened, perm=(0, 2, 1, 3)))
    return found


def _angles(g: OnnxGraph, node: Node, mask: Value, new: sympy.Expr) -> tuple[Value, Value]:
    """Return cosines and sines [B, S, R] of the tokens' positions, those of both halves of a head."""
    if node.integer("rotary_interleaved", 0):
        raise MoecError("rotary embedding of pairs that lie together")
    if node.has(9):
        places = g.cast(g.value(node.inputs[9]), "i64")
    else:  # the number of a token among those of its sequence
        counted = g.builder.add("core.cumsum", g.cast(mask, "i64"), axis=1)
        own = g.call("aten.slice", counted, 1, mask.type.shape[1] - new, None)
        places = g.builder.add("core.maximum", g.call("aten.sub", own, 1), g.scalar(0, "i64"))
    return _looked_up(g, g.value(node.inputs[7]), places), _looked_up(g, g.value(node.inputs[8]), places)


def _looked_up(g: OnnxGraph, table: Value, places: Value) -> Value:
    if (table, places) not in g.angles:
        if table.type.shape[0].is_Integer:
            g.longest = min(g.longest, int(table.type.shape[0]))
        half = _rows_in_order(g, table, places) or g.builder.add("core.take", table, places, axis=0)
        g.angles[table, places] = g.builder.add("core.concat", half, half, axis=2)
    return g.angles[table, places]


def _rows_in_order(g: OnnxGraph, table: Value, places: Value) -> Value | None:
    """Return the angles of each token whose rows a table has one after the other, where places count them; else None."""
    if count_of(g, places) != (0, places.type.elements):
        return None
    made = g.producer(table)
    while made is not None and made.name in ("core.concat", "core.reshape") and made.attributes.get("axis", 0) == 0:
        found = made.inputs[0]
        if found.type.shape[:-1] == places.type.shape:
            return found
        made = g.producer(found)
    return None


def _turned(g: OnnxGraph, x: Value, cos: Value, sin: Value) -> Value:
    """Return heads with their first R numbers turned by angles [B, S, R]."""
    width = cos.type.shape[2]
    if width == x.type.shape[3]:
        return g.builder.add("nn.rope", x, cos, sin)
    first = g.builder.add("core.slice", x, axis=3, start=size(0), stop=width)
    rest = g.builder.add("core.slice", x, axis=3, start=width, stop=x.type.shape[3])
    return g.builder.add("core.concat", g.builder.add("nn.rope", first, cos, sin), rest, axis=3)


@operator("RotaryEmbedding")
def _rotary_embedding(g: OnnxGraph, node: Node) -> Any:
    if node.integer("interleaved", 0):
        raise MoecError("rotary embedding of pairs that lie together")
    x = g.value(node.inputs[0])
    cos, sin = (_doubled(g, node, place) for place in (1, 2))
    if len(x.type.shape) == 4:
        return _turned(g, x, cos, sin)
    batch, new, width = x.type.shape
    heads = node.integer("num_heads")
    opened = reshape(g, x, (batch, new, heads, width / heads))
    turned = _turned(g, g.builder.add("core.transpose", opened, perm=(0, 2, 1, 3)), cos, sin)
    return reshape(g, g.builder.add("core.transpose", turned, perm=(0, 2, 1, 3)), x.type.shape)


def _doubled(g: OnnxGraph, node: Node, place: int) -> Value:
    """Return angles [B, S, R] of a table [B, S, R/2], or of rows that positions look up."""
    table = g.value(node.inputs[place])
    if node.has(3):
        return _looked_up(g, table, g.cast(g.value(node.inputs[3]), "i64"))
    if (table, table) not in g.angles:
        g.angles[table, table] = g.builder.add("core.concat", table, table, axis=2)
    return g.angles[table, table]


@operator("Attention")
def _attention(g: OnnxGraph, node: Node) -> Any:
    if node.integer("qk_matmul_output_mode", 0) or any(node.has(place) for place in (6,)) or len(node.proto.output) > 3:
        raise MoecError("Attention that gives its scores, or has lengths of its own")
    parts = [g.value(item) for item in node.inputs[:3]]
    flat = len(parts[0].type.shape) == 3
    if flat:
        counts = [node.integer("q_num_heads"), *[node.integer("kv_num_heads")] * 2]
        parts = [_opened(g, x, count) for x, count in zip(parts, counts, strict=True)]
    q, k, v = parts
    presents: list[Value] = []
    k, v = (_before_repeating(g, x) for x in (k, v))
    if node.has(4) and node.has(5):
        presents = [append_state(g, g.value(node.inputs[4 + i]), x, 2) for i, x in enumerate((k, v))]
        k, v = presents
    mask = causal_mask(g, node, q, k)
    scale = node.number("scale", 0.0) or int(q.type.shape[3]) ** -0.5
    y = g.builder.add("nn.attention", q, k, v, mask, None, scale=scale, softcap=node.number("softcap", 0.0))
    if flat:
        return (reshape(g, y, (*y.type.shape[:2], y.type.shape[2] * y.type.shape[3])), *presents)
    return (g.builder.add("core.transpose", y, perm=(0, 2, 1, 3)), *presents)


def _before_repeating(g: OnnxGraph, x: Value) -> Value:
    """Return the heads of a cache [B, G, T, D] that are repeated for each query head of their group; others as they are."""
    made = g.producer(x)
    spread = g.producer(made.inputs[0]) if made is not None and made.name == "core.reshape" else None
    if spread is None or spread.name != "core.expand" or len(spread.results[0].type.shape) != 5:
        return x
    opened = g.producer(spread.inputs[0])
    batch, groups, _, slots, width = spread.results[0].type.shape
    if (
        opened is None
        or opened.name != "core.reshape"
        or spread.inputs[0].type.shape != (batch, groups, 1, slots, width)
    ):
        return x
    found = opened.inputs[0]
    return found if found.type.shape == (batch, groups, slots, width) else x


def _opened(g: OnnxGraph, x: Value, heads: int) -> Value:
    """Return heads [B, H, S, D] of rows [B, S, H*D]."""
    batch, new, width = x.type.shape
    return g.builder.add("core.transpose", reshape(g, x, (batch, new, heads, width / heads)), perm=(0, 2, 1, 3))
