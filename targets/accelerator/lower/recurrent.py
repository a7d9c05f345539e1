"""Lowers recurrent layers: a convolution with its window and activation is one op, linear attention reads shared heads once.

The source has channels in front of tokens and heads repeated, which a kernel needs neither; what exchanges the axes stays
as it is, and costs nothing where two of them follow each other.
"""

from __future__ import annotations

from ....compiler.errors import Refuse
from ....compiler.ir.activation import IDENTITY, Activation
from ....compiler.ir.module import Function, Op, Value
from ....compiler.rewrite.editor import Editor

_ACTIVATIONS = {"core.silu": "silu", "core.relu": "relu"}


# --- convolutions ----------------------------------------------------------------------------------------------


def window_conv(editor: Editor, op: Op) -> Op:
    """Return nn.conv_window as acc.window_conv, with the convolution and the activation behind it."""
    conv, act, _ = _convolution_parts(editor.function, op)
    for weight in (conv["w"], conv.get("b")):
        if weight is not None and weight.name not in editor.consts:  # which may be computed further down
            raise Refuse(f"{weight} is not a weight", weight)
    present = op.results[1]
    x = editor.add("core.transpose", op["new"], hint=f"{present.name}.x", perm=(0, 2, 1))
    editor.add_all(
        "acc.window_conv", x, op["past"], conv["w"], conv.get("b"), hints=(_convolution_name(op), present), act=act
    )
    return editor.ops.pop()


def cut_window(editor: Editor, op: Op) -> Op:
    """Return the slice that takes a convolution's new tokens as what acc.window_conv made, with axes exchanged."""
    producers = editor.function.producers
    conv = producers.get(op["x"].name)
    if conv is not None and conv.name in _ACTIVATIONS:
        conv = producers.get(conv.operands[0].name) if conv.operands[0] else None
    window = producers.get(conv["x"].name) if conv is not None and conv.name == "nn.causal_conv" else None
    if window is None or window.name != "nn.conv_window":
        return op
    made = [o for o in editor.ops if o.name == "acc.window_conv" and o.results[1] == window.results[1]]
    return op.become("core.transpose", made[0].results[0], perm=(0, 2, 1)) if made else op


def _convolution_name(window: Op) -> str:
    return f"{window.results[0].name}.conv"


def _convolution_parts(function: Function, window: Op) -> tuple[Op, Activation, Op]:
    """Return the convolution of a window, the activation behind it and the slice that takes the new tokens.

    Refuse where something else reads the window or what is computed of it.
    """
    whole = window.results[0]
    conv = _only_reader(function, whole)
    if conv.name != "nn.causal_conv" or conv["x"] != whole:
        raise Refuse(f"{conv.name} reads {whole}, no convolution does", whole)
    act, end = IDENTITY, _only_reader(function, conv.results[0])
    if end.name in _ACTIVATIONS:
        act = Activation(_ACTIVATIONS[end.name], gated=False)
        end = _only_reader(function, end.results[0])
    kept, new = window["past"].type.shape[2], window["new"].type.shape[2]
    wanted = {"axis": 2, "start": kept, "stop": kept + new, "step": 1}
    if end.name != "core.slice" or any(end.settings[name] != value for name, value in wanted.items()):
        raise Refuse(f"{end.name} takes other tokens than the new ones of {whole}", whole)
    return conv, act, end


def _only_reader(function: Function, value: Value) -> Op:
    match function.uses.get(value.name, []):
        case [Op() as reader]:
            return reader
    raise Refuse(f"{value} is read at several places", value)


# --- linear attention ------------------------------------------------------------------------------------------


def linear_attention(editor: Editor, op: Op) -> Op:
    """Return nn.linear_attention as acc.linear_attention, without the copies of q, k and the rates of decay."""
    q, k = (_shared_heads(editor.function, op[name]) for name in "qk")
    if q is not None and k is not None and q.type.elements == k.type.elements:
        groups = q.type.elements / (q.type.shape[0] * q.type.shape[1] * q.type.shape[-1])
        shape = (*q.type.shape[:2], groups, q.type.shape[-1])
        q, k = (editor.add("core.reshape", value, hint=f"{value.name}.heads", shape=shape) for value in (q, k))
    else:
        q, k = op["q"], op["k"]
    decay, rate = _step_and_rate(editor.function, op.get("decay"))
    return op.become("acc.linear_attention", q, k, op["v"], decay, rate, op.get("beta"), op["past"], **op.attributes)


def _shared_heads(function: Function, value: Value) -> Value | None:
    """Return the heads [B, S, F, 1, K] or [B, S, 1, K] that were repeated to [B, S, H, K]; None where they were not."""
    made = function.producers.get(value.name)
    if made is not None and made.name == "core.reshape":
        made = function.producers.get(made["x"].name)
    if made is None or made.name != "core.expand":
        return None
    given, wide = made["x"], made.results[0].type
    grown = [i for i, (n, m) in enumerate(zip(given.type.shape, wide.shape, strict=True)) if n != m]
    heads = wide.shape[2:-1]
    whole = wide.shape[:2] == value.type.shape[:2] and wide.shape[-1] == value.type.shape[-1]
    return given if whole and len(heads) in (1, 2) and grown == [len(wide.shape) - 2] else None


def _step_and_rate(function: Function, decay: Value | None) -> tuple[Value | None, Value | None]:
    """Return a decay [B, S, H, K] as the step [B, S, H, 1] and the rate [H, K] whose product it is, else as it is."""
    made = function.producers.get(decay.name) if decay is not None else None
    if decay is None or made is None or made.name != "core.mul":
        return decay, None
    *lead, width = decay.type.shape
    for steps, rates in (made.inputs, made.inputs[::-1]):
        if steps.type.shape == (*lead, 1) and rates.type.shape == (lead[2], width) and width != 1:
            return steps, rates
    return decay, None
