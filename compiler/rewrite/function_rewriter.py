"""Walks once over a function and replaces values by others; the clean-up passes share it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..ir.module import Const, Function, Op, Value


@dataclass
class FunctionRewriter:
    """The state of the walk: the ops kept so far, the op that makes each value, and values that replace others."""

    function: Function
    ops: list[Op] = field(default_factory=list)
    made: dict[str, Op] = field(default_factory=dict)
    alias: dict[str, Value] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    def read(self, op: Op) -> Op:
        """Return the op with its operands replaced."""
        operands = tuple(v and self.alias.get(v.name, v) for v in op.operands)
        return op if operands == op.operands else replace(op, operands=operands)

    def keep(self, op: Op) -> None:
        """Append an op to the ones kept so far."""
        self.made |= {v.name: op for v in op.results}
        self.ops.append(op)

    def is_returned(self, value: Value) -> bool:
        """Return whether the function returns a value, so that its name has to stay."""
        return any(value.name == v.name for v in self.function.results)

    def stand_for(self, old: Value, new: Value) -> bool:
        """Replace `old` by `new` if the types agree; a result's name moves to the op that makes `new`."""
        if old.type != new.type:
            return False
        if self.is_returned(old):
            taken = self.is_returned(new) or new.name in self.renamed
            if new.name not in self.made or taken:  # parameters, weights and other results keep their own names
                return False
            self.renamed[new.name] = old.name
        self.alias[old.name] = new
        return True

    def finish(self, consts: tuple[Const, ...] | None = None) -> Function:
        """Return the function with the ops kept and the new names; the one before if it is the same."""
        consts = self.function.consts if consts is None else consts
        new = replace(self.function, ops=tuple(self.ops), consts=consts).renamed(self.renamed)
        return self.function if new == self.function else new
