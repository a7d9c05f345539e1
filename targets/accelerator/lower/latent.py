"""Reads latent attention off what absorb-mla made of it, as one op, so that its form can be chosen when kernels are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....compiler.ir.module import Op, Value
from ....compiler.rewrite.editor import Editor
from .chosen import ChosenSlots, producer_named

_HEADS_FIRST = (0, 2, 1, 3)  # [B, S, H, D] -> [B, H, S, D], and back
_SCORED = ("scale", "window", "chunk", "softcap")


def latent_attention(
    editor: Editor, op: Op, stored: Callable[[Editor, Op, Value], Value], slots: ChosenSlots
) -> Op | None:
    """Return acc.latent_attention in the place of the values' linear after attention to latents; None if `op` is another.

    `stored` gives a weight as kernels have it.
    """
    attended = producer_named(editor.function, op["x"], "nn.attention")
    if attended is None or not attended["v"].type.state or attended["v"].type.shape[1] != 1:
        return None
    q, k, latent = attended["q"], attended["k"], attended["v"]
    q_rope = rope = None
    if k != latent:
        keys, queries = (producer_named(editor.function, value, "core.concat", axis=3) for value in (k, q))
        if keys is None or queries is None or len(keys.inputs) != 2 or len(queries.inputs) != 2:
            return None
        (first, rope), (q, q_rope) = keys.inputs, queries.inputs
        if first != latent or not rope.type.state or q.type.shape[3] != latent.type.shape[3]:
            return None
    turned = producer_named(editor.function, q, "core.transpose", perm=_HEADS_FIRST)
    heads = turned and producer_named(editor.function, turned["x"], "core.reshape")
    absorbed = heads and producer_named(editor.function, heads["x"], "nn.block_linear")
    if absorbed is None or absorbed["w"].name not in {c.value.name for c in editor.function.consts}:
        return None
    joined, heads_of_q = _joined_heads(editor, absorbed["x"]), int(attended["q"].type.shape[1])
    if q_rope and rope:
        q_rope = _appended(editor, joined, heads_of_q, q_rope, latent, rope) or q_rope
    attributes: dict[str, Any] = {name: attended.attributes[name] for name in _SCORED if name in attended.attributes}
    mask = attended.get("mask")
    chosen = slots.of_mask(editor.function, mask) if mask and not attributes.get("chunk") else None
    if chosen:
        attributes |= {"best_first": True} if chosen.best_first else {}
    return op.become(
        "acc.latent_attention", joined, q_rope, latent, rope, stored(editor, op, absorbed["w"]),
        stored(editor, op, op["w"]), chosen.mask if chosen else mask, attended.get("sinks"),
        chosen.slots if chosen else None, heads=heads_of_q, **attributes,
    )  # fmt: skip


def _joined_heads(editor: Editor, nope: Value) -> Value:
    """Return [B, S, N], whose heads begin with those numbers of [B, S, H, E] that meet the latent."""
    batch, new, heads, width = nope.type.shape
    turned = producer_named(editor.function, nope, "core.transpose", perm=_HEADS_FIRST)
    part = turned and producer_named(editor.function, turned["x"], "core.slice", axis=3, start=0, step=1)
    whole = part and producer_named(editor.function, part["x"], "core.transpose", perm=_HEADS_FIRST)
    for source in (nope, whole["x"] if whole else None):
        split = source and producer_named(editor.function, source, "core.reshape")
        if split and source and source.type.shape[:3] == (batch, new, heads) and len(split["x"].type.shape) == 3:
            return split["x"]
    return editor.add("core.reshape", nope, shape=(batch, new, heads * width), hint=f"{nope.name}.joined")


# --- what is done with new tokens ------------------------------------------------------------------------------


def _appended(editor: Editor, q: Value, heads: int, q_rope: Value, latent: Value, rope: Value) -> Value | None:
    """Replace the appends to both caches, and what is done before them, by acc.latent_append; return its rotated queries.

    None where something else is done, or something else reads a cache: then each op stays.
    """
    first, second = (producer_named(editor.function, state, "nn.cache_append", axis=2) for state in (latent, rope))
    turned = second and _rotated(editor, q_rope), second and _rotated(editor, second["new"])
    norm = first and producer_named(editor.function, _flat(editor, first["new"]), "nn.rms_norm")
    if not (first and second and norm and turned[0] and turned[1]) or turned[0][1:] != turned[1][1:]:
        return None
    uses = editor.function.uses
    if any(
        user is not None and user.name not in ("nn.attention", "core.concat")
        for v in (latent, rope)
        for user in uses[v.name]
    ):
        return None
    width, wide, row = latent.type.shape[3], rope.type.shape[3], q.type.shape[2] / heads
    part = producer_named(editor.function, turned[0][0], "core.slice", axis=3, start=row - wide, step=1)
    whole = part and producer_named(editor.function, part["x"], "core.transpose", perm=_HEADS_FIRST)
    split = whole and producer_named(editor.function, whole["x"], "core.reshape")
    parts = [_last_axis(editor, _flat(editor, x), start) for x, start in ((norm["x"], 0), (turned[1][0], width))]
    kv, other = parts
    if split is None or split["x"] != q or kv is None or kv != other or len(kv.type.shape) != 3:
        return None
    _, cos, sin, pairs = turned[0]
    made = editor.add_all(
        "acc.latent_append", q, kv, norm["w"], first["past"], second["past"], cos, sin,
        hints=(f"{q_rope.name}.new", latent, rope), heads=heads, eps=norm.settings.number("eps"), pairs=pairs,
    )  # fmt: skip
    return made[0]


def _rotated(editor: Editor, value: Value) -> tuple[Value, Value, Value, bool] | None:
    """Return what nn.rope rotates, its angles, and whether neighbours are rotated together; None for another value."""
    op = producer_named(editor.function, value, "nn.rope")
    if op is None:
        return None
    halves = producer_named(editor.function, op["x"], "core.concat", axis=3)
    slices = (
        [
            producer_named(editor.function, half, "core.slice", axis=3, start=i, step=2)
            for i, half in enumerate(halves.inputs)
        ]
        if halves
        else []
    )
    if len(slices) == 2 and slices[0] and slices[1] and slices[0]["x"] == slices[1]["x"]:
        return slices[0]["x"], op["cos"], op["sin"], True
    return op["x"], op["cos"], op["sin"], False


def _flat(editor: Editor, value: Value) -> Value:
    """Return a value before it was reshaped with its last axis kept."""
    op = producer_named(editor.function, value, "core.reshape")
    return op["x"] if op and op["x"].type.shape[-1] == value.type.shape[-1] else value


def _last_axis(editor: Editor, value: Value, start: Any) -> Value | None:
    """Return what a value is a part of, from `start` on in its last axis, before it was reshaped; None for another value."""
    op = producer_named(editor.function, value, "core.slice", axis=len(value.type.shape) - 1, start=start, step=1)
    return _flat(editor, op["x"]) if op else None
