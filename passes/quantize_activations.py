"""Rounds the activations that meet quantized weights to a format of their own, so that codes are multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..compiler.errors import MoecError
from ..compiler.formats.table import find_format
from ..compiler.ir.module import Module, Op, Value
from ..compiler.ir.notes import Note, Rewritten, note_on
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.editor import Editor, rewrite_ops

OPERANDS = {  # op of stage kernel: the activations and the weight that it multiplies
    "acc.linear": ("x", "w"), "acc.gated_up": ("x", "up"), "acc.grouped_up": ("x", "up"),
    "acc.grouped_down": ("h", "down"),
}  # fmt: skip


@pass_(reads="kernel", rounds=True)
def quantize_activations(module: Module, target: object, *, pairs: str = "fp8_b128:fp8_g128") -> Rewritten:
    """Round what is multiplied with weights of some formats to a format: `pairs` are weights:activations, ....

    A value that several ops multiply is rounded once. Activations that meet weights of other formats stay as they are.
    """
    formats = _read_pairs(pairs)
    functions, notes = {}, list[Note]()
    for function in module.functions:
        rewrites = {name: partial(_round_operand, formats=formats) for name in OPERANDS}
        functions[function.name], found = rewrite_ops(function, rewrites, "quantize-activations")
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
