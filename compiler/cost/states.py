"""What a program keeps of past tokens: which part of its states a step reads, and which part any step can still read.

A layer whose attention sees a window of tokens can read no others, however many its program keeps. An op declares what
it reads of an operand (`OpDef.reads`), and what it or a later step reads (`OpDef.reach`); nothing here knows an op by name.
Numbers are those of a step with one new token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import sympy

from ..ir.dims import Size
from ..ir.module import Function, Module, Op, Value
from ..ir.types import TensorType
from ..ops import OPS

Question = Literal["reads", "reach"]


@dataclass
class States:
    """Answers how many numbers of its states a program needs; `question` names the field of OpDef that is asked."""

    module: Module
    question: Question
    _known: dict[tuple[str, str], Size] = field(default_factory=dict)

    def needed_elements(self, function: Function, state: Value) -> Size:
        """Return how many numbers of a parameter a function and those that it calls need, at most all."""
        key = (function.name, state.name)
        if key not in self._known:
            found = list(self._needed_by_readers(function, state, sympy.S.Zero))
            # what the program itself never reads is there for someone else
            whole = _of_one(state.type.elements)
            self._known[key] = sympy.Min(whole, sympy.Max(*found)) if found else whole
        return self._known[key]

    def bytes(self, function: Function, own: bool, size_of: Callable[[TensorType], Size]) -> Size:
        """Return the bytes needed of a function's states, where `own` of those that it does not pass on to a call."""
        states = [p for p in function.params if p.type.state and not (own and passed_on(function, p))]
        return sympy.expand(sympy.Add(*(self.needed_elements(function, p) * size_of(p.type) for p in states)))

    def _needed_by_readers(self, function: Function, value: Value, added: Size) -> Iterator[Size]:
        """Yield the numbers that each reader needs of a state to which some have been added."""
        for op in function.uses.get(value.name, []):
            grown = [] if op is None else list(_grown_states(op, value))
            for result in grown:
                more = _of_one(result.type.elements - value.type.elements)
                yield from self._needed_by_readers(function, result, added + more)
            for needed in (
                [] if op is None else [self._by_op(op, k, v) for k, v in enumerate(op.operands) if v == value]
            ):
                if needed != 0 or not grown:  # what only appends reads nothing
                    yield needed if added == 0 else sympy.Max(0, sympy.expand(needed - added))

    def _by_op(self, op: Op, k: int, value: Value) -> Size:
        if op.callee:
            callee = self.module.by_name[op.callee]
            return self.needed_elements(callee, callee.params[k])
        definition = OPS[op.name]
        declared = getattr(definition, self.question).get(definition.operand_name(k))
        if declared is None:
            return _of_one(value.type.elements)
        types = [None if v is None else v.type for v in op.operands]
        return _of_one(declared(types, op.settings))


def _of_one(formula: Size) -> Size:
    """Return a formula for one new token: comparing the sizes of several would cost time and say nothing more."""
    return sympy.expand(formula.subs({s: 1 for s in formula.free_symbols if s.name == "S"}))


def _grown_states(op: Op, state: Value) -> Iterator[Value]:
    """Yield the results of an op that are a state with more behind it."""
    appends = state.type.state and not op.callee and OPS[op.name].appends
    if appends and any(v == state and name in appends for name, v in op.named):
        yield from (v for v in op.results if v.type.state and _is_longer(state.type, v.type))


def _is_longer(before: TensorType, after: TensorType) -> bool:
    pairs = list(zip(before.shape, after.shape, strict=False))
    return len(before.shape) == len(after.shape) and sum(a != b for a, b in pairs) == 1


def passed_on(function: Function, state: Value) -> bool:
    """Return whether a function hands a state to a call."""
    return any(op is not None and op.callee for op in function.uses.get(state.name, []))


def growth_per_token(formula: Size, at: Callable[[Size, int], int], past: int) -> Fraction:
    """Return what one more token adds to a formula behind `past` others, on average over what repeats in it.

    Entries that stand for several tokens are added once in so many, and tokens of an unfinished one come and go.
    """
    period = math.lcm(1, *_periods_of(formula))
    return Fraction(at(formula, past + period) - at(formula, past), period)


def _periods_of(formula: Size) -> Iterator[int]:
    for part in formula.atoms(sympy.floor, sympy.ceiling, sympy.Mod):
        length = part.args[1] if isinstance(part, sympy.Mod) else sympy.fraction(sympy.together(part.args[0]))[1]
        if length.is_Integer:
            yield int(length)
