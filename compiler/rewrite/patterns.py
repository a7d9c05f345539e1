"""Patterns: parse the two sides of a rewrite rule, and find where a function matches the left one.

The language of patterns is described in `rules.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import MoecError
from ..ir.fragments import PatternOp, Var, parse_statements
from ..ir.module import Function, Op, Value
from ..ir.recipes import Literal, Recipe
from ..ir.types import Attr, attr_key
from ..ops import OPS

COMMUTATIVE = frozenset(
    f"core.{name}" for name in ("add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or")
)

Guard = Callable[[Any, Any], "Mapping[str, Any] | None"]


@dataclass(frozen=True)
class Rule:
    """A rewrite: `before` and `after` as text, and the guard.

    `shared` names values that may stay for other readers, `optional` operands that may be absent.
    """

    name: str
    doc: str
    before_text: str
    after_text: str
    guard: Guard
    shared: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()

    @cached_property
    def before(self) -> tuple[PatternOp, ...]:
        """The parsed left side."""
        return _parse_side(self, "before", self.before_text)

    @cached_property
    def after(self) -> tuple[PatternOp, ...]:
        """The parsed right side; it may not define again what stays."""
        side = _parse_side(self, "after", self.after_text)
        defined = {n for p in side for n in p.results}
        read = {n for p in side for n in p.operands if n} - defined
        staying = {n for p in self.before if self.may_stay(p) or read & set(p.results) for n in p.results}
        inputs = {n for p in self.before for n in p.operands if n} - self.results
        for name in sorted(defined & (staying | inputs)):
            raise MoecError(f"rule {self.name}: `after` defines %{name}, which stays as `before` has it", exit_code=1)
        if not defined & self.results:
            what = f"rule {self.name}: `after` defines no value of `before`, so the rule could never be applied"
            raise MoecError(what, todo="what only takes ops away is a part of passes/fold_constants.py", exit_code=1)
        return side

    def may_stay(self, pattern: PatternOp) -> bool:
        """Return whether a matched statement stays where others read its result: constants, and what is shared."""
        return not pattern.operands or bool(self.shared & set(pattern.results))

    @cached_property
    def results(self) -> frozenset[str]:
        """The names that the left side defines."""
        return frozenset(n for p in self.before for n in p.results)

    @cached_property
    def plan(self) -> tuple[int, ...]:
        """The order in which statements of `before` are matched: each one touches a value that is known by then."""
        order = [len(self.before) - 1]
        while len(order) < len(self.before):
            left = [i for i in reversed(range(len(self.before))) if i not in order]
            read = {n for i in order for n in self.before[i].operands if n}
            by_result = [i for i in left if read & set(self.before[i].results)]
            by_operand = [i for i in left if read & set(self.before[i].operands)]
            if not by_result and not by_operand:
                raise MoecError(f"rule {self.name}: a statement of `before` shares no value with the others")
            order.append((by_result or by_operand)[0])
        return tuple(order)


def rule(
    *, before: str, after: str, shared: Sequence[str] = (), optional: Sequence[str] = ()
) -> Callable[[Guard], Rule]:
    """Make a rule of a guard function `(m, target) -> None | bindings`; its docstring is the rule in one sentence."""

    def declare(guard: Guard) -> Rule:
        name = guard.__name__
        return Rule(
            name, inspect.cleandoc(guard.__doc__ or ""), before, after, guard, frozenset(shared), frozenset(optional)
        )

    return declare


def _parse_side(owner: Rule, side: str, text: str) -> tuple[PatternOp, ...]:
    try:
        statements = parse_statements(text)
        for statement in statements:
            _check_statement(statement)
    except MoecError as error:
        raise replace(error, what=f"rule {owner.name}, {side}: {error.what}") from None
    return statements


def _check_statement(statement: PatternOp) -> None:
    if statement.name not in OPS:
        raise MoecError(f"unknown op {statement.name}")
    definition = OPS[statement.name]
    unknown = sorted(set(statement.attrs) - set(definition.attrs))
    if unknown:
        raise MoecError(f"{statement.name} has no attribute {', '.join(unknown)}")
    operands, results = definition.signature.operands, definition.signature.results
    variadic = bool(operands) and operands[-1].variadic
    if not variadic and len(statement.operands) != len(operands):
        raise MoecError(f"{statement.name} takes {len(operands)} operands, {len(statement.operands)} given")
    if len(statement.results) != len(results):
        raise MoecError(f"{statement.name} has {len(results)} results, {len(statement.results)} given")


@dataclass(frozen=True)
class Match:
    """The match that a guard is given: `m.x` is the value bound to %x, `m.E` the attribute bound to E, `m["a.b"]` any name."""

    function: Function
    values: Mapping[str, Value | None]
    attrs: Mapping[str, Attr]
    ops: Mapping[int, Op]  # index in `before` -> op

    def __getitem__(self, name: str) -> Any:
        name = name.removeprefix("%")
        return self.attrs[name] if name in self.attrs else self.values[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"neither `before` nor the matcher binds {name}") from None

    def op(self, name: str) -> Op | None:
        """Return the op that makes the value bound to a name; None for a parameter, a weight, an absent operand."""
        value = self.values[name.removeprefix("%")]
        return self.function.producers.get(value.name) if value else None

    def recipe(self, name: str) -> Recipe | None:
        """Return the recipe of the weight bound to a name; None for other values."""
        value = self.values[name.removeprefix("%")]
        return next((c.recipe for c in self.function.consts if c.value == value), None)

    def number(self, name: str) -> float | int | bool | None:
        """Return the one number that the value bound to a name holds everywhere, if it is a constant."""
        made, recipe = self.op(name), self.recipe(name)
        if made is not None and made.name in ("core.constant", "core.full"):
            return made.attributes.number("value")
        if isinstance(recipe, Literal) and len(set(map(attr_key, recipe.values))) == 1:
            return recipe.values[0]
        return None


@dataclass
class Search:
    """One attempt at one root: it yields matches and remembers how far the best failure came, and why."""

    rule: Rule
    function: Function
    depth: int = 0
    reason: str = ""

    def matches(self, root: Op) -> Iterator[Match]:
        """Yield every way in which the left side matches with its last statement at `root`."""
        start = Match(self.function, {}, {}, {})
        for first in self._bind(start, self.rule.plan[0], root):
            yield from self._complete(first, 1)

    def _complete(self, found: Match, depth: int) -> Iterator[Match]:
        if depth == len(self.rule.plan):
            yield found
            return
        index = self.rule.plan[depth]
        for op in self._candidates(found, index, depth):
            taken = any(op is other for other in found.ops.values())
            if not taken or op.name == "core.constant":
                for bound in self._bind(found, index, op, depth):
                    yield from self._complete(bound, depth + 1)

    def _candidates(self, found: Match, index: int, depth: int) -> Sequence[Op]:
        pattern = self.rule.before[index]
        known = next((found.values[n] for n in pattern.results if n in found.values), None)
        if known is not None:
            op = self.function.producers.get(known.name)
            if op is None:
                self._record_miss(depth, f"{known} is a parameter or a weight, not made by {pattern.name}")
            return [op] if op else []
        read = next(v for n in pattern.operands if n and (v := found.values.get(n)) is not None)
        users = [op for op in self.function.uses[read.name] if op is not None and op.name == pattern.name]
        if not users:
            self._record_miss(depth, f"{read} is not read by {pattern.name}")
        return users

    def _bind(self, found: Match, index: int, op: Op, depth: int = 0) -> Iterator[Match]:
        """Yield the match extended by one op, once for each order of operands that fits."""
        pattern = self.rule.before[index]
        place = op.results[0] if op.results else op.name
        if op.name != pattern.name:
            self._record_miss(depth, f"{place} is made by {op.name}, not {pattern.name}")
            return
        attrs = dict(found.attrs)
        given = op.settings
        for name, wanted in pattern.attrs.items():
            if not _bind_attr(wanted, given[name], attrs):
                self._record_miss(depth, f"{name} of {op.name} at {place} is {given[name]}, not {wanted}")
                return
        orders = [op.operands]
        if op.name in COMMUTATIVE and op.operands[0] != op.operands[1]:
            orders.append(op.operands[::-1])
        for operands in orders:
            values = dict(found.values)
            names, actual = (*pattern.results, *pattern.operands), (*op.results, *operands)
            wrong = _bind_values(names, actual, values, self.rule.optional)
            if wrong is None:
                yield Match(self.function, values, attrs, {**found.ops, index: op})
            else:
                self._record_miss(depth, f"{op.name} at {place} {wrong}")

    def _record_miss(self, depth: int, reason: str) -> None:
        if depth > self.depth:
            self.depth, self.reason = depth, reason


def _bind_values(
    names: Sequence[str | None], actual: Sequence[Value | None], values: dict, optional: Collection[str]
) -> str | None:
    """Bind names to values; return what does not fit, None if all does."""
    if len(names) != len(actual):
        return f"has {len(actual)} operands and results, the rule wants {len(names)}"
    for name, value in zip(names, actual, strict=True):
        if name is None and value is not None:
            return f"has the operand {value}, which the rule wants absent"
        if name is None:
            continue
        if value is None and name not in optional:
            return f"has no operand {name}"
        if values.setdefault(name, value) != value:
            return f"has {value} where the rule wants {values[name]}"
    return None


def _bind_attr(wanted: Any, given: Any, attrs: dict[str, Any]) -> bool:
    if isinstance(wanted, Var):
        return bool(attrs.setdefault(wanted.name, given) == given)
    if isinstance(wanted, (tuple, list)):
        fits = isinstance(given, tuple) and len(given) == len(wanted)
        return fits and all(_bind_attr(w, g, attrs) for w, g in zip(wanted, given, strict=True))
    return bool(wanted == given) and isinstance(wanted, bool) == isinstance(given, bool)
