"""Moves what all layers compute alike into their caller: what is made of values that every call is given, as angles are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ....compiler.ir.module import Function, Module, Op, Value
from ....compiler.ir.names import Names
from ....compiler.ir.types import attr_key
from ....compiler.ops import OPS


def hoist_ops(module: Module) -> Module:
    """Return the module with ops moved from functions to the one that calls them, where each call would compute the same.

    Moved is what reads nothing but values that several calls of a caller are given, and no states; equal ops of several
    functions are computed once.
    """
    for caller in module.functions:
        module = _from_callees(module, module.by_name[caller.name])
    return module


def _from_callees(module: Module, caller: Function) -> Module:
    calls = [op for op in caller.ops if op.callee]
    made = {v.name for op in calls for v in op.results}
    counts = Counter(v for op in calls for v in set(op.inputs))
    shared = {v for v, count in counts.items() if count > 1 and not v.type.state and v.name not in made}
    hoisted, changed = _Hoisted(Names(caller.names)), dict[str, Function]()
    for name in dict.fromkeys(op.callee for op in calls):
        own = [op for op in calls if op.callee == name]
        if len(own) < len(module.calls(name)):
            continue
        callee = module.by_name[name]
        given = {
            p.name: values[0]
            for p, *values in zip(callee.params, *(op.operands for op in own), strict=True)
            if values[0] in shared and all(v == values[0] for v in values)
        }
        if found := _movable_ops(callee, given):
            changed[name] = hoisted.take(callee, found, given, caller.ops.index(own[0]))
    return module.with_functions(changed | {caller.name: hoisted.called(caller)}) if changed else module


def _movable_ops(callee: Function, given: Mapping[str, Value | None]) -> list[Op]:
    """Return the ops that read only given values, in order; views of these only where another op that moves reads them."""
    known, candidates = set(given), list[Op]()
    returned = {v.name for v in callee.results}
    for op in callee.ops:
        inputs = {v.name for v in op.inputs}
        if inputs and inputs <= known and not op.callee and not returned & {v.name for v in op.results}:
            candidates.append(op)
            known |= {v.name for v in op.results}
    found, needed = list[Op](), set[str]()
    for op in reversed(candidates):
        if not OPS[op.name].view or needed & {v.name for v in op.results}:
            found.insert(0, op)
            needed |= {v.name for v in op.inputs}
    return found


@dataclass
class _Hoisted:
    """Ops of callees as their caller computes them: by where they go, and equal ones by what they are."""

    names: Names
    ops: dict[int, list[Op]] = field(default_factory=dict)  # before the caller's op of this number
    known: dict[Any, tuple[Value, ...]] = field(default_factory=dict)
    arguments: dict[str, tuple[list[int], list[Value]]] = field(default_factory=dict)  # of a callee: kept, and added

    def take(self, callee: Function, found: list[Op], given: Mapping[str, Value | None], place: int) -> Function:
        """Compute the ops before `place` of the caller and return the callee, to which their results are given."""
        values = dict(given)
        for op in found:
            operands = tuple(v and values[v.name] for v in op.operands)
            key = op.name, operands, attr_key(op.attrs)
            if key not in self.known:
                results = tuple(replace(v, name=self.names.fresh(v.name)) for v in op.results)
                self.known[key] = results
                self.ops.setdefault(place, []).append(replace(op, operands=operands, results=results))
            values |= {v.name: new for v, new in zip(op.results, self.known[key], strict=True)}
        moved = {id(op) for op in found}
        ops = tuple(op for op in callee.ops if id(op) not in moved)
        read = {v.name for op in ops for v in op.inputs} | {v.name for v in callee.results}
        added = [v for op in found for v in op.results if v.name in read]
        kept = [i for i, p in enumerate(callee.params) if p.name in read or p.name not in given]
        self.arguments[callee.name] = kept, [v for p in added if (v := values[p.name])]
        return replace(callee, params=(*(callee.params[i] for i in kept), *added), ops=ops)

    def called(self, caller: Function) -> Function:
        """Return the caller with the ops, and with calls that give their results."""
        ops = list[Op]()
        for place, op in enumerate(caller.ops):
            ops += self.ops.get(place, [])
            if op.callee in self.arguments:
                kept, added = self.arguments[op.callee]
                op = replace(op, operands=(*(op.operands[i] for i in kept), *added))
            ops.append(op)
        return replace(caller, ops=tuple(ops))
