"""The attention operators of ONNX Runtime and of ONNX, each declared once: rotary embedding, caches, masks."""

from __future__ import annotations

from typing import Any

import sympy

from ...errors import MoecError
from ...ir.dims import size
from ...ir.module import Op, Value
from ..aten.lower import reshape
from .graph import OnnxGraph, operator
from .node import Item, Node

_LOWEST = -1e4  # what is added to a score that is not to be seen is less


def _number(g: OnnxGraph, value: Value) -> float | None:
    made = g.producer(value)
    if made is None or made.name not in ("core.constant", "core.full"):
        return None
    found = made.attributes["value"]
    return float(found) if isinstance(found, (int, float)) else None


def _origin(g: OnnxGraph, value: Value, through: tuple[str, ...]) -> tuple[Value, Op | None]:
    """Return the value, and the op that makes it, before ops of these names."""
    made = g.producer(value)
    while made is not None and made.name in through:
        value = made.inputs[0]
        made = g.producer(value)
    return value, made


def mask_of_bias(g: OnnxGraph, bias: Value) -> Value:
    """Return the mask [B, T] of slots that a bias of scores, 0 or very low, leaves visible; MoecError for another bias."""
    _, made = _origin(g, bias, ("core.expand", "core.reshape"))
    if made is not None and made.name == "core.where" and len(made.inputs[0].type.shape) == 2:
        seen, other = (_number(g, value) for value in made.inputs[1:])
        if seen == 0 and other is not None and other < _LOWEST:
            return made.inputs[0]
    raise MoecError("attention with a bias that is no padding mask")


def _mask_of_lengths(g: OnnxGraph, lengths: Value) -> Value:
    """Return the mask [B, T] whose sums, less 1, are the lengths of the sequences."""
    _, made = _origin(g, lengths, ("core.cast", "core.reshape", "core.sub", "core.add"))
    if made is not None and made.name == "core.sum":
        mask, _ = _origin(g, made.inputs[0], ("core.cast",))
        if len(mask.type.shape) == 2:
            return mask
    raise MoecError("attention with lengths of sequences that are no sums of a padding mask")


@operator("com.microsoft.GroupQueryAttention")
def _group_query_attention(g: OnnxGraph, node: Node) -> Any:
    if any(node.has(place) for place in (12, 13, 14, 15)) or node.integer("smooth_softmax", 0) > 0:
        raise MoecError("GroupQueryAttention with quantized caches, norms of its own or a smooth softmax")
    heads, groups = node.integer("num_heads"), node.integer("kv_num_heads")
    past_key, past_value = (g.value(node.inputs[place]) for place in (3, 4))
    q, k, v = _split_heads(g, node, heads, groups, int(past_key.type.shape[3]))
    batch, total = q.type.shape[0], past_key.type.shape[2] + q.type.shape[2]
    mask = mask_of_bias(g, g.value(node.inputs[10])) if node.has(10) else _mask_of_lengths(g, g.value(node.inputs[5]))
    if mask.type.shape != (batch, total):
        raise MoecError(f"GroupQueryAttention of {total} slots with a mask {mask.type}")
    if node.integer("do_rotary", 0):
        angles = _angles(g, node, mask, q.type.shape[2])
        q, k = (_turned(g, x, *angles) for x in (q, k))
    present = [append_state(g, past, new, 2) for past, new in ((past_key, k), (past_value, v))]
    sinks = g.value(node.inputs[11]) if node.has(11) else None
    scale = node.number("scale", 0.0) or int(past_key.type.shape[3]) ** -0.5
    window, softcap = max(node.integer("local_window_size", -1), 0), node.number("softcap", 0.0)
    y = g.builder.add("nn.attention", q, *present, mask, sinks, scale=scale, window=window, softcap=softcap)
    return (reshape(g, y, (*y.type.shape[:2], y.type.shape[2] * y.type.shape[3])), *present)


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
        half = g.builder.add("core.take", table, places, axis=0)
        g.angles[table, places] = g.builder.add("core.concat", half, half, axis=2)
    return g.angles[table, places]


def _turned(g: OnnxGraph, x: Value, cos: Value, sin: Value) -> Value:
    """Return heads with their first R numbers turned by angles [B, S, R]."""
    width = cos.type.shape[2]
    if width == x.type.shape[3]:
        return g.builder.add("nn.rope", x, cos, sin)
    first = g.builder.add("core.slice", x, axis=3, start=size(0), stop=width)
    rest = g.builder.add("core.slice", x, axis=3, start=width, stop=x.type.shape[3])
    return g.builder.add("core.concat", g.builder.add("nn.rope", first, cos, sin), rest, axis=3)
