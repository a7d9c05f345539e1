"""Fuses everything between the linears of q, k and v and the output's linear into one op, and the three linears into one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..compiler.errors import Refuse
from ..compiler.ir.module import Function, Module, Op, Value
from ..compiler.ir.notes import Note, Rewritten, refusal_note
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.editor import Editor, join_recipes_along, rewrite_ops

FUSED = "nn.cached_attention"
BEFORE_HEADS = (0, 2, 1, 3)  # [B, H, S, D] <-> [B, S, H, D]


@pass_(reads="moe")
def fuse_attention(module: Module, target: Any) -> Rewritten:
    """Fuse q/k norms, rotary embedding, cache append and attention, and give them q, k and v from one linear.

    What is done to heads in another order (a norm after the rotary embedding, another embedding) stays outside.
    """
    notes: list[Note] = []
    fused = {}
    for function in module.functions:
        attended, refused = rewrite_ops(function, {"nn.attention": _fuse_op}, "fuse-attention")
        fused[function.name], apart = _pack_linears(attended)
        notes += [*refused, *apart]
    return Rewritten(module.with_functions(fused), tuple(notes))


# --- norms, rotary embedding, cache and attention ----------------------------------------------------------------


@dataclass(frozen=True)
class _Heads:
    """The ops on heads before the attention: a norm, then the rotary embedding; `value` is their input."""

    value: Value
    norm: Value | None = None
    eps: float | None = None
    cos: Value | None = None
    sin: Value | None = None
    tokens_first: bool = False  # [B, S, H, D] instead of [B, H, S, D]


def _fuse_op(editor: Editor, op: Op) -> Op:
    """Return the fused op in the place of nn.attention, with notes on what stays outside of it."""
    q, key, value, mask = op["q"], op["k"], op["v"], op.get("mask")
    _check_caches(q, key, value)
    if op.attributes.get("chunk"):
        raise Refuse("nn.cached_attention has no chunks")
    if mask is not None and len(mask.type.shape) != 2:
        raise Refuse("the mask differs from token to token, as in sparse attention", mask)
    appends = [_cache_append_of(editor.function, state, op) for state in (key, value)]
    if key == value:
        raise Refuse("keys and values are one cache, nn.cached_attention keeps two", key)
    new_key, new_value = (append["new"] for append in appends)
    if q.type.shape[2] != new_key.type.shape[2]:
        raise Refuse("the number of queries is not the number of tokens appended to the cache")
    heads = _outside_in(editor.function, _Heads(q), _Heads(new_key))
    made = [_concatenated_heads(editor, h) for h in (*heads, _Heads(new_value))]
    for (_, outside), h in zip(made[:2], heads, strict=False):
        if outside is not None:
            reason = f"{outside.name} at {h.value} stays outside, it is no norm of heads or rotary embedding behind one"
            editor.notes.append(refusal_note("fuse-attention", editor.function, op, reason))
    pasts = [append["past"] for append in appends]
    norms, angles = (heads[0].norm, heads[1].norm), (heads[0].cos, heads[0].sin)
    attrs = {**op.attributes, "heads": int(q.type.shape[1])}
    eps = next((h.eps for h in heads if h.eps is not None), None)
    attrs |= {} if eps is None else {"eps": eps}
    y = op.results[0]
    operands = (*(rows for rows, _ in made), *pasts, *angles, *norms, mask, op.get("sinks"))
    flat, *_ = editor.add_all(FUSED, *operands, hints=(f"{y.name}.rows", key, value), **attrs)
    return op.become("core.reshape", flat, shape=y.type.shape)


def _cache_append_of(function: Function, state: Value, attention: Op) -> Op:
    """Return the op that appends to a cache which only this attention and the caller read."""
    append = function.producers.get(state.name)
    if append is None or append.name != "nn.cache_append" or append.attributes["axis"] != 2:
        raise Refuse(f"{state} is not a cache that the step's tokens are appended to", state)
    others = [user for user in function.uses[state.name] if user is not None and user is not attention]
    if others:
        raise Refuse(f"{state} is also read by {others[0].name}", state)
    return append


def _check_caches(q: Value, key: Value, value: Value) -> None:
    """Refuse what one op with two caches of equal width cannot say."""
    width = key.type.shape[3]
    if value.type.shape[3] != width:
        raise Refuse(f"keys have {width} numbers a head and values {value.type.shape[3]}, as in latent attention")
    if key.type.shape[1] != value.type.shape[1]:
        raise Refuse(f"there are {key.type.shape[1]} heads of keys and {value.type.shape[1]} of values")
    if not all(x.is_Integer for x in (q.type.shape[1], key.type.shape[1], width)):
        raise Refuse(f"the heads of {q.type} have no fixed number")


def _outside_in(function: Function, q: _Heads, k: _Heads) -> tuple[_Heads, _Heads]:
    """Take up what is done to both in the same way, from the attention outwards."""
    turned = (_before_rotation(function, q), _before_rotation(function, k))
    if (turned[0].cos, turned[0].sin) == (turned[1].cos, turned[1].sin):
        q, k = turned
    normed = (_read_head_norm(function, q), _read_head_norm(function, k))
    if len({h.eps for h in normed} - {None}) == 1:
        q, k = normed
    return q, k


def _before_rotation(function: Function, heads: _Heads) -> _Heads:
    """Read a rotary embedding of whole heads, or of the first numbers of each head."""
    op = function.producers.get(heads.value.name)
    if op is not None and op.name == "nn.rope":
        return replace(heads, value=op["x"], cos=op["cos"], sin=op["sin"])
    if op is not None and op.name == "core.concat" and op.attributes["axis"] == 3 and len(op.inputs) == 2:
        rope, rest = (function.producers.get(v.name) for v in op.inputs)
        whole = _slice_of(rest, int(op.inputs[0].type.shape[3]))
        if rope and rope.name == "nn.rope" and whole:
            part = function.producers.get(rope["x"].name)
            if _slice_of(part, 0) == whole and whole.type == heads.value.type:
                return replace(heads, value=whole, cos=rope["cos"], sin=rope["sin"])
    return heads


def _slice_of(op: Op | None, start: int) -> Value | None:
    """Return the value that a plain slice of heads from `start` on is taken of."""
    if op is None or op.name != "core.slice":
        return None
    attributes = op.settings
    fits = attributes["axis"] == 3 and attributes["start"] == start and attributes["step"] == 1
    return op["x"] if fits else None


def _read_head_norm(function: Function, heads: _Heads) -> _Heads:
    """Read an RMSNorm over each head, on either side of the transpose."""
    op = function.producers.get(heads.value.name)
    turned = False
    if op is not None and op.name == "core.transpose" and op.attributes["perm"] == BEFORE_HEADS:
        turned, op = True, function.producers.get(op.inputs[0].name)
    if op is None or op.name != "nn.rms_norm" or len(op.inputs[0].type.shape) != 4:
        return heads
    x, weight = op.inputs
    return replace(heads, value=x, norm=weight, eps=op.attributes.number("eps"), tokens_first=turned)


def _concatenated_heads(editor: Editor, heads: _Heads) -> tuple[Value, Op | None]:
    """Return the heads concatenated, [B, S, H*D], and the op on single heads that stays outside, if there is one."""
    producers = editor.function.producers
    value, op, outside = heads.value, producers.get(heads.value.name), None
    if not heads.tokens_first:
        if op is not None and op.name == "core.transpose" and op.attributes["perm"] == BEFORE_HEADS:
            value = op.inputs[0]
        else:
            outside = op
            value = editor.add("core.transpose", value, hint=f"{value.name}.turned", perm=BEFORE_HEADS)
    batch, new, count, width = value.type.shape
    flat = (batch, new, count * width)
    op = producers.get(value.name)
    if op is not None and op.name == "core.reshape" and op.inputs[0].type.shape == flat:
        return op.inputs[0], outside
    return editor.add("core.reshape", value, hint=f"{value.name}.rows", shape=flat), outside


# --- one linear for q, k and v -----------------------------------------------------------------------------------


def _pack_linears(function: Function) -> tuple[Function, list[Note]]:
    """Replace the linears of q, k and v by one, and their results by slices of its result."""
    notes = []
    packs: dict[int, _Pack] = {}
    for op in function.ops:
        if op.name == FUSED and op.get("k"):
            try:
                pack = _qkv_linears(function, op)
            except Refuse as reason:
                notes.append(refusal_note("fuse-attention", function, op, f"q, k and v stay apart: {reason.reason}"))
            else:
                packs |= dict.fromkeys((id(op), *map(id, pack.linears)), pack)
    editor = Editor(function)
    for op in function.ops:
        found = packs.get(id(op))
        editor.loc = op.loc
        editor.ops.append(_read_packed_linear(editor, op, found) if found else op)
    return editor.finish(), notes


@dataclass
class _Pack:
    """The linears of q, k and v, and the result of the one linear, once it is there."""

    linears: tuple[Op, ...]
    value: Value | None = None


def _qkv_linears(function: Function, attention: Op) -> _Pack:
    """Return the linears that q, k and v come from, in this order; Refuse where one cannot do the work of the three."""
    linears = []
    for value in (attention[name] for name in "qkv"):
        op = function.producers.get(value.name)
        while op is not None and op.name != "core.linear":
            op = function.producers.get(op.inputs[0].name) if op.inputs else None
        if op is None:
            raise Refuse(f"{value} does not come from a linear")
        linears.append(op)
    weights = {c.value.name for c in function.consts}
    apart = len({id(op) for op in linears})
    if apart < 3:
        raise Refuse("they come from one linear already" if apart == 1 else "two of them come from one linear")
    if len({op["x"] for op in linears}) > 1:
        raise Refuse(f"their linears read {', '.join(str(op['x']) for op in linears)}")
    for op in linears:
        strange = [v for v in op.inputs[1:] if v.name not in weights]
        if strange:
            raise Refuse(f"{strange[0]} is not a weight, it cannot be put beside others beforehand")
    biased = [op for op in linears if op.get("b")]
    if len(biased) not in (0, 3):
        raise Refuse(f"of their linears only {', '.join(str(op.results[0]) for op in biased)} has a bias")
    return _Pack(tuple(linears))


def _read_packed_linear(editor: Editor, op: Op, pack: _Pack) -> Op:
    """Return the slice that a linear's result is of the packed one, or the attention that takes the packed one whole."""
    results = tuple(linear.results[0] for linear in pack.linears)
    if pack.value is None:
        pack.value = _one_linear(editor, pack.linears)
    if op.name == FUSED:
        whole = all(
            _before_reshapes(editor.function, v) == result and v.type.shape[-1] == result.type.shape[-1]
            for v, result in zip((op[name] for name in "qkv"), results, strict=True)
        )
        return op.reading(q=_by_row(editor, pack.value, op), k=None, v=None) if whole else op
    start = sum(int(v.type.shape[-1]) for v in results[: results.index(op.results[0])])
    attrs = {"axis": len(pack.value.type.shape) - 1, "start": start, "stop": start + int(op.results[0].type.shape[-1])}
    return op.become("core.slice", pack.value, **attrs)


def _before_reshapes(function: Function, value: Value) -> Value:
    """Return what a value was before it was reshaped."""
    while (op := function.producers.get(value.name)) is not None and op.name == "core.reshape":
        value = op.inputs[0]
    return value


def _by_row(editor: Editor, value: Value, attention: Op) -> Value:
    """Return the result of a linear over flattened tokens as [B, S, N]; that of another as it is."""
    if len(value.type.shape) == 3:
        return value
    shape = (*attention.results[0].type.shape[:2], value.type.shape[-1])
    return editor.add("core.reshape", value, hint=f"{value.name}.rows", shape=shape)


def _one_linear(editor: Editor, linears: tuple[Op, ...]) -> Value:
    """Add the linear whose weight is those of q, k and v one below the other."""
    weights, biases = [op["w"] for op in linears], [op["b"] for op in linears if op.get("b")]
    weight = editor.weight(join_recipes_along(*map(editor.recipe, weights), axis=0), "qkv_proj")
    bias = editor.weight(join_recipes_along(*map(editor.recipe, biases), axis=0), "qkv_proj_bias") if biases else None
    with editor.at(tuple(dict.fromkeys(text for op in linears for text in op.loc))):
        return editor.add("core.linear", linears[0]["x"], weight, bias, hint="qkv")
