"""Experts of one layer in several ops, so that each group of them can have a format of its own.

The gates of a token are written out for all experts; each group takes its columns, chooses among them as many as a token
can have there, and runs an op of its own. A choice with the gate 0 adds nothing, so that the sum of the groups is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir.module import Function, Op, Value
from ..ir.recipes import Literal, Recipe
from ..ir.types import TensorType
from ..weights.steps.table import step
from .editor import Editor

Experts = tuple[int, ...]


def split_experts(function: Function, op: Op, groups: Sequence[Experts]) -> tuple[Function, list[Op]]:
    """Return the function with an op of routed experts as one op for each group, and those ops; groups cover all once."""
    x, ids, gates, weights = op["x"], op["ids"], op["gates"], op.operands[3:]
    editor = Editor(function)
    editor.loc = op.loc
    base = op.results[0].name
    count = op["up"].type.sizes[0]
    none = editor.add(
        "core.full", hint=f"{base}.none", shape=(ids.type.shape[0], count), value=0.0, dtype=gates.type.dtype
    )
    dense = editor.add("core.scatter", none, ids, gates, hint=f"{base}.gates", axis=1)
    total: Value | None = None
    made: list[Op] = []
    for number, group in enumerate(groups):
        index = editor.const(f"{base}.group{number}", Literal(TensorType.of("i64", len(group)), tuple(group)))
        own = editor.add("core.take", dense, index, hint=f"{base}.gates{number}", axis=1)
        # by size: a gate below 0 is a choice too, and not the 0 of an expert that was not chosen
        size = editor.add("core.abs", own, hint=f"{base}.sizes{number}")
        most = min(int(ids.type.shape[1]), len(group))
        hints = (f"{base}.ids{number}", f"{base}.ids{number}.1")
        _, chosen = editor.add_all("core.topk", size, hints=hints, axis=1, k=most)
        mixing = editor.add("core.gather", own, chosen, hint=f"{base}.mixing{number}", axis=1)
        held = [v and editor.const(f"{v.name}.{number}", _slices_of_experts(editor.recipe(v), group)) for v in weights]
        y = editor.add(op.name, x, chosen, mixing, *held, hint=f"{base}.y{number}", **op.attributes)
        made.append(editor.ops[-1])
        total = y if total is None else editor.add("core.add", total, y, hint=f"{base}.sum{number}")
    editor.ops[-1] = replace(editor.ops[-1], results=op.results)
    at = next(i for i, old in enumerate(function.ops) if old is op)
    editor.ops = [*function.ops[:at], *editor.ops, *function.ops[at + 1 :]]
    return editor.finish(), made


def _slices_of_experts(recipe: Recipe, group: Experts) -> Recipe:
    """Return the recipe of some experts of a weight: its slices, put together where they are not neighbours."""
    spans: list[list[int]] = []
    for expert in group:
        if spans and spans[-1][1] == expert:
            spans[-1][1] += 1
        else:
            spans.append([expert, expert + 1])
    slices = [step("slice", recipe, axis=0, start=start, stop=stop) for start, stop in spans]
    return slices[0] if len(slices) == 1 else step("concat", *slices, axis=0)
