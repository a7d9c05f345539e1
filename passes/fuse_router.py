"""Fuses the ops between a router's logits and its experts into one moe.route.

A few rules bring other spellings into one form. Then each router is read backwards from what its experts get, see
`routing`; the first op that does not fit is named under --why, and stays outside with what follows it where it can.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any

from ..compiler.errors import Refuse
from ..compiler.ir.module import Function, Module, Op, Value
from ..compiler.ir.notes import Note, Rewritten
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.routing import Router
from ..compiler.rewrite.rules import Match, apply_rules, rule
from .cleanup import cleanup


@pass_(reads="moe")
def fuse_router(module: Module, target: Any) -> Rewritten:
    """Fuse every routing scheme into moe.route: scores, bias, groups, choice, weights and their normalisation."""
    spelled = apply_rules(module, target, SPELLINGS).module
    if spelled is not module:
        spelled = cleanup(spelled, target)  # so that what is the same is one value again
    fused = {f.name: _fuse_all(f) for f in spelled.functions}
    functions = {name: function for name, (function, _) in fused.items()}
    return Rewritten(spelled.with_functions(functions), tuple(note for _, notes in fused.values() for note in notes))


# --- other spellings of the same -------------------------------------------------------------------------------


@rule(
    before="""
      %s = core.sigmoid(%x)
      %y = core.slice(%s) {axis=Axis, start=Start, stop=Stop, step=1}
    """,
    after="""
      %part = core.slice(%x) {axis=Axis, start=Start, stop=Stop}
      %y = core.sigmoid(%part)
    """,
)
def slice_before_sigmoid(m: Match, target: Any) -> None:
    """Score only the logits that are wanted (Inkling's routed experts, whose logits lie beside those of shared ones)."""


@rule(
    before="""
      %low = core.full() {dtype=Dtype, shape=Shape, value=Low}
      %wide = core.scatter(%low, %ids, %top) {axis=Axis}
      %y = core.sigmoid(%wide)
    """,
    after="""
      %w = core.sigmoid(%top)
      %zero = core.full() {dtype=Dtype, shape=Shape, value=0.0}
      %y = core.scatter(%zero, %ids, %w) {axis=Axis}
    """,
)
def score_before_scatter(m: Match, target: Any) -> None:
    """Score the chosen logits before they are spread over all experts (Llama 4)."""
    if m.Low != -inf:
        raise Refuse(f"experts that were not chosen score sigmoid({m.Low}), not 0")


def _far_pattern(best: str, step: str) -> str:
    """Return the part of SparseMixer's text that finds the logits too far below the best one."""
    return f"""
      %gap{step} = core.sub({best}, %logits)
      %factor{step} = core.maximum(%size, {best})
      %part{step} = core.div(%gap{step}, %factor{step})
      %far{step} = core.gt(%part{step}, %limit{step})
    """


@rule(
    before=f"""
      %size = core.abs(%logits)
      %best1, %id1 = core.topk(%logits) {{axis=1, k=1}}
      {_far_pattern("%best1", "1")}
      %near1 = core.where(%far1, %low1, %logits)
      %soft1 = core.softmax(%near1) {{axis=1}}
      %gate1 = core.gather(%soft1, %id1) {{axis=1}}
      %left = core.scatter(%logits, %id1, %gone) {{axis=1}}
      %best2, %id2 = core.topk(%left) {{axis=1, k=1}}
      {_far_pattern("%best2", "2")}
      %near2 = core.where(%far2, %low2, %left)
      %soft2 = core.softmax(%near2) {{axis=1}}
      %gate2 = core.gather(%soft2, %id2) {{axis=1}}
      %ids = core.concat(%id1, %id2) {{axis=1}}
      %gates = core.concat(%gate1, %gate2) {{axis=1}}
    """,
    after="%gates, %ids = moe.route(%logits, _, _, _) {k=2, score=sparsemixer, jitter=Jitter}",
)
def sparsemixer(m: Match, target: Any) -> dict[str, float]:
    """Read two choices, each weighted by the softmax of the logits near its own, as one routing (PhiMoE)."""
    if any(m.number(name) != -inf for name in ("low1", "low2", "gone")):
        raise Refuse("what is masked does not get -inf")
    limit = m.number("limit1")
    if limit is None or limit != m.number("limit2"):
        raise Refuse("the two thresholds are not one number", m.limit1, m.limit2)
    return {"Jitter": float(limit) / 2}


SPELLINGS = (slice_before_sigmoid, score_before_scatter, sparsemixer)


# --- finding routers -------------------------------------------------------------------------------------------


def _fuse_all(function: Function) -> tuple[Function, list[Note]]:
    """Fuse the routers of a function; one at a time, since each changes the ops."""
    notes: list[Note] = []
    done: set[tuple[Value, Value]] = set()
    while root := next((r for r in _gates_and_ids(function) if r[:2] not in done), None):
        gates, ids, reader = root
        done.add((gates, ids))
        function, refused, reason = _fuse_router_before(function, gates, ids, reader)
        if reason and reader and reader.name in ("moe.experts", "moe.combine"):
            loc = reader.loc or (reader.name,)
            notes.append(Note(reason, function.name, loc, str(reader.results[0]), refused))
    return function, notes


def _gates_and_ids(function: Function) -> Iterator[tuple[Value, Value, Op | None]]:
    """Yield weights and indices that are read together: by experts or their sum, by a spread over all, by the caller."""
    for op in function.ops:
        spread = op.name == "core.scatter" and op.attributes["axis"] == 1 and len(op.inputs[1].type.shape) == 2
        if spread or op.name == "moe.experts":
            yield op.inputs[2], op.inputs[1], op
        if op.name == "moe.combine":
            made, sorted_ = (function.producers.get(v.name) for v in op.inputs[1:3])
            weighed = made is None or made.name != "core.full"  # rows that are sorted only have gates of 1
            if weighed and sorted_ and sorted_.name == "moe.dispatch":
                yield op.inputs[1], sorted_.inputs[1], op
    for ids in function.results:
        for gates in function.results:
            if ids.type.dtype == "i64" and gates.type.dtype != "i64" and gates.type.shape == ids.type.shape:
                yield gates, ids, None


def _fuse_router_before(function: Function, gates: Value, ids: Value, reader: Op | None) -> tuple[Function, str, str]:
    """Return the function with one router fused, from as near to its reader as can be read; what was refused, and why."""
    first: Refuse | None = None
    for inner_ids in _values_before(function, ids):
        for inner_gates in _values_before(function, gates):
            op = function.producers.get(inner_gates.name)
            if op and op.name == "moe.route" and op.results[1] == inner_ids:
                return function, "", ""  # fused already
            try:
                router = Router(function, inner_gates, inner_ids)
                router.read()
                fused = router.with_route(reader)
            except Refuse as refusal:
                first = first or refusal
                continue
            return fused, f"fuse-router leaves what follows {inner_gates}", first.reason if first else ""
    assert first
    return function, "fuse-router not applied", first.reason


def _values_before(function: Function, value: Value) -> Iterator[Value]:
    """Yield a value, then the values of its type that it is made of, nearest first."""
    queue = [value]
    for made in queue:
        if made.type == value.type:
            yield made
        op = function.producers.get(made.name)
        if op is not None and not op.callee:
            queue += [v for v in op.inputs if v.type.dtype == value.type.dtype and v not in queue]
