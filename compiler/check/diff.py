"""What differs between two modules: function by function, weights word by word, ops where their structure differs.

Names of values are not compared: ops are paired by what they are and where they come from, and an op that reads the
counterpart of what the other one reads reads the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any

from ..ir.module import Const, Function, Module, Op
from ..text.printer import print_op, print_recipe, print_type

WIDTH = 160  # of a line; what is longer is cut in its middle
_WORDS = re.compile(r'"[^"]*"|[\w.+-]+|\S')


def diff_modules(old: Module, new: Module) -> list[str]:
    """Return the differences as lines; none for modules that do the same to the same weights."""
    found = []
    if old.stage != new.stage:
        found.append(f"stage: {old.stage} -> {new.stage}")
    if old.source != new.source:
        found.append(f"source: {old.source or 'none'} -> {new.source or 'none'}")
    dims = ({d.name: f"{d.low}..{d.high}" for d in module.dims} for module in (old, new))
    found += _table_lines("dim", *dims)
    for name in dict.fromkeys([f.name for f in (*old.functions, *new.functions)]):
        left, right = old.by_name.get(name), new.by_name.get(name)
        if left is None or right is None:
            only = left or right
            size = f"{len(only.ops)} ops, {len(only.consts)} weights" if only else ""
            found.append(f"{'-' if left else '+'} @{name}: {size}")
        elif left != right and (lines := list(_FunctionDiff(left, right).lines())):
            found += [f"@{name}", *(f"  {line}" for line in lines)]
    return [_cut_line(line) for line in found]


def _table_lines(label: str, old: dict[str, str], new: dict[str, str]) -> list[str]:
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return [f"{label} {name}: {old.get(name, 'none')} -> {new.get(name, 'none')}" for name in names]


class _FunctionDiff:
    """Pairs the weights and ops of two functions of one name."""

    def __init__(self, old: Function, new: Function) -> None:
        self.old, self.new = old, new
        # the names of old values and of their counterparts; parameters pair up in their order
        self.counterparts = {a.name: b.name for a, b in zip(old.params, new.params, strict=False)}
        self.added: set[str] = set()  # values of the new function that no old op makes

    def lines(self) -> Iterator[str]:
        """Yield the differences."""
        params = ([print_type(v.type) for v in f.params] for f in (self.old, self.new))
        for k, (a, b) in enumerate(zip_longest(*params, fillvalue="none")):
            if a != b:
                yield f"parameter {k + 1}: {a} -> {b}"
        if self.old.weights != self.new.weights:
            yield f'weights: "{self.old.weights}" -> "{self.new.weights}"'
        yield from self._weight_lines()
        yield from self._op_lines()
        results = [self.counterparts.get(v.name, v.name) for v in self.old.results]
        if results != [v.name for v in self.new.results] and not self._took_over(self.old.results, self.new.results):
            old, new = (", ".join(f"%{v.name}" for v in f.results) for f in (self.old, self.new))
            yield f"return: {old} -> {new}"

    def _weight_lines(self) -> Iterator[str]:
        old, new = ({c.value.name: c for c in f.consts} for f in (self.old, self.new))
        alike = {(c.value.type, c.recipe): name for name, c in new.items() if name not in old}
        renamed = {name: alike.get((c.value.type, c.recipe)) for name, c in old.items() if name not in new}
        taken = set(renamed.values())
        for name, const in old.items():
            other = new.get(name)
            if other is not None:
                self.counterparts[name] = name
                yield from _changed_weight(const, other)
            elif (found := renamed[name]) is not None:
                self.counterparts[name] = found
            else:
                yield f"- {_weight_text(const)}"
        for name, const in new.items():
            if name not in old and name not in taken:
                self.added.add(name)
                yield f"+ {_weight_text(const)}"

    def _op_lines(self) -> Iterator[str]:
        old, new = self.old.ops, self.new.ops
        matcher = SequenceMatcher(None, _op_keys(self.old), _op_keys(self.new), autojunk=False)
        for kind, a, b, c, d in matcher.get_opcodes():
            if kind == "equal":
                for left, right in zip(old[a:b], new[c:d], strict=True):
                    yield from self._paired(left, right)
            else:
                yield from self._unequal(old[a:b], new[c:d])

    def _unequal(self, old: Sequence[Op], new: Sequence[Op]) -> Iterator[str]:
        """Yield the lines of a stretch that differs; ops of one name and place in it are one op that changed."""
        places = [[(op.name, op.callee, op.loc) for op in ops] for ops in (old, new)]
        matcher = SequenceMatcher(None, places[0], places[1], autojunk=False)
        for kind, a, b, c, d in matcher.get_opcodes():
            if kind == "equal":
                for left, right in zip(old[a:b], new[c:d], strict=True):
                    yield from self._paired(left, right)
                continue
            for op in old[a:b]:
                yield f"- {print_op(op)}"
            for op in new[c:d]:
                self.added |= {v.name for v in op.results}
                yield f"+ {print_op(op)}"

    def _paired(self, old: Op, new: Op) -> Iterator[str]:
        changes = []
        operands = [None if v is None else self.counterparts.get(v.name) for v in old.operands]
        if operands != [v and v.name for v in new.operands] and not self._took_over(old.operands, new.operands):
            changes.append(f"reads {self._operands_text(old, new)}")
        if old.key[3] != new.key[3]:
            before, after = (dict(op.attrs) for op in (old, new))
            for name in dict.fromkeys([*before, *after]):
                if before.get(name) != after.get(name):
                    changes.append(f"{name}={before.get(name, 'none')} -> {after.get(name, 'none')}")
        types = [", ".join(print_type(v.type) for v in op.results) for op in (old, new)]
        if types[0] != types[1]:
            changes.append(f"gives {types[0]} -> {types[1]}")
        self.counterparts |= {a.name: b.name for a, b in zip(old.results, new.results, strict=False)}
        if changes:
            place = f" of {old.loc[0]}" if old.loc else ""
            results = ", ".join(map(str, new.results))
            yield f"~ {results} = {new.callee or new.name}{place}: {'; '.join(changes)}"

    def _operands_text(self, old: Op, new: Op) -> str:
        pairs = zip_longest(old.operands, new.operands)
        other = [(a, b) for a, b in pairs if (a and self.counterparts.get(a.name)) != (b and b.name)]
        return ", ".join(f"{a or '_'} -> {b or '_'}" for a, b in other)

    def _took_over(self, old: Sequence[Any], new: Sequence[Any]) -> bool:
        """Return whether what reads differently reads what was added in place of what was removed, and note that."""
        if len(old) != len(new):
            return False
        pairs = [
            (a, b) for a, b in zip(old, new, strict=True) if (a and self.counterparts.get(a.name)) != (b and b.name)
        ]
        if not all(a and b and a.name not in self.counterparts and b.name in self.added for a, b in pairs):
            return False
        self.counterparts |= {a.name: b.name for a, b in pairs}
        return True


def _op_keys(function: Function) -> list[Any]:
    """Return what an op is and what makes its operands, for each op: enough to tell two reshapes apart."""
    makers = {v.name: op.name for op in function.ops for v in op.results}
    return [
        (op.name, op.callee, op.key[3], op.loc, tuple(v and makers.get(v.name, "") for v in op.operands))
        for op in function.ops
    ]  # fmt: skip


def _changed_weight(old: Const, new: Const) -> Iterator[str]:
    changes = []
    if old.value.type != new.value.type:
        changes.append(f"{print_type(old.value.type)} -> {print_type(new.value.type)}")
    if old.recipe != new.recipe:
        changes.append(_words_text(print_recipe(old.recipe), print_recipe(new.recipe)))
    if changes:
        yield f"~ const {new.value}: {'; '.join(changes)}"


def _weight_text(const: Const) -> str:
    return f"const {const.value} : {const.value.type} = {print_recipe(const.recipe)}"


def _words_text(old: str, new: str) -> str:
    """Return the words that differ between two texts, each with the words around it that make it readable."""
    left, right = _WORDS.findall(old), _WORDS.findall(new)
    parts = []
    for kind, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if kind != "equal":
            removed, added = "".join(left[a:b]), "".join(right[c:d])
            parts.append(f"{removed or 'nothing'} -> {added or 'nothing'}")
    return ", ".join(dict.fromkeys(parts))


def _cut_line(line: str) -> str:
    half = (WIDTH - 5) // 2
    return line if len(line) <= WIDTH else f"{line[:half]} ... {line[-half:]}"
