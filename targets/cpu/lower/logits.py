"""Lets the runner ask for the logits of the last tokens only: the head is the largest matrix, and a prompt needs one row."""

from __future__ import annotations

from ....compiler.ir.module import Function, Op, Value
from ....compiler.rewrite.editor import Editor

HEADS = ("core.linear", "ort.matmul_nbits")
LOGITS = "logits"
# between the head and the result: what works on each logit by itself
_SINGLE = ("core.mul", "core.div", "core.tanh", "core.cast", "core.add")


def keep_last_tokens(function: Function) -> Function:
    """Return @main with ort.last_tokens in front of the head; the function itself where the head cannot be seen."""
    result = next((v for v in function.results if v.name == LOGITS), None)
    head = None if result is None else _head_linear(function, result)
    if head is None or len(head["x"].type.shape) != 3:
        return function
    editor = Editor(function)
    editor.loc = head.loc
    for op in function.ops:
        if op is head:
            last = editor.add("ort.last_tokens", op["x"], hint=f"{op['x'].name}.last")
            op = op.reading(x=last)
        editor.ops.append(op)
    return editor.finish()


def _head_linear(function: Function, value: Value) -> Op | None:
    """Return the linear that makes the logits, looking through ops on single numbers."""
    op = function.producers.get(value.name)
    while op is not None and op.name in _SINGLE:
        others = [v for v in op.inputs if v.type.shape == value.type.shape]
        if len(others) != 1 or len(function.uses[others[0].name]) != 1:
            return None
        op = function.producers.get(others[0].name)
    if op is None or op.name not in HEADS or len(function.uses[op.results[0].name]) != 1:
        return None
    return op
