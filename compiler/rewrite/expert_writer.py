"""Writes experts that were read as bodies for rows that are sorted by expert: dispatch, linears, combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import Refuse
from ..ir.dims import Size
from ..ir.module import Value
from ..weights.joined import join_recipes
from .chosen_gates import Chosen
from .editor import Editor
from .expert_bodies import Node, member_of
from .flat_rows import RowFlattener


@dataclass(frozen=True)
class Block:
    """Experts as they were read: the choice, the tokens, a body for all or one for each, what else is added to them."""

    chosen: Chosen
    tokens: Value
    bodies: Sequence[Node]
    rest: Sequence[Value] = ()


def write_block(editor: Editor, block: Block, result: Value) -> None:
    """Add a block to an editor's ops; the last of them gives `result`. Refuse where sizes do not go together."""
    width = block.tokens.type.shape[-1]
    tokens = RowFlattener(editor, block.tokens.type.shape[:-1])
    choices = block.chosen.ids.type.elements / tokens.count
    if not choices.is_Integer:
        raise Refuse(f"{block.chosen.ids} is {block.chosen.ids.type}: not as many choices for each token", block.tokens)
    shape = (tokens.count, choices)
    ids = _reshaped(editor, tokens.flat(block.chosen.ids), shape)
    gates = _gates(editor, block, tokens, shape)
    rows = _Rows(editor, block.bodies, _reshaped(editor, block.tokens, (tokens.count, width)), ids)
    y = editor.add("moe.combine", rows.write(block.bodies), gates, rows.order)
    total = _reshaped(editor, y, (*block.tokens.type.shape[:-1], y.type.shape[-1]))
    for value in block.rest:
        total = editor.add("core.add", value, total)
    total = _reshaped(editor, total, result.type.shape)
    if total.type != result.type:
        raise Refuse(f"the experts give {total.type}, {result} is {result.type}", result)
    editor.ops[-1] = replace(editor.ops[-1], results=(result,))


def _gates(editor: Editor, block: Block, tokens: RowFlattener, shape: tuple[Size, ...]) -> Value:
    dtype, gates = block.tokens.type.dtype, block.chosen.gates
    if gates is None:
        return editor.add("core.full", shape=shape, value=1.0, dtype=dtype)
    if gates.type.elements != shape[0] * shape[1]:
        raise Refuse(f"the gates are {gates.type}, the choices {list(map(str, shape))}", gates)
    flat = _reshaped(editor, tokens.flat(gates), shape)
    return flat if flat.type.dtype == dtype else editor.add("core.cast", flat, to=dtype)


def _reshaped(editor: Editor, value: Value, shape: tuple[Size, ...]) -> Value:
    return value if value.type.shape == shape else editor.add("core.reshape", value, shape=shape)


@dataclass
class _Rows:
    """Bodies being written for sorted rows, several alike ones as one: each node once, each weight as a stack [E, out, in]."""

    editor: Editor
    bodies: Sequence[Node]
    tokens: Value
    ids: Value
    rows: Value = field(init=False)
    offsets: Value = field(init=False)
    order: Value = field(init=False)
    written: dict[int, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Sort the rows by expert."""
        experts = len(self.bodies) if len(self.bodies) > 1 else self._experts_of(self.bodies[0])
        found = self.editor.add_all("moe.dispatch", self.tokens, self.ids, experts=experts)
        self.rows, self.offsets, self.order = found

    def _experts_of(self, node: Node) -> int:
        """Return the number of experts of a body whose weights are stacks."""
        if node.weight is not None:
            return int(node.weight.type.shape[0])
        return next(self._experts_of(n) for n in node.inputs if isinstance(n, Node) and n.op)

    def write(self, nodes: Sequence[Node]) -> Value:
        """Return the rows of a node, which stands in the same place of every body."""
        node = nodes[0]
        if not node.op:
            return self.rows
        if id(node) not in self.written:
            with self.editor.at(node.loc if len(nodes) == 1 else self.editor.loc):
                self.written[id(node)] = self._write_op(nodes)
        return self.written[id(node)]

    def _write_op(self, nodes: Sequence[Node]) -> Value:
        node = nodes[0]
        inputs = [self._input(nodes, i) for i in range(len(node.inputs))]
        if node.weight is None:
            attrs: dict[str, Any] = dict(node.attrs)
            return self.editor.add(node.op, *inputs, **({**attrs, "axis": 1} if node.op == "core.slice" else attrs))
        weight = self._stack([n.weight for n in nodes if n.weight is not None])
        if node.by_column:
            weight = self.editor.add("core.transpose", weight, perm=(0, 2, 1))
        bias = None if node.bias is None else self._stack([n.bias for n in nodes if n.bias is not None])
        return self.editor.add("moe.grouped_linear", inputs[0], weight, self.offsets, bias)

    def _input(self, nodes: Sequence[Node], place: int) -> Value:
        given = nodes[0].inputs[place]
        if isinstance(given, Value):
            return given
        return self.write([inner for inner in (n.inputs[place] for n in nodes) if isinstance(inner, Node)])

    def _stack(self, weights: Sequence[Value]) -> Value:
        if len(weights) == 1:
            return weights[0]
        members = [member_of(self.editor.function, w) for w in weights]
        stack = members[0][0] if members[0] is not None else None
        if stack is not None and members == [(stack, e) for e in range(int(stack.type.shape[0]))]:
            return stack
        recipes = [self.editor.recipe(w) for w in weights]
        return self.editor.weight(join_recipes("stack", recipes), "experts")
