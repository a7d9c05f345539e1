"""An editor of one function, for changes that no pattern expresses: ops in their new order, and new weights.

`rewrite_ops` walks a function once and lets a table of functions replace single ops; they add what they need in front.
A function raises Refuse to leave its op as it is, and the reason becomes a note of `--why`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..errors import Refuse
from ..ir.dce import eliminate_dead_code
from ..ir.module import Function, Op, Value
from ..ir.names import Names
from ..ir.notes import Note, note_on, refusal_note
from ..ir.recipes import Recipe, Step
from ..ops.builder import IRBuilder
from ..weights.steps.table import step


class Editor(IRBuilder):
    """A function being rewritten: its ops so far, its weights, and the names that are taken."""

    def __init__(self, function: Function) -> None:
        """Start without ops; all names of the function are taken."""
        super().__init__(function.name, function.params, function.consts, Names(function.names))
        self.function = function
        self.notes: list[Note] = []

    def note(self, op: Op, text: str) -> None:
        """Record a note on an op."""
        self.notes.append(note_on(self.function, op, text))

    def weight(self, recipe: Recipe, hint: str) -> Value:
        """Return the weight with this recipe, added under a new name if it is missing."""
        found = next((c.value for c in self.consts.values() if c.recipe == recipe), None)
        return found or self.const(hint, recipe)

    def recipe(self, value: Value | None) -> Recipe:
        """Return the recipe of a weight; Refuse for a value that is not a weight."""
        const = self.consts.get(value.name) if value else None
        if const is None:
            raise Refuse(f"{value} is not a weight", *([value] if value else []))
        return const.recipe

    def finish(self) -> Function:
        """Return the function without ops and weights that nothing reads; the one before if nothing changed."""
        if tuple(self.ops) == self.function.ops:
            return self.function
        return eliminate_dead_code(replace(self.function, ops=tuple(self.ops), consts=tuple(self.consts.values())))


Rewrite = Callable[[Any, Op], Op]  # takes the editor and the op, returns the op that takes its place


def rewrite_ops(
    function: Function, rewrites: Mapping[str, Rewrite], owner: str, instead: Mapping[str, Rewrite] | None = None
) -> tuple[Function, list[Note]]:
    """Return the function with every op replaced whose name is in `rewrites`, and notes.

    An op that is refused stays, or becomes what `instead` makes of it; the notes give the reason, for `owner`.
    """
    editor, refused = Editor(function), []
    for op in function.ops:
        editor.loc = op.loc
        rewrite = rewrites.get(op.name)
        kept = len(editor.ops)
        try:
            new = rewrite(editor, op) if rewrite else op
        except Refuse as reason:
            del editor.ops[kept:]
            refused.append(refusal_note(f"{owner} of {op.name}", function, op, reason))
            other = (instead or {}).get(op.name)
            new = other(editor, op) if other else op
        editor.ops.append(new)
    return editor.finish(), [*refused, *editor.notes]


def join_recipes_along(*recipes: Recipe, axis: int) -> Recipe:
    """Return recipes put together along an axis; a cast that all of them end in is done once, at the end."""
    casts = {r.attributes["to"] if isinstance(r, Step) and r.name == "cast" else None for r in recipes}
    inner = [r.items[0] for r in recipes if isinstance(r, Step) and r.name == "cast"]
    if len(casts) == 1 and len(inner) == len(recipes) and len({r.type.dtype for r in inner}) == 1:
        return step("cast", step("concat", *inner, axis=axis), to=casts.pop())
    return step("concat", *recipes, axis=axis)
