"""Fuses slices that cut a value into parts into one op."""

from __future__ import annotations

from dataclasses import replace

from ....compiler.ir.module import Function, Op
from ....compiler.ir.types import make_attrs

Cut = tuple[int, int]  # start, stop


def join_slices(function: Function) -> Function:
    """Return the function with one ort.split for slices that together are a whole axis; itself if there are none."""
    groups: dict[tuple[str, int], list[tuple[Cut, Op]]] = {}
    for op in function.ops:
        if op.name == "core.slice" and (cut := _slice_bounds(op)):
            groups.setdefault((op.inputs[0].name, op.attributes.integer("axis")), []).append((cut, op))
    first: dict[int, Op] = {}
    gone: set[int] = set()
    for (_, axis), cuts in groups.items():
        split = _split_of_slices(axis, cuts)
        if split is not None:
            first[id(cuts[0][1])] = split
            gone |= {id(op) for _, op in cuts[1:]}
    if not first:
        return function
    return replace(function, ops=tuple(first.get(id(op), op) for op in function.ops if id(op) not in gone))


def _slice_bounds(op: Op) -> Cut | None:
    """Return the bounds of a slice without steps whose bounds are numbers."""
    start, stop = op.attributes["start"], op.attributes["stop"]
    if isinstance(start, int) and isinstance(stop, int) and op.settings["step"] == 1:
        return start, stop
    return None


def _split_of_slices(axis: int, cuts: list[tuple[Cut, Op]]) -> Op | None:
    """Return the op that makes all the slices, if each starts where another ends and nothing is left over."""
    ordered = sorted(cuts, key=lambda item: item[0])
    sizes = [stop - start for (start, stop), _ in ordered]
    ends = [0, *(stop for (_, stop), _ in ordered)]
    whole = ordered[0][1].inputs[0].type.shape[axis]
    if len(cuts) < 2 or [start for (start, _), _ in ordered] != ends[:-1] or ends[-1] != whole or 0 in sizes:
        return None
    loc = tuple(dict.fromkeys(text for _, op in ordered for text in op.loc))
    results = tuple(op.results[0] for _, op in ordered)
    attrs = make_attrs({"axis": axis, "sizes": tuple(sizes)})
    return Op("ort.split", ordered[0][1].operands, results, attrs, loc=loc)
