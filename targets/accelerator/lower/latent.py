"""Reads latent attention off what absorb-mla made of it, as one op, so that its form can be chosen when kernels are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....compiler.ir.module import Op, Value
from ....compiler.rewrite.editor import Editor

_HEADS_FIRST = (0, 2, 1, 3)  # [B, S, H, D] -> [B, H, S, D], and back
_SCORED = ("scale", "window", "chunk", "softcap")


def latent_attention(editor: Editor, op: Op, stored: Callable[[Editor, Op, Value], Value]) -> Op | None:
    """Return acc.latent_attention in the place of the values' linear after attention to latents; None if `op` is another.

    `stored` gives a weight as kernels have it.
    """
    attended = _producer_named(editor, op["x"], "nn.attention")
    if attended is None or not attended["v"].type.state or attended["v"].type.shape[1] != 1:
        return None
    q, k, latent = attended["q"], attended["k"], attended["v"]
    q_rope = rope = None
    if k != latent:
        keys, queries = (_producer_named(editor, value, "core.concat", axis=3) for value in (k, q))
        if keys is None or queries is None or len(keys.inputs) != 2 or len(queries.inputs) != 2:
            return None
        (first, rope), (q, q_rope) = keys.inputs, queries.inputs
        if first != latent or not rope.type.state or q.type.shape[3] != latent.type.shape[3]:
            return None
    turned = _producer_named(editor, q, "core.transpose", perm=_HEADS_FIRST)
    heads = turned and _producer_named(editor, turned["x"], "core.reshape")
    absorbed = heads and _producer_named(editor, heads["x"], "nn.block_linear")
    if absorbed is None or absorbed["w"].name not in {c.value.name for c in editor.function.consts}:
        return None
    joined, heads_of_q = _joined_heads(editor, absorbed["x"]), int(attended["q"].type.shape[1])
    if q_rope and rope:
        q_rope = _appended(editor, joined, heads_of_q, q_rope, latent, rope) or q_rope
    attributes: dict[str, Any] = {name: attended.attributes[name] for name in _SCORED if name in attended.attributes}
    return op.become(
        "acc.latent_attention", joined, q_rope, latent, rope, stored(editor, op, absorbed["w"]),
        stored(editor, op, op["w"]), attended.get("mask"), attended.get("sinks"),
        heads=heads_of_q, **attributes,
    )  # fmt: skip


def _joined_heads(editor: Editor, nope: Value) -> Value:
    """Return [B, S, N], whose heads begin with those numbers of [B, S, H, E] that meet the latent."""
    batch, new, heads, width = nope.type.shape
    turned = _producer_named(editor, nope, "core.transpose", perm=_HEADS_FIRST)
    part = turned and _producer_named(editor, turned["x"], "core.slice", axis=3, start=0, step=1)
    whole = part and _producer_named(editor, part["x"], "core.transpose", perm=_HEADS_FIRST)
    for source in (nope, whole["x"] if whole else None):
        split = source and _producer_named(editor, source, "core.reshape")
        if split and source and source.type.shape[:3] == (batch, new, heads) and len(split["x"].type.shape) == 3:
            return split["x"]
    return editor.add("core.reshape", nope, shape=(batch, new, heads * width), hint=f"{nope.name}.joined")


# --- what is done with new tokens ------------------------------------------------------------------------------


def _appended(editor: Editor, q: Value, heads: int, q_rope: Value, latent: Value, rope: Value) -> Value | None:
    """Replace the appends to both caches, and what is done before them, by acc.latent_append; return its rotated queries.

    None where something else is done, or something else reads a cache: then each op stays.
    """
    first, second = (_producer_named(editor, state, "nn.cache_append", axis=2) for state in (latent, rope))
    turned = second and _rotated(editor, q_rope), second and _rotated(editor, second["new"])
    norm = first and _producer_named(editor, _flat(editor, first["new"]), "nn.rms_norm")
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
    part = _producer_named(editor, turned[0][0], "core.slice", axis=3, start=row - wide, step=1)
    whole = part and _producer_named(editor, part["x"], "core.transpose", perm=_HEADS_FIRST)
    split = whole and _producer_named(editor, whole["x"], "core.reshape")
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
    op = _producer_named(editor, value, "nn.rope")
    if op is None:
        return None
    halves = _producer_named(editor, op["x"], "core.concat", axis=3)
    slices = (
        [_producer_named(editor, half, "core.slice", axis=3, start=i, step=2) for i, half in enumerate(halves.inputs)]
        if halves
        else []
    )
    if len(slices) == 2 and slices[0] and slices[1] and slices[0]["x"] == slices[1]["x"]:
        return slices[0]["x"], op["cos"], op["sin"], True
    return op["x"], op["cos"], op["sin"], False


def _flat(editor: Editor, value: Value) -> Value:
    """Return a value before it was reshaped with its last axis kept."""
    op = _producer_named(editor, value, "core.reshape")
    return op["x"] if op and op["x"].type.shape[-1] == value.type.shape[-1] else value


def _last_axis(editor: Editor, value: Value, start: Any) -> Value | None:
    """Return what a value is a part of, from `start` on in its last axis, before it was reshaped; None for another value."""
    op = _producer_named(editor, value, "core.slice", axis=len(value.type.shape) - 1, start=start, step=1)
    return _flat(editor, op["x"]) if op else None


def _producer_named(editor: Editor, value: Value, name: str, **attributes: Any) -> Op | None:
    """Return the op of a name and with these attributes that makes a value; None if another one does."""
    op = editor.function.producers.get(value.name)
    if op is None or op.name != name:
        return None
    return op if all(op.settings[key] == wanted for key, wanted in attributes.items()) else None
