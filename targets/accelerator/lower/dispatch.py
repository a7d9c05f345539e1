"""Lowers routed experts that are spelled out: rows stay in the order of the pairs (token, choice), and no row is copied.

moe.dispatch orders rows by expert. What follows up to moe.combine works on each row by itself, so that it may as well see
them in the order of the pairs, in which grouped matmuls take and give them.
"""

from __future__ import annotations

from collections.abc import Callable

from ....compiler.errors import Refuse
from ....compiler.ir.activation import IDENTITY
from ....compiler.ir.module import Function, Op, Value
from ....compiler.rewrite.editor import Editor

Store = Callable[[Editor, Op, Value], Value]  # gives a weight as it is stored
Sort = Callable[[Editor, Value, int, tuple[str, str]], tuple[Value, ...]]

# what computes each row of a matrix from that row alone; the others do where they do not work along the rows
_BY_ROW = frozenset(
    f"core.{name}"
    for name in (
        "add", "sub", "mul", "div", "pow", "maximum", "minimum", "neg", "exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid",
        "silu", "gelu", "relu", "softplus", "abs", "erf", "reciprocal", "clamp",
    )
) | {"nn.rms_norm", "nn.layer_norm"}  # fmt: skip
_ALONG = frozenset(("core.slice", "core.softmax", "core.sum", "core.mean", "core.amax"))


def lower_dispatch(editor: Editor, op: Op) -> Op:
    """Return moe.dispatch as the rows of the pairs in their order. Refuse where something reads the rows otherwise."""
    _check_rows(editor.function, op)
    x, ids = op["x"], op["ids"]
    tokens, width = x.type.shape
    chosen = ids.type.shape[1]
    rows = op.results[0]
    each = editor.add("core.reshape", x, hint=f"{rows.name}.each", shape=(tokens, 1, width))
    wide = editor.add("core.expand", each, hint=f"{rows.name}.wide", shape=(tokens, chosen, width))
    editor.add("core.reshape", wide, hint=rows, shape=rows.type.shape)
    return editor.ops.pop()


def grouped_linear(editor: Editor, op: Op, stored: Store, sort: Sort) -> Op:
    """Return moe.grouped_linear as acc.grouped_up without an activation; it gathers rows that are repeated tokens."""
    made = _dispatch_of(editor, op["offsets"])
    rows, (x, ids) = op["rows"], _before_repetition(editor.function, made["x"], made["ids"])
    if rows != made.results[0]:
        x, ids = rows, made["ids"]
        if ids.type.shape[1] != 1:
            ids = editor.add("core.reshape", ids, hint=f"{ids.name}.pairs", shape=(rows.type.shape[0], 1))
    else:
        x = editor.add("core.reshape", x, hint=f"{x.name}.tokens", shape=(ids.type.shape[0], x.type.shape[-1]))
    weight = stored(editor, op, op["w"])
    order, tiles = sort(editor, ids, int(weight.type.shape[0]), (f"{ids.name}.order", f"{ids.name}.tiles"))
    return op.become("acc.grouped_up", x, ids, order, tiles, weight, op.get("bias"), act=IDENTITY)


def lower_combine(editor: Editor, op: Op) -> Op:
    """Return moe.combine as the weighted sum of each token's rows, which lie side by side."""
    made = _dispatch_of(editor, op["perm"])
    rows, gates = op["rows"], op["gates"]
    tokens, chosen = gates.type.shape
    ones = editor.function.producers.get(gates.name)
    if chosen == 1 and ones is not None and ones.name == "core.full" and ones.attributes["value"] == 1:
        return op.become("core.reshape", rows, shape=rows.type.shape)
    width = rows.type.shape[1]
    name = made.results[0].name
    each = editor.add("core.reshape", rows, hint=f"{name}.by_token", shape=(tokens, chosen, width))
    factors = editor.add("core.reshape", gates, hint=f"{name}.gates", shape=(tokens, chosen, 1))
    weighted = editor.add("core.mul", each, factors, hint=f"{name}.weighted")
    return op.become("core.sum", weighted, axes=(1,), keepdim=False)


def _dispatch_of(editor: Editor, value: Value) -> Op:
    """Return the moe.dispatch that made offsets or a permutation. Refuse where it was not lowered or there is none."""
    made = editor.function.producers.get(value.name)
    if made is None or made.name != "moe.dispatch":
        raise Refuse(f"{value} is not of moe.dispatch", value)
    _check_rows(editor.function, made)
    return made


def _check_rows(function: Function, dispatch: Op) -> None:
    """Refuse where what follows a moe.dispatch up to moe.combine is not computed row by row."""
    rows, offsets, perm = dispatch.results
    _check_readers(function, offsets, "moe.grouped_linear", "offsets")
    _check_readers(function, perm, "moe.combine", "perm")
    derived, pending = {rows.name}, [rows]
    while pending:
        for reader in function.uses.get((value := pending.pop()).name, []):
            if reader is None:
                raise Refuse(f"{value} is a result, and in the order of the experts", value)
            if reader.name == "moe.combine":
                if reader["perm"] != perm:
                    raise Refuse(f"{value} is combined in the order of another dispatch", value)
                continue
            if reader.name == "moe.grouped_linear":
                ordered = reader["offsets"] == offsets
            else:
                ordered = _is_by_row(reader, rows)
            if not ordered:
                raise Refuse(f"{reader.name} reads {value}, which is in the order of the experts", value)
            if reader.results[0].name not in derived:
                derived.add(reader.results[0].name)
                pending.append(reader.results[0])
    for op in function.ops:  # no row of another order is mixed in
        if op.results and op.results[0].name in derived and op.name != "moe.dispatch":
            for value in op.inputs:
                if value.name not in derived and _has_rows(value, rows):
                    raise Refuse(f"{value} is in another order than {rows}", value)


def _check_readers(function: Function, value: Value, name: str, operand: str) -> None:
    for reader in function.uses.get(value.name, []):
        if reader is None or reader.name != name or reader[operand] != value:
            raise Refuse(f"{value} is read by something else than {name}", value)


def _is_by_row(op: Op, rows: Value) -> bool:
    """Return whether an op computes each row of its result from that row."""
    if len(op.results) != 1 or not _has_rows(op.results[0], rows):
        return False
    axes = op.attributes.get("axes", (op.attributes.get("axis", 0),))
    return op.name in _BY_ROW or (op.name in _ALONG and axes == (1,))


def _has_rows(value: Value, rows: Value) -> bool:
    return len(value.type.shape) == 2 and value.type.shape[0] == rows.type.shape[0]


def _before_repetition(function: Function, x: Value, ids: Value) -> tuple[Value, Value]:
    """Return tokens and the experts of each, where x repeats every token for its experts and ids has one for each row."""
    wide, flat = function.producers.get(x.name), function.producers.get(ids.name)
    if wide is None or flat is None or wide.name != "core.reshape" or flat.name != "core.reshape":
        return x, ids
    grown = function.producers.get(wide["x"].name)
    if grown is None or grown.name != "core.expand":
        return x, ids
    one, many, chosen = grown["x"], grown.results[0].type.shape, flat["x"].type.shape
    alike = len(many) == 3 and one.type.shape == (many[0], 1, many[2]) and chosen == (many[0], many[1])
    return (one, flat["x"]) if alike else (x, ids)
