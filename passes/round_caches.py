"""Keeps what attention has cached in 8 bits: keys and values, or latents, under one scale for each token and head."""

from __future__ import annotations

from ..compiler.errors import MoecError
from ..compiler.ir.module import Function, Module, Op, Value
from ..compiler.ir.notes import Note, Rewritten, note_on
from ..compiler.ops.stored_states import stored_states
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.editor import Editor, rewrite_ops

# op of stage kernel that appends: the places of its results that are rounded, and the op that may read them, by which operands
APPENDS = {
    "acc.rope_append": ((1, 2), "nn.attention", ("k", "v")),
    "acc.latent_append": ((1,), "acc.latent_attention", ("latent",)),
}


@pass_(reads="kernel", rounds=True)
def round_caches(module: Module, target: object, *, to: str = "fp8") -> Rewritten:
    """Round caches of attention to 8 bits: E4M3 with one scale for each token and head; parts with positions stay.

    A cache that something else than its layer's attention reads stays as it is.
    """
    functions, notes = {}, list[Note]()
    for function in module.functions:
        rounded = frozenset(
            op.results[0].name
            for op in function.ops
            if op.name in APPENDS and _is_read_by_attention(module, function, op)
        )

        def append(editor: Editor, op: Op, rounded: frozenset[str] = rounded) -> Op:
            if op.results[0].name in rounded:
                return _stored_as(op, op.name, to)
            editor.notes.append(note_on(editor.function, op, "the cache stays bf16, not only its attention reads it"))
            return op

        def attend(editor: Editor, op: Op, rounded: frozenset[str] = rounded) -> Op:
            state = op["latent"] if op.name == "acc.latent_attention" else op["k"]
            made = editor.function.producers.get(state.name)
            if made is None or not made.results or made.results[0].name not in rounded:
                return op
            return _stored_as(op, "acc.attention" if op.name == "nn.attention" else op.name, to)

        rewrites = {**dict.fromkeys(APPENDS, append), **dict.fromkeys(("nn.attention", "acc.latent_attention"), attend)}
        functions[function.name], added = rewrite_ops(function, rewrites, "round-caches")
        notes += added
    found = module.with_functions(functions)
    if not stored_states(found):
        what = f"no cache is stored as {to}: none is read by one attention only"
        raise MoecError(what, todo="leave --kv out: only what one attention op reads can be")
    return Rewritten(found, tuple(notes))


def _stored_as(op: Op, name: str, to: str) -> Op:
    return op.become(name, *op.operands, **{**op.attributes, "cache": to})


def _is_read_by_attention(module: Module, function: Function, op: Op) -> bool:
    """Return whether the states that an op appends to are read by one attention, and else only returned, in each call."""
    places, reader, operands = APPENDS[op.name]
    values = [op.results[place] for place in places]
    for value in values:
        for user in function.uses.get(value.name, []):
            if user is not None and (
                user.name != reader or user.settings.get("chunk") or not _is_operand(user, value, operands)
            ):
                return False
    return all(_is_only_returned(module, function, value) for value in values)


def _is_operand(user: Op, value: Value, names: tuple[str, ...]) -> bool:
    return all(name in names for name, v in user.named if v == value)


def _is_only_returned(module: Module, function: Function, value: Value) -> bool:
    """Return whether no caller of a function reads a state that it returns, in this step."""
    places = [i for i, result in enumerate(function.results) if result == value]
    for caller in module.functions:
        for call in (op for op in caller.ops if op.callee == function.name):
            for made in (call.results[i] for i in places):
                if any(user is not None for user in caller.uses.get(made.name, [])) or not _is_only_returned(
                    module, caller, made
                ):
                    return False
    return True
