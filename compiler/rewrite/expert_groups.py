"""Experts of one layer in several ops, so that each group of them can have a format of its own.

The gates of a token are written out for all experts; each group takes its columns, chooses among them as many as a token
can have there, and runs an op of its own. A choice with the gate 0 adds nothing, so that the sum of the groups is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..ir.module import Const, Function, Op, Value
from ..ir.recipes import Literal, Recipe, step
from ..ir.types import TensorType, make_attrs
from ..ops import OPS

Experts = tuple[int, ...]


def split_experts(function: Function, op: Op, groups: Sequence[Experts]) -> tuple[Function, list[Op]]:
    """Return the function with an op of routed experts as one op for each group, and those ops; groups cover all once."""
    x, ids, gates, *weights = op.operands
    assert x and ids and gates and weights[0]
    recipes = {c.value.name: c.recipe for c in function.consts}
    taken = set(function.names)
    ops: list[Op] = []
    consts: list[Const] = []

    def fresh(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    def add(name: str, *operands: Value | None, hint: str, **attrs: Any) -> tuple[Value, ...]:
        types = OPS[name].infer([v and v.type for v in operands], attrs)
        results = tuple(Value(fresh(f"{hint}.{i}" if i else hint), t) for i, t in enumerate(types))
        ops.append(Op(name, operands, results, make_attrs(attrs), loc=op.loc))
        return results

    base = op.results[0].name
    count = weights[0].type.sizes[0]
    (none,) = add("core.full", hint=f"{base}.none", shape=(ids.type.shape[0], count), value=0.0, dtype=gates.type.dtype)
    (dense,) = add("core.scatter", none, ids, gates, hint=f"{base}.gates", axis=1)
    total: Value | None = None
    made: list[Op] = []
    for number, group in enumerate(groups):
        index = Literal(TensorType.of("i64", len(group)), tuple(group))
        consts.append(Const(Value(fresh(f"{base}.group{number}"), index.type), index))
        (own,) = add("core.take", dense, consts[-1].value, hint=f"{base}.gates{number}", axis=1)
        # by size: a gate below 0 is a choice too, and not the 0 of an expert that was not chosen
        (size,) = add("core.abs", own, hint=f"{base}.sizes{number}")
        most = min(int(ids.type.shape[1]), len(group))
        _, chosen = add("core.topk", size, hint=f"{base}.ids{number}", axis=1, k=most)
        (mixing,) = add("core.gather", own, chosen, hint=f"{base}.mixing{number}", axis=1)
        held: list[Value | None] = []
        for value in weights:
            if value is None:
                held.append(None)
                continue
            recipe = _rows(recipes[value.name], group)
            consts.append(Const(Value(fresh(f"{value.name}.{number}"), recipe.type), recipe))
            held.append(consts[-1].value)
        (y,) = add(op.name, x, chosen, mixing, *held, hint=f"{base}.y{number}", **op.attributes)
        made.append(ops[-1])
        total = y if total is None else add("core.add", total, y, hint=f"{base}.sum{number}")[0]
    ops[-1] = replace(ops[-1], results=op.results)
    after = [o for old in function.ops for o in (ops if old is op else [old])]
    used = {v.name for o in after for v in o.inputs} | {v.name for v in function.results}
    kept = tuple(c for c in (*function.consts, *consts) if c.value.name in used)
    return replace(function, consts=kept, ops=tuple(after)), made


def _rows(recipe: Recipe, group: Experts) -> Recipe:
    """Return the recipe of some experts of a weight: its slices, put together where they are not neighbours."""
    spans: list[list[int]] = []
    for expert in group:
        if spans and spans[-1][1] == expert:
            spans[-1][1] += 1
        else:
            spans.append([expert, expert + 1])
    slices = [step("slice", recipe, axis=0, start=start, stop=stop) for start, stop in spans]
    return slices[0] if len(slices) == 1 else step("concat", *slices, axis=0)
