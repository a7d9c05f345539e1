"""From stage moe to stage kernel: what an accelerator has as one kernel becomes that op, the rest stays as it is.

Matrices become bf16 where that loses nothing, which the pass round-weights sees to; quantized ones stay as they are.
Norms, biases, sinks, angles and small tables stay f32: they are few, and what is computed with them is computed in f32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ....compiler.formats.table import find_format
from ....compiler.ir.module import Function, Module, Op, Value
from ....compiler.ir.notes import Note, Rewritten
from ....compiler.rewrite.editor import Editor, Rewrite, rewrite_ops
from ....compiler.rewrite.roles import Uses, weight_roles
from ....compiler.weights.demote import demoted_recipe
from .. import ops
from . import attention_ops, latent_ops
from .chosen import ChosenSlots
from .dispatch import grouped_linear, lower_combine, lower_dispatch
from .hoist import hoist_ops
from .latent import latent_attention
from .recurrent import cut_window, linear_attention, window_conv

assert ops and attention_ops and latent_ops  # what is lowered to is declared there

_STORED, _TABLE = ".bf16", ".table"  # suffixes of the names of weights that are stored so


def lower_module(module: Module) -> Rewritten:
    """Return the module at stage kernel, with a note for each matrix that stays f32.

    Activations are bf16 between kernels and f32 in them.
    """
    if module.stage == "kernel":
        return Rewritten(module)
    roles = weight_roles(module)
    slots = ChosenSlots(module)
    lowered = [_lower_function(f, roles[f.name], slots) for f in module.functions]
    functions = tuple(function for function, _ in lowered)
    notes = tuple(note for _, notes in lowered for note in notes)
    return Rewritten(hoist_ops(replace(module, stage="kernel", functions=functions)), notes)


def _lower_function(function: Function, roles: Uses, slots: ChosenSlots) -> tuple[Function, list[Note]]:
    routers = frozenset(function.ops[i].results[0].name for (i, _), role in roles.items() if role == "router")
    rewrites: dict[str, Rewrite] = {
        "core.linear": partial(_lower_linear, routers=routers),
        "nn.gated_mlp": _gated_mlp,
        "nn.block_linear": partial(_block_linear, slots=slots),
        "nn.embedding": _lower_embedding,
        "moe.experts": _lower_experts,
        "moe.dispatch": lower_dispatch,
        "moe.grouped_linear": partial(grouped_linear, stored=_stored, sort=_sorted),
        "moe.combine": lower_combine,
        "core.add": _lower_sum,
        "nn.cached_attention": _lower_attention,
        "nn.conv_window": window_conv,
        "core.slice": cut_window,
        "nn.linear_attention": linear_attention,
    }
    lowered, notes = rewrite_ops(function, rewrites, "lower")
    return _with_old_names(lowered), notes


# --- weights ---------------------------------------------------------------------------------------------------


def _stored(editor: Editor, op: Op, weight: Value) -> Value:
    """Return a weight as it is stored: quantized as it is, bf16 where that has all of its numbers, else f32."""
    recipe = editor.recipe(weight)
    if find_format(weight.type.dtype):
        return weight
    narrow, exact = demoted_recipe(recipe)
    if not exact:
        editor.note(
            op, f"{weight} stays {weight.type.dtype}: bf16 has not all of its numbers; round-weights rounds them"
        )
        return weight
    return editor.weight(narrow, f"{weight.name}{_STORED}")


def _with_old_names(function: Function) -> Function:
    """Give a weight the name of the one that it replaces, if that one is gone."""
    taken, names = {*function.names}, {}
    for const in function.consts:
        old, dot, suffix = const.value.name.rpartition(".")
        if dot + suffix in (_STORED, _TABLE) and old not in taken:
            names[const.value.name] = old
            taken.add(old)
    return function.renamed(names)


# --- linears ---------------------------------------------------------------------------------------------------


def _lower_linear(editor: Editor, op: Op, routers: frozenset[str]) -> Op:
    x, weight, bias = op["x"], op["w"], op.get("b")
    if op.results[0].name in routers:
        # a rounded score may choose another expert: the weights keep all their numbers, the scores stay f32
        narrow, exact = demoted_recipe(editor.recipe(weight))
        kept = editor.weight(narrow, f"{weight.name}.bf16") if exact else weight
        return op.become("acc.linear", x, kept, bias, out="f32")
    return op.become("acc.linear", x, _stored(editor, op, weight), bias)


def _block_linear(editor: Editor, op: Op, slots: ChosenSlots) -> Op:
    if attention := latent_attention(editor, op, _stored, slots):
        return attention
    x, weight = op["x"], op["w"]
    return op.become("acc.block_linear", x, _stored(editor, op, weight))


def _lower_embedding(editor: Editor, op: Op) -> Op:
    """Return a lookup in bf16 rows, which are widened behind it: the framework has it, and a token reads one row."""
    ids, table = op["ids"], op["table"]
    recipe = editor.recipe(table)
    narrow, exact = (recipe, False) if find_format(table.type.dtype) else demoted_recipe(recipe)
    if not exact:
        editor.note(op, f"the table {table} stays {table.type.dtype}")
        return op
    # a weight of its own: the head may have the same numbers, but it may pack them otherwise
    stored = editor.const(f"{table.name}{_TABLE}", narrow)
    (y,) = op.results
    rows = editor.add("nn.embedding", ids, stored, hint=f"{y.name}.bf16")
    return op.become("core.cast", rows, to=y.type.dtype)


def _gated_mlp(editor: Editor, op: Op) -> Op:
    """Return nn.gated_mlp as the linear of both halves with the activation, the linear back, and the token's gate."""
    x, up_bias, down_bias, gate = op["x"], op.get("up_bias"), op.get("down_bias"), op.get("gate")
    (y,) = op.results
    up, down = _stored(editor, op, op["up"]), _stored(editor, op, op["down"])
    h = editor.add("acc.gated_up", x, up, up_bias, hint=f"{y.name}.h", **op.attributes)
    if gate is None:
        return op.become("acc.linear", h, down, down_bias)
    out = editor.add("acc.linear", h, down, down_bias, hint=f"{y.name}.down")
    score = editor.add("acc.linear", x, gate, None, hint=f"{y.name}.score")
    share = editor.add("core.sigmoid", score, hint=f"{y.name}.gate")
    return op.become("core.mul", share, out)


# --- routed experts --------------------------------------------------------------------------------------------


def _lower_experts(editor: Editor, op: Op) -> Op:
    """Return routed experts as the sort of the pairs by expert and the two grouped linears."""
    ids = op["ids"]
    (y,) = op.results
    up, down = _stored(editor, op, op["up"]), _stored(editor, op, op["down"])
    hints = (f"{ids.name}.order", f"{ids.name}.tiles")
    order, tiles = _sorted(editor, ids, int(up.type.shape[0]), hints)
    pairs = (ids, order, tiles)
    h = editor.add("acc.grouped_up", op["x"], *pairs, up, op.get("up_bias"), hint=f"{y.name}.h", **op.attributes)
    return op.become("acc.grouped_down", h, *pairs, op["gates"], down, op.get("down_bias"), None, None)


def _lower_sum(editor: Editor, op: Op) -> Op:
    """Return a sum of what routed experts give and something else as their sum, where nothing else reads the former."""
    if len({v.type for v in op.inputs}) > 1:
        return op  # one is added to many
    made = {v.name: other for other in editor.ops for v in other.results}
    for own, other in (op.operands, op.operands[::-1]):
        experts = _routed_experts(editor, own, made)
        free = [name for name in ("shared", "residual") if experts and experts.get(name) is None]
        if own and other and experts and free:
            rows = experts.results[0].type.shape
            flat = (
                other
                if other.type.shape == rows
                else editor.add("core.reshape", other, shape=rows, hint=f"{other.name}.rows")
            )
            summed = experts.reading(**{free[0]: flat})
            if own.type.shape == rows:
                return replace(summed, results=op.results, loc=(*experts.loc, *op.loc))
            hint = f"{op.results[0].name}.rows"
            value = editor.add(summed.name, *summed.operands, hint=hint, **summed.attributes)
            return op.become("core.reshape", value, shape=own.type.shape)
    return op


def _routed_experts(editor: Editor, value: Value | None, made: Mapping[str, Op]) -> Op | None:
    """Return the routed experts whose sums a value is, if it is read once; None for another value."""
    if value is None or len(editor.function.uses.get(value.name, [])) != 1:
        return None
    op = made.get(value.name)
    if op is not None and op.name == "core.reshape":
        source = op.inputs[0]
        op = made.get(source.name) if len(editor.function.uses.get(source.name, [op])) == 1 else None
    return op if op is not None and op.name == "acc.grouped_down" else None


def _sorted(editor: Editor, ids: Value, experts: int, hints: tuple[str, str]) -> tuple[Value, ...]:
    """Return order and tiles of the pairs, sorted once for all experts of the same ids."""
    for op in editor.ops:
        if op.name == "acc.sort" and op.operands == (ids,) and op.attributes["experts"] == experts:
            return op.results
    return editor.add_all("acc.sort", ids, hints=hints, experts=experts)


# --- attention -------------------------------------------------------------------------------------------------


def _lower_attention(editor: Editor, op: Op) -> Op:
    """Return nn.cached_attention as what is done with new heads, and the attention over the cache."""
    *given, mask, sinks = op.operands
    attributes = op.settings
    y, key, value = op.results
    first: dict[str, Any] = {name: op.attributes[name] for name in ("heads", "eps") if name in op.attributes}
    q, *_ = editor.add_all("acc.rope_append", *given, hints=(f"{y.name}.q", key, value), **first)
    kept = {name: attributes[name] for name in ("scale", "window", "softcap") if name in op.attributes}
    heads = editor.add("nn.attention", q, key, value, mask, sinks, hint=f"{y.name}.heads", **kept)
    # the rewritten op's other results are made in front of it
    return replace(op.become("core.reshape", heads, shape=y.type.shape), results=(y,))
