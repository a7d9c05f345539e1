"""Dense feed-forward layers for ONNX Runtime: two linears with the activation between them."""

from __future__ import annotations

from typing import Any

from ....compiler.ir.activation import KINDS, Activation
from ....compiler.ir.fragments import parse_statements
from ....compiler.ir.module import Op, Value
from ....compiler.rewrite.editor import Editor


def gated_mlp(editor: Editor, op: Op) -> Op:
    """Return nn.gated_mlp as one linear for both halves, the activation, and the linear back."""
    x, up, down, up_bias, down_bias, gate = op.operands
    (y,) = op.results
    h = editor.add("core.linear", x, up, up_bias, hint=f"{y.name}.up")
    h = _gated_activation(editor, h, op.settings.activation("act"), y.name)
    if gate is None:
        return op.become("core.linear", h, down, down_bias)
    out = editor.add("core.linear", h, down, down_bias, hint=f"{y.name}.down")
    score = editor.add("core.linear", x, gate, None, hint=f"{y.name}.score")
    return op.become("core.mul", editor.add("core.sigmoid", score, hint=f"{y.name}.gate"), out)


def _gated_activation(editor: Editor, h: Value, act: Activation, name: str) -> Value:
    """Return a gated activation of h as ops of its halves g and u."""

    def add(kind: str, *operands: Value, hint: str, **attrs: Any) -> Value:
        return editor.add(kind, *operands, hint=f"{name}.{hint}", **attrs)

    axis, width = len(h.type.shape) - 1, int(h.type.shape[-1])
    if act.interleaved:
        g, u = (add("core.slice", h, hint=n, axis=axis, start=i, stop=width, step=2) for i, n in enumerate("gu"))
    else:
        sizes = (width // 2, width // 2)
        g, u = editor.add_all("ort.split", h, hints=(f"{name}.g", f"{name}.u"), axis=axis, sizes=sizes)
    if act.clamped and not act.clamp_after:
        g = add("core.clamp", g, hint="g", max=act.limit)
    if act.clamped:
        u = add("core.clamp", u, hint="u", min=-act.limit, max=act.limit)
    if act.beta:
        u = add("core.add", u, add("core.constant", hint="beta", value=act.beta, dtype=u.type.dtype), hint="u")
    a = _activation_function(add, g, act)
    return add("core.mul", add("core.clamp", a, hint="a", max=act.limit) if act.clamp_after else a, u, hint="h")


def _activation_function(add: Any, g: Value, act: Activation) -> Value:
    """Return the activation's function of the gate, in the ops that KINDS has for it; silu is one op of the runtime."""
    if act.kind == "silu":
        return add("ort.quick_gelu", g, hint="a", alpha=act.alpha)
    values = {"g": g}
    for line in parse_statements(KINDS[act.kind]):
        values[line.results[0]] = add(line.name, *(values[n] for n in line.operands if n), hint="a", **line.attrs)
    return values.get("a", g)
