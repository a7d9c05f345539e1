"""The handlers of the single ops that stand for what moec traces as one: attention, experts, caches. `aten.py` calls them."""

from __future__ import annotations

from typing import Any

from ...ir.dims import FUNCTIONS, size
from ...ir.fragments import parse_activation
from ...ir.module import Value
from .lower import Graph, TracedGraph, aten, reshape


@aten("moec.cache_append")
def _cache_append(g: Graph, past: Value, new: Value) -> Value:
    return g.builder.add("nn.cache_append", past, new, axis=2, hint=past.name.replace("past", "present"))


@aten("moec.conv_window")
def _conv_window(g: Graph, past: Value, new: Value) -> tuple[Value, ...]:
    return g.builder.add_all("nn.conv_window", past, new)


@aten("moec.new_state")
def _new_state(g: Graph, x: Value) -> Value:
    return x if x.type.state else g.builder.add("nn.new_state", x)


@aten("moec.causal_conv")
def _causal_conv(g: Graph, x: Value, w: Value, b: Any) -> Value:
    return g.builder.add("nn.causal_conv", x, w, b)


@aten("moec.linear_attention")
def _linear_attention(
    g: Graph, q: Value, k: Value, v: Value, decay: Any, beta: Any, past: Value, scale: float
) -> tuple[Value, ...]:
    options: dict[str, Any] = {} if scale == 1 else {"scale": float(scale)}
    return g.builder.add_all("nn.linear_attention", q, k, v, decay, beta, past, **options)


@aten("moec.expert_linear")
def _expert_linear(g: Graph, rows: Value, ids: Value, w: Value) -> Value:
    count = rows.type.shape[0]
    one = g.builder.add("core.reshape", ids, shape=(count, 1))
    sorted_, offsets, perm = g.builder.add_all("moe.dispatch", rows, one, experts=w.type.shape[0])
    ones = g.builder.add("core.full", shape=(count, 1), value=1.0, dtype=rows.type.dtype)
    return g.builder.add("moe.combine", g.builder.add("moe.grouped_linear", sorted_, w, offsets, None), ones, perm)


@aten("moec.dispatch")
def _dispatch(g: Graph, x: Value, ids: Value, experts: int) -> tuple[Value, ...]:
    return g.builder.add_all("moe.dispatch", x, ids, experts=experts)


@aten("moec.grouped_linear")
def _grouped_linear(g: Graph, rows: Value, w: Value, offsets: Value) -> Value:
    return g.builder.add("moe.grouped_linear", rows, w, offsets, None)


@aten("moec.combine")
def _combine(g: Graph, rows: Value, gates: Value, perm: Value) -> Value:
    return g.builder.add("moe.combine", rows, gates, perm)


@aten("moec.blocks")
def _blocks(g: Graph, x: Value, at: int, width: int, fill: float) -> Value:
    """Add what fills up any last block, and cut at a whole number of blocks."""
    shape = x.type.shape
    count = FUNCTIONS["floordiv"](shape[at] + width - 1, size(width))
    edge = g.builder.add("core.full", shape=(*shape[:at], width - 1, *shape[at + 1 :]), value=fill, dtype=x.type.dtype)
    filled = g.builder.add("core.concat", x, edge, axis=at)
    cut = g.builder.add("core.slice", filled, axis=at, start=0, stop=count * width)
    return reshape(g, cut, (*shape[:at], count, width, *shape[at + 1 :]))


@aten("moec.spread")
def _spread(g: Graph, x: Value, width: int, like: Value) -> Value:
    *outer, count = x.type.shape
    opened = reshape(g, x, (*outer, count, 1))
    repeated = g.builder.add("core.expand", opened, shape=(*outer, count, width))
    flat = reshape(g, repeated, (*outer, count * width))
    return g.builder.add("core.slice", flat, axis=len(outer), start=0, stop=like.type.shape[-1])


@aten("moec.attention")
def _attention(
    g: Graph, q: Value, k: Value, v: Value, mask: Any, sinks: Any, scale: float, window: int, chunk: int, softcap: float
) -> Value:
    options: dict[str, Any] = {
        "scale": float(scale),
        **({"window": window} if window else {}),
        **({"chunk": chunk} if chunk else {}),
        **({"softcap": softcap} if softcap else {}),
    }
    return g.builder.add("nn.attention", q, k, v, mask, sinks, **options)


@aten("moec.experts")
def _experts(
    g: Graph, x: Value, ids: Value, gates: Value, up: Value, down: Value, up_bias: Any, down_bias: Any,
    act: str, transposed: bool,
) -> Value:  # fmt: skip
    if transposed:
        up, down = (g.builder.add("core.transpose", w, perm=(0, 2, 1)) for w in (up, down))
    return g.builder.add("moe.experts", x, ids, gates, up, down, up_bias, down_bias, act=parse_activation(act))


@aten("moec.layer")
def _layer(g: TracedGraph, tensors: list[Value], place: int) -> tuple[Value, ...]:
    assert g.calls is not None
    return g.calls(g, tensors, place)
