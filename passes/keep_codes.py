"""Stores the weights of quantized checkpoints with the codes of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..compiler.formats.format import Format
from ..compiler.formats.table import GROUPS, format_of
from ..compiler.ir.dce import eliminate_dead_code
from ..compiler.ir.module import Const, Function, Module, Op, Value
from ..compiler.ir.notes import Note, Rewritten, note_on
from ..compiler.ir.recipes import Recipe, steps_of
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.roles import weight_roles
from ..compiler.weights.kept_codes import Codes, NotKept, exact_formats, is_stored_quantized, pack_codes, take_apart
from ..compiler.weights.steps.table import step

Stored = Mapping[int, tuple[Recipe, Format]]  # an operand of an op -> its recipe and its format

NEAREST_BITS = 8  # of the format for weights whose codes no format holds
_UNGROUPED = 128  # the group of weights whose columns each have a scale of their own


@pass_(reads="moe", rounds=True)
def keep_codes(module: Module, target: Any) -> Rewritten:
    """Store the weights of a quantized checkpoint in the smallest format that the target runs and that holds their codes.

    Where no format holds the codes of all weights of an op, those that have none are quantized again, to 8 bits in the
    groups that they had. Weights that are not quantized in the checkpoint stay as they are.
    """
    notes: list[Note] = []
    functions = {}
    for function, roles in ((f, weight_roles(module)[f.name]) for f in module.functions):
        recipes = {c.value.name: c.recipe for c in function.consts}
        places: dict[int, dict[int, Recipe]] = {}
        for i, k in roles:
            places.setdefault(i, {})[k] = recipes[function.ops[i][k].name]
        chosen = {}
        for i, weights in places.items():
            if any(map(is_stored_quantized, weights.values())):
                chosen[i], reason = _choose_storage(function.ops[i], weights, target)
                names = ", ".join(str(function.ops[i].operands[k]) for k in weights)
                notes.append(note_on(function, function.ops[i], f"{names}{reason}"))
        functions[function.name] = _store_weights(function, {i: stored for i, stored in chosen.items() if stored})
    return Rewritten(module.with_functions(functions), tuple(notes))


def _choose_storage(op: Op, weights: Mapping[int, Recipe], target: Any) -> tuple[Stored, str]:
    """Return how the weights of an op are stored (nothing where they stay as they are), and what to report of them."""
    found: dict[int, Codes] = {}
    reasons: list[str] = []
    for k, recipe in weights.items():
        try:
            found[k] = _by_rows(recipe)
        except NotKept as error:
            reasons.append(f"{op.operands[k]}: {error}")
    exact = {k: [f for f in exact_formats(codes) if not _why_not_held(op, f, target)] for k, codes in found.items()}
    common = [f for f in next(iter(exact.values()), []) if all(f in formats for formats in exact.values())]
    if common and len(found) == len(weights):
        names = ", ".join(sorted({codes.name for codes in found.values()}))
        stored = {k: (pack_codes(codes, common[0]), common[0]) for k, codes in found.items()}
        return stored, f" keep the codes of the checkpoint, {names}, as {common[0].name}"
    if not all(map(is_stored_quantized, weights.values())):
        return {}, f": {'; '.join(reasons)}; they stay f32"
    nearest = _nearest_integers(op, weights, target)
    reason = (
        "; ".join(reasons) or f"no format of the target holds {', '.join(sorted({c.name for c in found.values()}))}"
    )
    if nearest is None:
        return {}, f": {reason}; no group divides their rows, they stay f32"
    stored = {
        k: (
            pack_codes(found[k], nearest) if nearest in exact.get(k, ()) else step("quantize", recipe, to=nearest.name),
            nearest,
        )
        for k, recipe in weights.items()
    }
    return stored, f": {reason}; stored as {nearest.name}, which is near and not the same"


def _by_rows(recipe: Recipe) -> Codes:
    """Return the codes of a weight that share scales along its rows."""
    found = take_apart(recipe)
    if found.axis != len(recipe.type.shape) - 1:
        raise NotKept("its codes share scales across rows, and formats along them")
    return found


def _why_not_held(op: Op, format: Format, target: Any) -> str:
    return "" if target is None else target.formats.holds(op, format) or ""


def _nearest_integers(op: Op, weights: Mapping[int, Recipe], target: Any) -> Format | None:
    """Return the integers of 8 bits whose groups are those of the checkpoint, or the largest below them that fit."""
    wanted = min(map(_source_group, weights.values()))
    for group in reversed(GROUPS):
        if group <= wanted and not any(recipe.type.sizes[-1] % group for recipe in weights.values()):
            format = format_of(f"int{NEAREST_BITS}_g{group}")
            if not _why_not_held(op, format, target):
                return format
    return None


def _source_group(recipe: Recipe) -> int:
    """Return how many columns share a scale in the checkpoint."""
    block: Any = next(s.attributes["block"] for s in steps_of(recipe) if s.name == "dequantize")
    group = int(max(block[-2:]))
    return group if group > 1 else _UNGROUPED


def _store_weights(function: Function, chosen: Mapping[int, Stored]) -> Function:
    """Return the function with other weights at operands; a weight that two ops hold in two formats becomes two."""
    if not chosen:
        return function
    consts = {c.value.name: c for c in function.consts}
    formats: dict[str, list[str]] = {}
    for i, stored in chosen.items():
        for k, (_, format) in stored.items():
            formats.setdefault(function.ops[i][k].name, []).append(format.name)
    unchanged = _names_left(function, chosen)
    ops = list(function.ops)
    for i, stored in chosen.items():
        operands = list(ops[i].operands)
        for k, (recipe, format) in stored.items():
            old = function.ops[i][k].name
            alone = set(formats[old]) == {format.name} and old not in unchanged
            value = Value(old if alone else f"{old}.{format.name}", recipe.type)
            consts[value.name] = Const(value, recipe)
            operands[k] = value
        ops[i] = replace(ops[i], operands=tuple(operands))
    return eliminate_dead_code(replace(function, consts=tuple(consts.values()), ops=tuple(ops)))


def _names_left(function: Function, chosen: Mapping[int, Stored]) -> set[str]:
    """Return the names that some op still reads as they were."""
    kept = {
        v.name
        for i, op in enumerate(function.ops)
        for k, v in enumerate(op.operands)
        if v and k not in chosen.get(i, {})
    }
    return kept | {v.name for v in function.results}
