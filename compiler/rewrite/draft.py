"""An editor of one function, for changes that no pattern expresses: ops in their new order, and new weights.

`rewrite_ops` walks a function once and lets a table of functions replace single ops; they add what they need in front.
A function raises Refuse to leave its op as it is, and the reason becomes a note of `--why`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import Refuse
from ..ir.module import Const, Function, Op, Value
from ..ir.recipes import Recipe, Step, step
from ..ir.types import Attr, make_attrs
from ..ops import OPS
from .rules import Note


@dataclass
class Draft:
    """A function being rewritten: its ops so far, its weights, and the names that are taken."""

    function: Function
    ops: list[Op] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    consts: dict[str, Const] = field(init=False)
    taken: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.consts = {c.value.name: c for c in self.function.consts}
        self.taken = set(self.function.names)

    def note(self, op: Op, text: str) -> None:
        """Remember something to be said of an op under --why."""
        self.notes.append(f"note: @{self.function.name} {', '.join(op.loc)}: {text}")

    def fresh(self, base: str) -> str:
        """Return a free name: `base`, `base.1`, ..."""
        name, number = base, 1
        while name in self.taken:
            name, number = f"{base}.{number}", number + 1
        self.taken.add(name)
        return name

    def add(self, name: str, *operands: Value | None, hint: str, loc: tuple[str, ...], **attrs: Attr) -> Value:
        """Add an op with one result and return it."""
        (value,) = self.add_all(name, *operands, hints=(hint,), loc=loc, **attrs)
        return value

    def add_all(
        self, name: str, *operands: Value | None, hints: tuple[str, ...], loc: tuple[str, ...], **attrs: Attr
    ) -> tuple[Value, ...]:
        """Add an op and return its results, named as `hints` say."""
        types = OPS[name].infer([None if v is None else v.type for v in operands], attrs)
        results = tuple(Value(self.fresh(hint), type_) for hint, type_ in zip(hints, types, strict=True))
        self.ops.append(Op(name, operands, results, make_attrs(attrs), loc=loc))
        return results

    def weight(self, recipe: Recipe, hint: str) -> Value:
        """Return the weight with this recipe, added under a new name if it is missing."""
        for const in self.consts.values():
            if const.recipe == recipe:
                return const.value
        value = Value(self.fresh(hint), recipe.type)
        self.consts[value.name] = Const(value, recipe)
        return value

    def recipe(self, value: Value | None) -> Recipe:
        """Return the recipe of a weight; Refuse for a value that is not a weight."""
        const = self.consts.get(value.name) if value else None
        if const is None:
            raise Refuse(f"{value} is not a weight", *([value] if value else []))
        return const.recipe

    def finish(self) -> Function:
        """Return the function without ops and weights that nothing reads; the one before if nothing changed.

        A result that two ops make is that of the later one: a fused op takes over the results of those it replaces.
        """
        if tuple(self.ops) == self.function.ops:
            return self.function
        made: set[str] = set()
        ops: list[Op] = []
        needed = {v.name for v in self.function.results}
        for op in reversed(self.ops):
            names = {v.name for v in op.results}
            if names & needed and not names <= made:
                ops.append(op)
                made |= names
                needed |= {v.name for v in op.inputs}
        consts = tuple(c for c in self.consts.values() if c.value.name in needed)
        return replace(self.function, ops=tuple(reversed(ops)), consts=consts)


Rewrite = Callable[[Any, Op], Op]  # takes the draft and the op, returns the op that takes its place


def rewrite_ops(
    draft: Draft, rewrites: Mapping[str, Rewrite], owner: str, notes: list[str], instead: Mapping[str, Rewrite] | None = None
) -> Function:  # fmt: skip
    """Return the draft's function with every op replaced whose name is in `rewrites`.

    An op that is refused stays, or becomes what `instead` makes of it; `notes` gets the reason, said by `owner`.
    """
    for op in draft.function.ops:
        rewrite = rewrites.get(op.name)
        kept = len(draft.ops)
        try:
            new = rewrite(draft, op) if rewrite else op
        except Refuse as refusal:
            del draft.ops[kept:]
            notes.append(Note(f"{owner} of {op.name}", draft.function.name, op, refusal))
            other = (instead or {}).get(op.name)
            new = other(draft, op) if other else op
        draft.ops.append(new)
    notes += draft.notes
    return draft.finish()


def join(*recipes: Recipe, axis: int) -> Recipe:
    """Return recipes put together along an axis; a cast that all of them end in is done once, at the end."""
    casts = {r.attributes["to"] if isinstance(r, Step) and r.name == "cast" else None for r in recipes}
    inner = [r.items[0] for r in recipes if isinstance(r, Step) and r.name == "cast"]
    if len(casts) == 1 and len(inner) == len(recipes) and len({r.type.dtype for r in inner}) == 1:
        return step("cast", step("concat", *inner, axis=axis), to=casts.pop())
    return step("concat", *recipes, axis=axis)
