"""Reads off masks of sparse attention which slots an indexer chose (DeepSeek-V3.2), so that kernels read no others.

A model marks the chosen slots in a mask: scattered trues, cut to the slots that there are, and another mask. What is
chosen are the indices of a top-k of scores, some of which a layer may have from the layer before: calls are looked into.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ....compiler.ir.module import Function, Module, Op, Value

_Origin = tuple[str, str]  # a value by its function and name


class Chosen(NamedTuple):
    """A mask taken apart: what else it asks, and the slots, i32 or i64 [B, S, J], distinct numbers.

    `best_first`: those that the rest of the mask lets a token read are in front of all others.
    """

    mask: Value
    slots: Value
    best_first: bool


@dataclass(frozen=True)
class ChosenSlots:
    """Finds out what a module knows of chosen slots, in every function."""

    module: Module
    _open: set[_Origin] = field(default_factory=set)

    def of_mask(self, function: Function, mask: Value) -> Chosen | None:
        """Return what a mask is made of; None where it does not mark slots that a top-k has chosen."""
        op = producer_named(function, mask, "core.logical_and")
        for rest, marks in (op.operands, op.operands[::-1]) if op else ():
            slots = marks and _marked_slots(function, marks, mask)
            if slots and rest and rest.type == mask.type and (scored := self._masks_of_scores(function, slots)):
                return Chosen(rest, slots, scored == {self._origin(function, rest)})
        return None

    def _masks_of_scores(self, function: Function, value: Value) -> set[_Origin] | None:
        """Return the masks under which the scores were whose top-k gave a value; None where it may be another value."""
        value = _as_made(function, value, "core.cast", "core.reshape")
        place = function.name, value.name
        if place in self._open:
            return set()
        self._open.add(place)
        try:
            if topk := producer_named(function, value, "core.topk"):
                mask = _mask_of_scores(function, topk) if value == topk.results[1] else None
                return {(mask and self._origin(function, mask)) or place} if value == topk.results[1] else None
            return self._union([self._masks_of_scores(f, v) for f, v in self._sources(function, value)])
        finally:
            self._open.remove(place)

    @staticmethod
    def _union(found: list[set[_Origin] | None]) -> set[_Origin] | None:
        sets = [masks for masks in found if masks is not None]
        return set[_Origin]().union(*sets) if sets and len(sets) == len(found) else None

    def _origin(self, function: Function, value: Value) -> _Origin:
        """Return where a value comes from: the same for all values that are surely the same."""
        value = _as_made(function, value, "core.reshape")
        if value.name in {p.name for p in function.params} and (given := self._sources(function, value)):
            origins = {self._origin(f, v) for f, v in given}
            if len(origins) == 1:
                return origins.pop()
        return function.name, value.name

    def _sources(self, function: Function, value: Value) -> list[tuple[Function, Value]]:
        """Return what a parameter is given in every call, or what a call's result is in the function that it calls."""
        op = function.producers.get(value.name)
        if op is not None:
            callee = self.module.by_name[op.callee] if op.callee else None
            return [(callee, callee.results[op.results.index(value)])] if callee else []
        places = [i for i, p in enumerate(function.params) if p.name == value.name]
        calls = [(f, op) for f in self.module.functions for op in f.ops if op.callee == function.name]
        return [(f, given) for f, op in calls for i in places if (given := op.operands[i])]


def producer_named(function: Function, value: Value, name: str, /, **attributes: Any) -> Op | None:
    """Return the op of a name and with these attributes that makes a value; None if another one does."""
    op = function.producers.get(value.name)
    if op is None or op.name != name:
        return None
    return op if all(op.settings[key] == wanted for key, wanted in attributes.items()) else None


def _as_made(function: Function, value: Value, *names: str) -> Value:
    """Return a value before ops of these names, which keep what it is here."""
    while (op := function.producers.get(value.name)) and op.name in names:
        value = op.inputs[0]
    return value


def _marked_slots(function: Function, marks: Value, mask: Value) -> Value | None:
    """Return the slots that are true among `marks`, which has the shape of a mask [B, S, T]; None for other values."""
    cut = producer_named(function, marks, "core.slice", axis=2, start=0, step=1)
    scatter = cut and producer_named(function, cut["x"], "core.scatter", axis=2)
    if scatter is None or marks.type != mask.type:
        return None
    nothing, index, true = scatter.inputs
    fills = [producer_named(function, v, "core.full", value=number) for v, number in ((nothing, 0.0), (true, 1.0))]
    if not all(fills):
        return None
    cast = producer_named(function, index, "core.cast")
    return cast["x"] if cast and cast["x"].type.dtype == "i32" else index


def _mask_of_scores(function: Function, topk: Op) -> Value | None:
    """Return the mask that is false only where scores are -inf, which are put in front of other -inf; None for others."""
    joined = producer_named(function, topk["x"], "core.concat", axis=2)
    if joined is None or len(joined.inputs) != 2 or not _is_lowest(function, joined.inputs[1]):
        return None
    where = producer_named(function, joined.inputs[0], "core.where")
    hidden = where and producer_named(function, where.inputs[0], "core.logical_not")
    return hidden["x"] if where and hidden and _is_lowest(function, where.inputs[1]) else None


def _is_lowest(function: Function, value: Value) -> bool:
    op = function.producers.get(value.name)
    return op is not None and op.name in ("core.full", "core.constant") and op.settings["value"] == float("-inf")
