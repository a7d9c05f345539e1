"""Attention for ONNX Runtime: GroupQueryAttention, preceded by ops for what it cannot do itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ....compiler.errors import Refuse
from ....compiler.ir.dims import size
from ....compiler.ir.module import Op, Value
from ....compiler.rewrite.editor import Editor
from ..capabilities import ODD_HEADS, Record, attention_variants, packed_variant, rotary_variants

BEFORE_HEADS = (0, 2, 1, 3)  # [B, H, S, D] <-> [B, S, H, D]

Three = tuple[Value, Value | None, Value | None]  # q, k and v; q alone holds all three


def group_query_attention(editor: Editor, op: Op, record: Record) -> Op:
    """Return nn.cached_attention as ONNX Runtime's op; Refuse says what that cannot do.

    Norms of heads go in front, and so does a rotary embedding that the op does not do right itself.
    """
    _check_attention(op, record)
    eps = op.settings.number("eps")
    cos, sin, q_norm, k_norm, mask = (op.get(name) for name in ("cos", "sin", "q_norm", "k_norm", "mask"))
    width = op.results[1].type.shape[3]
    outside = cos is not None and bool(record.refusal(rotary_variants(width, cos.type.shape[2])))
    q, k, v = _move_ops_after_transpose(editor, op)
    unpacked = outside or q_norm or k_norm or record.refusal([packed_variant(turned=cos is not None)])
    if k is None and unpacked:
        q, k, v = _split_qkv(editor, op)
    if k is not None:
        q, k = (_normalize_heads(editor, x, w, width, eps) for x, w in ((q, q_norm), (k, k_norm)))
    if outside:
        q, k = (_rotate_heads(editor, x, cos, sin, width) for x in (q, k) if x)
        cos = sin = None
    bias = mask and editor.add("ort.attention_bias", mask, hint="attention_bias", tokens=op.results[0].type.shape[1])
    kept = {name: value for name, value in op.attributes.items() if name != "eps"}
    operands = (q, k, v, op["past_key"], op["past_value"], cos, sin, bias, op.get("sinks"))
    return op.become("ort.group_query_attention", *operands, **kept)


def _check_attention(op: Op, record: Record) -> None:
    """Refuse what ONNX Runtime's op does not take."""
    key = op.results[1].type
    width = key.shape[3]
    if not width.is_Integer:
        raise Refuse(f"heads have {width} numbers, GroupQueryAttention wants to know how many")
    window, softcap = op.attributes.integer("window", 0), op.attributes.number("softcap", 0.0)
    masked, sinks = op.get("mask") is not None, op.get("sinks") is not None
    if reason := record.refusal(attention_variants(width, window, softcap, masked=masked, sinks=sinks)):
        raise Refuse(f"heads have {width} numbers, and {reason}" if ODD_HEADS in reason else reason)
    if key.dtype != "f32":
        raise Refuse(f"it is {key.dtype}, the target's attention is f32")
    if op.attributes["scale"] == 0:
        raise Refuse("a scale of 0 means the default to GroupQueryAttention")


def _split_qkv(editor: Editor, op: Op) -> tuple[Value, Value, Value]:
    """Return q, k and v of the one value that holds them."""
    _, groups, _, width = op.results[1].type.shape
    sizes = tuple(int(n) for n in (size(op.attributes["heads"]) * width, groups * width, groups * width))
    q, k, v = editor.add_all("ort.split", op["q"], hints=("q", "k", "v"), axis=2, sizes=sizes)
    return q, k, v


def _split_heads(editor: Editor, x: Value, width: Any) -> Value:
    batch, new, total = x.type.shape
    return editor.add("core.reshape", x, hint=f"{x.name}.heads", shape=(batch, new, total / width, width))


def _merge_heads(editor: Editor, x: Value) -> Value:
    batch, new, count, width = x.type.shape
    return editor.add("core.reshape", x, hint=f"{x.name}.flat", shape=(batch, new, count * width))


def _normalize_heads(editor: Editor, x: Value, weight: Value | None, width: Any, eps: float) -> Value:
    if weight is None:
        return x
    heads = _split_heads(editor, x, width)
    return _merge_heads(editor, editor.add("nn.rms_norm", heads, weight, hint=f"{x.name}.normed", eps=eps))


def _rotate_heads(editor: Editor, x: Value, cos: Value | None, sin: Value | None, width: Any) -> Value:
    heads = _split_heads(editor, x, width)
    return _merge_heads(editor, editor.add("ort.rotary_embedding", heads, cos, sin, hint=f"{x.name}.turned"))


# --- ops on single heads before the attention ------------------------------------------------------


def _move_ops_after_transpose(editor: Editor, op: Op) -> Three:
    """Return q, k and v; ops on single heads before the transpose are moved after it, and it is dropped."""

    def moved(value: Value) -> Value:
        heads = _before_transpose(editor, value)
        made = None if heads is None else _move_after_transpose(editor, heads)
        return value if made is None else _merge_heads(editor, made)

    q, k, v = op["q"], op.get("k"), op.get("v")
    return moved(q), k and moved(k), v and moved(v)


def _before_transpose(editor: Editor, value: Value) -> Value | None:
    """Return the heads [B, H, S, D] that a value [B, S, H*D] is the transpose of."""
    for name in ("core.reshape", "core.transpose"):
        op = editor.function.producers.get(value.name)
        if op is None or op.name != name or op.attributes.get("perm", BEFORE_HEADS) != BEFORE_HEADS:
            return None
        value = op.inputs[0]
    return value


def _move_after_transpose(editor: Editor, value: Value) -> Value | None:
    """Return the value made with the axes in the other order, or None where there is no transpose to save."""
    op = editor.function.producers.get(value.name)
    if op is None:
        return None
    hint = f"{value.name}.rows"
    inner = op.operands if op.name == "core.concat" else op.operands[:1]
    match op.name:
        case "core.transpose" if op.attributes["perm"] == BEFORE_HEADS:
            return op.operands[0]
        case "nn.rope" | "nn.rms_norm":
            pass
        case "core.concat" | "core.slice" if op.attributes["axis"] == 3:
            pass
        case _:
            return None
    moved = [_move_after_transpose(editor, x) for x in inner if x is not None]
    if any(x is None for x in moved):
        return None
    name = "ort.rotary_embedding" if op.name == "nn.rope" else op.name
    rest = op.operands[len(inner) :]
    with editor.at(op.loc):
        return editor.add(name, *moved, *rest, hint=hint, **op.attributes)


# --- what is left ------------------------------------------------------------------------------------------------


def plain_attention(editor: Editor, op: Op) -> Op:
    """Return nn.cached_attention as the ops that it fuses."""
    q, k, v, cos = op["q"], op.get("k"), op.get("v"), op.get("cos")
    attributes = op.settings
    y, key, value = op.results
    width = key.type.shape[3]
    if k is None or v is None:
        q, k, v = _split_qkv(editor, op)
    rows = [
        _normalize_heads(editor, x, w, width, attributes.number("eps"))
        for x, w in ((q, op.get("q_norm")), (k, op.get("k_norm")), (v, None))
    ]
    heads = [_split_heads(editor, x, width) for x in rows]
    if cos is not None:
        heads[:2] = (editor.add("ort.rotary_embedding", x, cos, op["sin"], hint=f"{x.name}.turned") for x in heads[:2])
    q, k, v = (editor.add("core.transpose", x, hint=f"{x.name}.bhsd", perm=BEFORE_HEADS) for x in heads)
    for past, new, present in ((op["past_key"], k, key), (op["past_value"], v, value)):
        editor.add("nn.cache_append", past, new, hint=present, axis=2)
    kept = {name: attributes[name] for name in ("scale", "window", "softcap")}
    attended = editor.add(
        "nn.attention", q, key, value, op.get("mask"), op.get("sinks"), hint=f"{y.name}.heads", **kept
    )
    return replace(op.become("core.reshape", attended, shape=y.type.shape), results=(y,))
