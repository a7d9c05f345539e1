"""Reads the masks and biases of attention in a graph back to a padding mask, and makes sure that it is causal."""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import MoecError
from ...ir.module import Op, Value
from .graph import OnnxGraph
from .node import Node
from .origins import VIEWS, count_of, number_of, origin_of

_LOWEST = -1e4  # what is added to a score that is not to be seen is less
_MORE = "Attention with a mask that says more than padding and order"


def mask_of_bias(g: OnnxGraph, bias: Value) -> Value:
    """Return the mask [B, T] of slots that a bias of scores, 0 or very low, leaves visible; MoecError for another bias."""
    _, made = origin_of(g, bias, ("core.expand", "core.reshape"))
    if made is not None and made.name == "core.where" and len(made.inputs[0].type.shape) == 2:
        seen, other = (number_of(g, value) for value in made.inputs[1:])
        if seen == 0 and other is not None and other < _LOWEST:
            return made.inputs[0]
    raise MoecError("attention with a bias that is no padding mask")


def mask_of_lengths(g: OnnxGraph, lengths: Value) -> Value:
    """Return the mask [B, T] whose sums, less 1, are the lengths of the sequences."""
    _, made = origin_of(g, lengths, ("core.cast", "core.reshape", "core.sub", "core.add"))
    if made is not None and made.name == "core.sum":
        mask, _ = origin_of(g, made.inputs[0], ("core.cast",))
        if len(mask.type.shape) == 2:
            return mask
    raise MoecError("attention with lengths of sequences that are no sums of a padding mask")


def causal_mask(g: OnnxGraph, node: Node, q: Value, k: Value) -> Value | None:
    """Return the padding mask of attention that is causal, by itself or by its mask; MoecError for attention that is not."""
    causal = bool(node.integer("is_causal", 0))
    if not node.has(3):
        if causal and q.type.shape[2] == k.type.shape[2]:
            return None
        raise MoecError("Attention to tokens behind, or that counts from the first slot")
    seen = g.value(node.inputs[3])
    if seen.type.dtype != "bool":
        seen = _visible(g, seen)
    padding: list[Value] = []
    for part in _parts_of(g, seen):
        value, made = origin_of(g, part, (*VIEWS, "core.cast"))
        if made is not None and made.name in ("core.ge", "core.le"):
            _check_order(g, made, q, k)
            causal = True
        elif number_of(g, part) != 1:
            padding.append(value)
    shape = q.type.shape[0], k.type.shape[2]
    if not causal or len(padding) > 1 or any(mask.type.shape != shape for mask in padding):
        raise MoecError(_MORE)
    return padding[0] if padding else None


def _visible(g: OnnxGraph, bias: Value) -> Value:
    """Return the mask of a bias that is 0 where it is set and very low elsewhere."""
    _, made = origin_of(g, bias, VIEWS)
    if made is not None and made.name == "core.where":
        seen, other = (number_of(g, value) for value in made.inputs[1:])
        if seen == 0 and other is not None and other < _LOWEST:
            return made.inputs[0]
    raise MoecError("Attention with a bias that is no mask")


def _parts_of(g: OnnxGraph, seen: Value) -> Iterator[Value]:
    """Yield the masks that all have to be set."""
    _, made = origin_of(g, seen, VIEWS)
    if made is None or made.name != "core.logical_and":
        yield seen
        return
    for part in made.inputs:
        yield from _parts_of(g, part)


def _check_order(g: OnnxGraph, compared: Op, q: Value, k: Value) -> None:
    """Raise MoecError unless a comparison says that a slot is not behind its token: token >= slot, or slot <= token.

    Both are counted alike: by numbers of which the tokens' are the last, or by a running sum over the mask.
    """
    token, slot = compared.inputs if compared.name == "core.ge" else compared.inputs[::-1]
    own, all_ = count_of(g, token), count_of(g, slot)
    new, total = q.type.shape[2], k.type.shape[2]
    if own is not None and all_ is not None and (own, all_) == ((total - new, new), (0, total)):
        return
    _, cut = origin_of(g, token, VIEWS)
    whole, _ = origin_of(g, slot, VIEWS)
    if cut is None or cut.name != "core.slice" or cut.inputs[0] != whole:
        raise MoecError(_MORE)
    axis = cut.attributes.integer("axis")
    bounds = cut.attributes.size("start"), cut.attributes.size("stop")
    if whole.type.shape[axis] != total or bounds != (total - new, total):
        raise MoecError(_MORE)
