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
    attended = _made(editor, op["x"], "nn.attention")
    if attended is None or not attended["v"].type.state or attended["v"].type.shape[1] != 1:
        return None
    q, k, latent = attended["q"], attended["k"], attended["v"]
    q_rope = rope = None
    if k != latent:
        keys, queries = (_made(editor, value, "core.concat", axis=3) for value in (k, q))
        if keys is None or queries is None or len(keys.inputs) != 2 or len(queries.inputs) != 2:
            return None
        (first, rope), (q, q_rope) = keys.inputs, queries.inputs
        if first != latent or not rope.type.state or q.type.shape[3] != latent.type.shape[3]:
            return None
    turned = _made(editor, q, "core.transpose", perm=_HEADS_FIRST)
    heads = turned and _made(editor, turned["x"], "core.reshape")
    absorbed = heads and _made(editor, heads["x"], "nn.block_linear")
    if absorbed is None or absorbed["w"].name not in {c.value.name for c in editor.function.consts}:
        return None
    attributes: dict[str, Any] = {name: attended.attributes[name] for name in _SCORED if name in attended.attributes}
    return op.become(
        "acc.latent_attention", _joined(editor, absorbed["x"]), q_rope, latent, rope, stored(editor, op, absorbed["w"]),
        stored(editor, op, op["w"]), attended.get("mask"), attended.get("sinks"),
        heads=int(attended["q"].type.shape[1]), **attributes,
    )  # fmt: skip


def _joined(editor: Editor, nope: Value) -> Value:
    """Return [B, S, N], whose heads begin with those numbers of [B, S, H, E] that meet the latent."""
    batch, new, heads, width = nope.type.shape
    turned = _made(editor, nope, "core.transpose", perm=_HEADS_FIRST)
    part = turned and _made(editor, turned["x"], "core.slice", axis=3, start=0, step=1)
    whole = part and _made(editor, part["x"], "core.transpose", perm=_HEADS_FIRST)
    for source in (nope, whole["x"] if whole else None):
        split = source and _made(editor, source, "core.reshape")
        if split and source and source.type.shape[:3] == (batch, new, heads) and len(split["x"].type.shape) == 3:
            return split["x"]
    return editor.add("core.reshape", nope, shape=(batch, new, heads * width), hint=f"{nope.name}.joined")


def _made(editor: Editor, value: Value, name: str, **attributes: Any) -> Op | None:
    """Return the op of a name and with these attributes that makes a value; None if another one does."""
    op = editor.function.producers.get(value.name)
    if op is None or op.name != name:
        return None
    return op if all(op.settings[key] == wanted for key, wanted in attributes.items()) else None
