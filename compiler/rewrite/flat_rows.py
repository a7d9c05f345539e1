"""Computes what works on each row alone for rows in one axis: a router of [B, S, D] as one of [B*S, D]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy

from ..ir.dims import Size
from ..ir.module import Op, Value
from .editor import Editor
from .expert_bodies import ELEMENTWISE

_ALONG = ("core.softmax", "core.topk", "core.gather", "core.scatter", "core.cumsum")  # with one axis
_COMPARED = frozenset({"core.where", "core.eq", "core.ne", "core.lt", "core.le", "core.gt", "core.ge"})


@dataclass
class RowFlattener:
    """Writes values [*rows, N] anew as [R, N], back to where rows are put together or come from outside."""

    editor: Editor
    rows: tuple[Size, ...]
    made: dict[str, Value] = field(default_factory=dict)

    @property
    def count(self) -> Size:
        """The number of rows."""
        return sympy.expand(sympy.Mul(*self.rows))

    def flat(self, value: Value) -> Value:
        """Return a value with its rows in one axis."""
        if len(self.rows) == 1 and value.type.shape[:1] == self.rows:
            return value
        if value.name not in self.made:
            op = self.editor.function.producers.get(value.name)
            again = None if op is None or value.type.shape[: len(self.rows)] != self.rows else self._again(op)
            if again is None or op is None:
                shape = (self.count, *value.type.shape[len(self.rows) :])
                self.made[value.name] = self.editor.add("core.reshape", value, shape=shape)
            else:
                self.made |= {old.name: new for old, new in zip(op.results, again, strict=True)}
        return self.made[value.name]

    def _again(self, op: Op) -> tuple[Value, ...] | None:
        """Return the results of an op on flat rows; None for one that does not work on each row alone."""
        last, lead = len(op.results[0].type.shape) - 1, len(self.rows)
        attributes: dict[str, Any] = dict(op.attributes)
        if last != lead:
            return None
        if op.name in _ALONG and attributes["axis"] == last:
            attributes["axis"] = 1
        elif op.name == "core.sum" and attributes["axes"] == (last,) and attributes["keepdim"]:
            attributes["axes"] = (1,)
        elif op.name == "core.full":
            attributes["shape"] = (self.count, op.results[0].type.shape[-1])
        elif op.name not in ELEMENTWISE | _COMPARED | {"core.linear"}:
            return None
        inputs: list[Value | None] = []
        for i, value in enumerate(op.operands):
            if value is None or len(value.type.shape) < 2 or (op.name == "core.linear" and i > 0):
                inputs.append(value)  # numbers, and a weight's numbers for each feature
            elif value.type.shape[:lead] == self.rows:
                inputs.append(self.flat(value))
            else:
                return None
        with self.editor.at(op.loc):
            return self.editor.add_all(op.name, *inputs, **attributes)
