"""Removes what the program does not need: dead code, repeated code, ops that change nothing, sums of constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from ..compiler.dims import size
from ..compiler.interpret import run_op
from ..compiler.ir import Const, Function, Module, Op, Value, make_attrs, walk_calls
from ..compiler.pipeline import pass_

BOUND = 100  # sweeps over one function; each one shortens it, so this is never reached by a sound program


@pass_(reads="any")
def cleanup(module: Module, target: Any) -> Module:
    """Fold constants and ops that change nothing, share repeated ops, drop what is never read.

    Names of parameters and of results stay. Every op is pure, so that two equal ops may become one and an op that
    nobody reads may go.
    """
    module = module.with_functions({f.name: _clean(f) for f in module.functions})
    reached = {function.name for function, _ in walk_calls(module)}
    functions = tuple(f for f in module.functions if f.name in reached)
    return module if len(functions) == len(module.functions) else replace(module, functions=functions)


def _clean(function: Function) -> Function:
    for _ in range(BOUND):
        cleaned = _drop_dead(_sweep(function))
        if cleaned == function:
            return function
        function = cleaned
    return function


# --- dead code -------------------------------------------------------------------------------------------------


def _drop_dead(function: Function) -> Function:
    live = {v.name for v in function.results}
    ops: list[Op] = []
    for op in reversed(function.ops):
        if any(v.name in live for v in op.results):
            ops.append(op)
            live |= {v.name for v in op.inputs}
    consts = tuple(c for c in function.consts if c.value.name in live)
    return replace(function, consts=consts, ops=tuple(reversed(ops)))


# --- one walk from the first op to the last --------------------------------------------------------------------


@dataclass
class _State:
    """What is known on the way: values that stand for others, and the op that makes each value."""

    results: frozenset[str]  # names that the function returns
    alias: dict[str, Value] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    made: dict[str, Op] = field(default_factory=dict)
    seen: dict[Any, int] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)

    def number(self, value: Value | None) -> float | int | bool | None:
        """Return the number that a value holds everywhere, if it is a constant."""
        op = self.made.get(value.name) if value else None
        return op.attributes["value"] if op and op.name in ("core.constant", "core.full") else None  # type: ignore[return-value]

    def stand_for(self, old: Value, new: Value) -> bool:
        """Let `new` stand for `old` if the types agree; a result's name moves to the op that makes `new`."""
        if old.type != new.type:
            return False
        if old.name in self.results:
            taken = new.name in self.results or new.name in self.renamed
            if new.name not in self.made or taken:  # parameters, weights and other results keep their own names
                return False
            self.renamed[new.name] = old.name
        self.alias[old.name] = new
        return True


def _sweep(function: Function) -> Function:
    state = _State(frozenset(v.name for v in function.results))
    consts = _share_consts(function, state)
    for original in function.ops:
        op = replace(original, operands=tuple(v and state.alias.get(v.name, v) for v in original.operands))
        op = _fold(op, state) or _shorten(op, state)
        same = _unchanged(op, state)
        if same is not None and state.stand_for(op.results[0], same):
            continue
        if _shared(op, state):
            continue
        state.seen.setdefault(_key(op), len(state.ops))
        state.made |= {v.name: op for v in op.results}
        state.ops.append(op)
    return _rename(replace(function, consts=consts, ops=tuple(state.ops)), state)


def _share_consts(function: Function, state: _State) -> tuple[Const, ...]:
    kept: dict[Any, Const] = {}
    for const in function.consts:
        first = kept.setdefault(const.recipe, const)
        if first is not const and not state.stand_for(const.value, first.value):
            kept[const.value.name] = const
    return tuple(kept.values())


def _key(op: Op) -> tuple:
    # 1, 1.0 and True are equal in Python but not in a program
    return op.name, op.callee, op.operands, tuple((name, type(value), value) for name, value in op.attrs)


def _shared(op: Op, state: _State) -> bool:
    """Let an equal earlier op stand for this one, where every result can be replaced."""
    position = state.seen.get(_key(op))
    if position is None or any(v.name in state.results for v in op.results):
        return False
    first = state.ops[position]
    for old, new in zip(op.results, first.results, strict=True):
        state.alias[old.name] = new
    state.ops[position] = replace(first, loc=tuple(dict.fromkeys((*first.loc, *op.loc))))
    return True


def _rename(function: Function, state: _State) -> Function:
    def named(value: Value | None) -> Value | None:
        return replace(value, name=state.renamed[value.name]) if value and value.name in state.renamed else value

    if not state.renamed:
        return function
    ops = tuple(
        replace(op, operands=tuple(map(named, op.operands)), results=tuple(v for r in op.results if (v := named(r))))
        for op in function.ops
    )
    return replace(function, ops=ops)


# --- constants -------------------------------------------------------------------------------------------------


def _fold(op: Op, state: _State) -> Op | None:
    """Return the constant that a scalar op on constants makes."""
    if not op.operands or len(op.results) != 1 or op.results[0].type.shape or not op.name.startswith("core."):
        return None
    makers = [state.made.get(v.name) if v else None for v in op.operands]
    constants = [m for m in makers if m is not None and m.name == "core.constant"]
    if len(constants) != len(makers):
        return None
    number = run_op(op, [run_op(m, [], {})[0] for m in constants], {})[0].item()
    if isinstance(number, float) and math.isnan(number):  # a NaN equals nothing: two such modules would never be equal
        return None
    attrs = make_attrs({"value": number, "dtype": op.results[0].type.dtype})
    return Op("core.constant", (), op.results, attrs, loc=op.loc)


# --- ops that change nothing -----------------------------------------------------------------------------------


def _shorten(op: Op, state: _State) -> Op:
    """Return the op reading through an op of the same kind before it, where one does the work of both."""
    if op.name not in ("core.reshape", "core.transpose"):
        return op
    operand = op.operands[0]
    inner = state.made.get(operand.name) if operand else None
    if inner is None or inner.name != op.name:
        return op
    if op.name == "core.reshape":
        return replace(op, operands=inner.operands)
    first, second = inner.attributes["perm"], op.attributes["perm"]
    attrs = make_attrs({"perm": tuple(first[p] for p in second)})  # type: ignore[index, union-attr]
    return replace(op, operands=inner.operands, attrs=attrs)


def _unchanged(op: Op, state: _State) -> Value | None:
    """Return the operand that the op's only result equals, if there is one."""
    test = _SAME.get(op.name)
    if test is None:
        return None
    return next((v for i, v in enumerate(op.operands) if v is not None and test(op, i, state)), None)


def _with_number(neutral: float, commutative: bool) -> Callable[[Op, int, _State], bool]:
    def test(op: Op, index: int, state: _State) -> bool:
        number = state.number(op.operands[1 - index])
        if number is None or isinstance(number, bool):
            return False
        return number == neutral and (commutative or index == 0)

    return test


def _whole_slice(op: Op, index: int, state: _State) -> bool:
    operand, attributes = op.operands[0], op.attributes
    assert operand is not None
    whole = operand.type.shape[attributes["axis"]]  # type: ignore[index]
    start, stop = size(attributes["start"]), size(attributes["stop"])
    return start == 0 and sympy.expand(stop - whole) == 0 and attributes.get("step", 1) == 1


def _same_type(op: Op, index: int, state: _State) -> bool:
    return op.operands[0] is not None and op.operands[0].type == op.results[0].type


def _in_order(op: Op, index: int, state: _State) -> bool:
    perm = op.attributes["perm"]
    return list(perm) == sorted(perm)  # type: ignore[arg-type]


_SAME: dict[str, Callable[[Op, int, _State], bool]] = {
    "core.cast": _same_type,
    "core.reshape": _same_type,
    "core.expand": _same_type,
    "core.transpose": _in_order,
    "core.slice": _whole_slice,
    "core.concat": lambda op, index, state: len(op.operands) == 1,
    "core.add": _with_number(0, commutative=True),
    "core.sub": _with_number(0, commutative=False),
    "core.mul": _with_number(1, commutative=True),
    "core.div": _with_number(1, commutative=False),
    "core.pow": _with_number(1, commutative=False),
}
