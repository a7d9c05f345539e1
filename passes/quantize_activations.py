"""Rounds the activations that meet quantized weights to a format of their own, so that codes are multiplied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from ..compiler.errors import MoecError
from ..compiler.formats.table import find_format, format_of
from ..compiler.ir.module import Function, Module, Op, Value
from ..compiler.ir.notes import Note, Rewritten, note_on
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.editor import Editor, rewrite_ops

OPERANDS = {  # op of stage kernel: the activations and the weight that it multiplies
    "acc.linear": ("x", "w"), "acc.gated_up": ("x", "up"), "acc.grouped_up": ("x", "up"),
    "acc.grouped_down": ("h", "down"),
}  # fmt: skip
NORMS = ("nn.rms_norm", "nn.add_rms_norm", "nn.layer_norm")  # become acc.norm, which hands on both forms
HALVES = ("acc.gated_up", "acc.grouped_up")  # round what they give if told to


@pass_(reads="kernel", rounds=True)
def quantize_activations(module: Module, target: object, *, pairs: str = "fp8_b128:fp8_g128") -> Rewritten:
    """Round what is multiplied with weights of some formats to a format: `pairs` are weights:activations, ....

    A value that several ops multiply is rounded once, by the op that makes it where that is a norm or the first half of
    an MLP or of experts. Activations that meet weights of other formats stay as they are.
    """
    formats = _read_pairs(pairs)
    functions, notes = {}, list[Note]()
    for function in module.functions:
        rewrites = {name: partial(_round_operand, formats=formats) for name in OPERANDS}
        rounded, found = rewrite_ops(function, rewrites, "quantize-activations")
        functions[function.name] = _round_where_made(rounded)
        notes += found
    return Rewritten(module.with_functions(functions), tuple(notes))


def _read_pairs(text: str) -> dict[str, str]:
    """Return the formats of activations by those of weights."""
    pairs = [part.strip().split(":") for part in text.split(",")]
    for pair in pairs:
        if len(pair) != 2 or any(find_format(name) is None for name in pair):
            raise MoecError(
                f"{':'.join(pair)} is no pair of quantized formats", where=f"pairs={text}",
                todo="give weights:activations, as in fp8_b128:fp8_g128",
            )  # fmt: skip
    return {weights: activations for weights, activations in pairs}


def _round_operand(editor: Editor, op: Op, formats: Mapping[str, str]) -> Op:
    name, weight = OPERANDS[op.name]
    x, held = op[name], op[weight].type.dtype
    if held not in formats or find_format(x.type.dtype):
        return op
    rounded = _quantize_value(editor, op, x, formats[held])
    return op.become(op.name, *(rounded if v == x else v for v in op.operands), **op.attributes)


def _quantize_value(editor: Editor, op: Op, x: Value, to: str) -> Value:
    """Return a value in a format, rounded once for all that multiply it."""
    for earlier in editor.ops:
        if earlier.name == "acc.quantize" and earlier.operands == (x,) and earlier.attributes["to"] == to:
            return earlier.results[0]
    editor.notes.append(note_on(editor.function, op, f"{x} is rounded to {to}, which is multiplied with the codes"))
    return editor.add("acc.quantize", x, hint=f"{x.name}.{to}", to=to)


# --- by the op that makes it -----------------------------------------------------------------------------------


def _round_where_made(function: Function) -> Function:
    """Return a function whose norms and first halves round their results themselves, to the first format that is read.

    A format with a scale for the whole of a row is left out: a kernel has to have the row before it can round.
    """
    rounding: dict[str, list[Op]] = {}  # name of a value -> the ops that round it, or a view of it
    for op in function.ops:
        if op.name == "acc.quantize" and not format_of(op.settings.text("to")).tensor_scale:
            found = rounding.setdefault(_without_views(function, op["x"]).name, [])
            if not found or found[0].attributes["to"] == op.attributes["to"]:
                found.append(op)
    editor = Editor(function)
    made: dict[str, Value] = {}  # name of what an op rounded -> the same numbers as they are made
    for op in function.ops:
        editor.loc = op.loc
        value = op.results[0]
        if value.name in made:
            if made[value.name] != value:
                editor.add("core.reshape", made[value.name], hint=value, shape=value.type.shape)
            continue
        own = rounding.get(value.name, [])
        read = bool(own) and _is_read(function, value, own)
        if own and op.name in NORMS:
            rounded = _norm_in_both_forms(editor, op, own, read)
        elif own and op.name in HALVES and not read:
            to = own[0].settings.text("to")
            rounded = editor.add(op.name, *op.operands, hint=_name_of_rounded(value, own), **op.attributes, to=to)
        else:
            editor.ops.append(op)
            continue
        made |= {rounds.results[0].name: rounded for rounds in own}
    return editor.finish()


def _without_views(function: Function, value: Value) -> Value:
    """Return what a value is a view of that has the same rows."""
    op = function.producers.get(value.name)
    while op is not None and op.name == "core.reshape" and op["x"].type.shape[-1] == value.type.shape[-1]:
        value = op["x"]
        op = function.producers.get(value.name)
    return value


def _is_read(function: Function, value: Value, without: Sequence[Op]) -> bool:
    """Return whether ops other than some, or the caller, read a value or a view of it."""
    return any(
        op is None or (op not in without and (op.name != "core.reshape" or _is_read(function, op.results[0], without)))
        for op in function.uses.get(value.name, [])
    )


def _name_of_rounded(value: Value, rounding: Sequence[Op]) -> Value | str:
    """Return the value that an op has rounded as it is, which its maker gives then, else a name for a new one."""
    own = [op.results[0] for op in rounding if op.inputs == (value,)]
    return own[0] if own else f"{value.name}.{rounding[0].attributes['to']}"


def _norm_in_both_forms(editor: Editor, op: Op, rounding: Sequence[Op], plain: bool) -> Value:
    y, given = op.results[0], dict(op.named)
    total = op.results[1] if len(op.results) > 1 else f"{y.name}.sum"
    _, rounded, _ = editor.add_all(
        "acc.norm", *(given.get(name) for name in ("x", "residual", "w", "b")),
        hints=(y if plain else f"{y.name}.plain", _name_of_rounded(y, rounding), total),
        eps=op.settings.number("eps"), to=rounding[0].settings.text("to"), plain=plain, centred=op.name == "nn.layer_norm",
    )  # fmt: skip
    return rounded
