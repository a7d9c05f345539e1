"""Rewrite rules: two programs in IR syntax and a guard.

    @rule(
        before=\"\"\"
          %g = core.linear(%x, %w, _)
          %h = core.silu(%g)
        \"\"\",
        after="%h = moe.something(%x, %w) {act=silu}")
    def gate_into_linear(m, target):
        \"\"\"Apply the activation while the product is written.\"\"\"
        if m.w.type.dtype != "f32":
            raise Refuse("the weight is not f32", m.w)

What a pattern says: names stand for values (equal names for equal values), `_` for an absent operand, a capitalised
bare attribute for any attribute (bound as `m.E`), another attribute for itself; attributes left out are free.
Matching starts at the last statement of `before`; commutative ops match in both orders. A name on both sides keeps
its value, and its type must stay. A value that disappears must not be used elsewhere: the matcher refuses by itself.
Exceptions are constants and what the rule calls `shared`; they stay as long as another op reads them. An operand
that the rule calls `optional` may be absent, on both sides.
The guard may return more bindings for `after`: attributes, values, or recipes (each becomes a new weight).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import MoecError, Refuse
from ..ir.dce import eliminate_dead_code
from ..ir.fragments import Var
from ..ir.module import Function, Module, Op, Value
from ..ir.names import Names
from ..ir.notes import Note, Rewritten, distinct_notes, refusal_note
from ..ir.recipes import Literal, Step, Tensor
from ..ops.builder import IRBuilder
from .declare import PassDef, pass_
from .patterns import Match, Rule, Search, rule

__all__ = ["Match", "Refuse", "Rule", "apply_rules", "in_order", "rule"]


def _removed_ops(owner: Rule, match: Match) -> list[Op]:
    """Return the matched ops that the rule takes away; Refuse where a value that disappears is read elsewhere."""
    defined = {n for p in owner.after for n in p.results}
    read = {n for p in owner.after for n in p.operands if n} - defined
    disappearing = [
        (match.ops[i], p) for i, p in enumerate(owner.before) if not owner.may_stay(p) and not read & set(p.results)
    ]
    inside = {id(op) for op, _ in disappearing}
    for op, pattern in disappearing:
        for name, value in zip(pattern.results, op.results, strict=True):
            if name not in defined and any(id(u) not in inside for u in match.function.uses.get(value.name, [])):
                raise Refuse(f"{value} is also used outside the pattern", value)
    return [op for op, _ in disappearing]


@dataclass
class _RightSide:
    """The right side being made: names in the pattern -> values in the function."""

    builder: IRBuilder
    values: dict[str, Value | None]
    attrs: dict[str, Any]
    unsaid: Collection[str] = ()  # attributes that are bound to a default

    def bind(self, name: str, given: Any) -> None:
        """Take one of the guard's bindings: a value, None for an absent one, a recipe (a new weight), or an attribute."""
        if given is None or isinstance(given, Value):
            self.values[name] = given
        elif isinstance(given, (Tensor, Literal, Step)):
            self.values[name] = self.builder.const(name, given)
        else:
            self.attrs[name] = given


def _build_after(owner: Rule, side: _RightSide) -> list[Op]:
    for statement in owner.after:
        unbound = [n for n in statement.operands if n and n not in side.values]
        if unbound:
            raise MoecError(f"rule {owner.name}: nothing binds %{unbound[0]} of `after`", exit_code=1)
        operands = (side.values[n] if n else None for n in statement.operands)
        given = {n: v for n, v in statement.attrs.items() if not (isinstance(v, Var) and v.name in side.unsaid)}
        attrs = {name: _fill_variables(owner, value, side.attrs) for name, value in given.items()}
        hints = [side.values.get(name) or name for name in statement.results]
        try:
            results = side.builder.add_all(statement.name, *operands, hints=hints, **attrs)
        except MoecError as error:
            place = ", ".join(side.builder.loc)
            raise replace(error, what=f"rule {owner.name}: {error.what}", model=place, exit_code=1) from None
        side.values |= zip(statement.results, results, strict=True)
    return side.builder.ops


def _omitted_attributes(owner: Rule, match: Match) -> set[str]:
    """Return the pattern variables of attributes that the matched op leaves out, and of the same name on both sides."""
    left_out = {
        v.name: n
        for i, op in match.ops.items()
        for n, v in owner.before[i].attrs.items()
        if isinstance(v, Var) and n not in op.attributes
    }
    others = {
        v.name for p in owner.after for n, v in p.attrs.items() if isinstance(v, Var) and left_out.get(v.name) != n
    }
    return set(left_out) - others


def _fill_variables(owner: Rule, value: Any, attrs: Mapping[str, Any]) -> Any:
    if isinstance(value, Var):
        if value.name not in attrs:
            raise MoecError(f"rule {owner.name}: nothing binds {value.name} of `after`", exit_code=1)
        return attrs[value.name]
    return tuple(_fill_variables(owner, v, attrs) for v in value) if isinstance(value, (tuple, list)) else value


def _replace_match(owner: Rule, match: Match, removed: list[Op], extra: Mapping[str, Any]) -> Function:
    function = match.function
    gone = {id(op) for op in removed}
    matched = [op for op in function.ops if any(op is m for m in match.ops.values())]
    loc = tuple(dict.fromkeys(text for op in matched if op.inputs or len(matched) == 1 for text in op.loc))
    builder = IRBuilder(function.name, consts=function.consts, names=Names(function.names))
    builder.loc = loc
    side = _RightSide(builder, dict(match.values), dict(match.attrs), _omitted_attributes(owner, match) - set(extra))
    for name, given in extra.items():
        side.bind(name, given)
    new = _build_after(owner, side)
    ops: list[Op] = []
    for op in function.ops:
        if id(op) not in gone:
            ops.append(op)
        if op is matched[-1]:
            ops += new
    return eliminate_dead_code(replace(function, consts=tuple(builder.consts.values()), ops=in_order(tuple(ops))))


def in_order(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """Return ops with definitions before uses, otherwise in the given order; Refuse where that cannot be."""
    position = {v.name: i for i, op in enumerate(ops) for v in op.results}
    edges = [(position[v.name], i) for i, op in enumerate(ops) for v in op.inputs if v.name in position]
    if all(a < b for a, b in edges):
        return ops
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(ops)))
    graph.add_edges_from(edges)
    try:
        return tuple(ops[i] for i in networkx.lexicographical_topological_sort(graph))
    except networkx.NetworkXUnfeasible:
        raise Refuse("a value between two matched ops depends on one and feeds the other") from None


# --- applying --------------------------------------------------------------------------------------------------


def apply_rules(module: Module, target: Any, rules: Sequence[Rule]) -> Rewritten:
    """Apply rules to every function until none fires; return the module (the same one if none did) and notes.

    There is a note for each rule that nearly applied: its guard refused, or at least half of `before` matched.
    MoecError where the rules do not come to an end.
    """
    found = {f.name: _rewrite_to_fixpoint(f, target, rules) for f in module.functions}
    notes = distinct_notes(note for _, notes in found.values() for note in notes)
    return Rewritten(module.with_functions({name: function for name, (function, _) in found.items()}), notes)


def _rewrite_to_fixpoint(function: Function, target: Any, rules: Sequence[Rule]) -> tuple[Function, list[Note]]:
    bound = 10 * max(10, len(function.ops))
    for _ in range(bound):
        rewritten, fired, notes = _rewrite_once(function, target, rules)
        if rewritten is None:
            return function, notes
        function = rewritten
    raise MoecError(
        f"rules do not come to an end: {bound} rewrites of @{function.name}, the last one by {fired}", exit_code=1
    )


def _rewrite_once(function: Function, target: Any, rules: Sequence[Rule]) -> tuple[Function | None, str, list[Note]]:
    """Return the function after the first rewrite that applies, and the rule's name; None and notes if none applies."""
    notes: list[Note] = []
    for owner in rules:
        for root in function.ops:
            if root.name != owner.before[-1].name:
                continue
            search = Search(owner, function)
            rewritten, refused = _try_root(search, root, target)
            if rewritten is not None:
                return rewritten, owner.name, []
            near = search.depth >= 2 and 2 * search.depth >= len(owner.before)
            reason = refused or (search.reason if near else "")
            if reason:
                matched = 1.0 if refused else search.depth / len(owner.before)
                notes.append(refusal_note(owner.name, function, root, reason, matched))
    return None, "", notes


def _try_root(search: Search, root: Op, target: Any) -> tuple[Function | None, str | Refuse]:
    refusal: str | Refuse = ""
    for match in search.matches(root):
        try:
            removed = _removed_ops(search.rule, match)
            extra = search.rule.guard(match, target) or {}
            return _replace_match(search.rule, match, removed, extra), ""
        except Refuse as refused:
            refusal = refusal or refused
    return None, refusal


def pass_of_rule(owner: Rule) -> PassDef:
    """Return the pass of a rule's name that applies it wherever it can, at any stage."""

    def apply_rule(module: Module, target: Any) -> Rewritten:
        return apply_rules(module, target, (owner,))

    return replace(pass_()(apply_rule), name=owner.name.replace("_", "-"), doc=owner.doc)
