"""Infers facts about values without running the program: they are 0 or more, they differ along the last axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....compiler.ir.module import Function, Op, Value
from ....compiler.ir.recipes import Literal

_ALWAYS = {
    "core.softmax", "core.sigmoid", "core.exp", "core.relu", "core.abs", "core.softplus", "core.sqrt", "core.rsqrt",
}  # fmt: skip
# ops whose result is 0 or more when these operands are
_WHEN: dict[str, Callable[[Op], tuple[Value, ...]]] = {
    **dict.fromkeys(
        ("core.cast", "core.reshape", "core.transpose", "core.slice", "core.expand", "core.gather", "core.take",
         "core.sum", "core.mean", "core.amax", "core.cumsum", "core.floor", "core.reciprocal", "core.pow"),
        lambda op: op.inputs[:1],
    ),
    **dict.fromkeys(
        ("core.add", "core.mul", "core.div", "core.minimum", "core.concat"), lambda op: op.inputs
    ),
    "core.where": lambda op: op.inputs[1:],
    **dict.fromkeys(("core.scatter", "core.scatter_add"), lambda op: (op.inputs[0], op.inputs[2])),
}  # fmt: skip


def not_negative(function: Function, value: Value) -> bool:
    """Return whether a value can be shown to be 0 or more in every element (or NaN); False means not known."""
    known: dict[str, bool] = {}

    def visit(value: Value) -> bool:
        if value.name not in known:
            known[value.name] = _not_negative(function, value, visit)
        return known[value.name]

    return visit(value)


def _not_negative(function: Function, value: Value, visit: Callable[[Value], bool]) -> bool:
    op = function.producers.get(value.name)
    if op is None:
        recipe = next((c.recipe for c in function.consts if c.value.name == value.name), None)
        return isinstance(recipe, Literal) and all(v >= 0 for v in recipe.values)
    attributes: dict[str, Any] = op.attributes
    match op.name:
        case name if name in _ALWAYS:
            return True
        case "core.constant" | "core.full":
            return attributes["value"] >= 0
        case "core.topk":
            return value == op.results[0] and visit(op.inputs[0])
        case "moe.route":
            return value == op.results[0] and _route_not_negative(op, visit)
        case "core.maximum":
            return any(map(visit, op.inputs))
        case "core.clamp":
            return attributes.get("max", 0.0) >= 0 and (attributes.get("min", -1.0) >= 0 or visit(op.inputs[0]))
        case name if name in _WHEN:
            return all(map(visit, _WHEN[name](op)))
    return False


def _route_not_negative(op: Op, visit: Callable[[Value], bool]) -> bool:
    a = op.settings
    bias, expert_scale = op.get("bias"), op.get("expert_scale")
    if a.number("scale") < 0 or (expert_scale and not visit(expert_scale)):
        return False
    scored = a["score"] != "identity" and a["weigh"] != "logits"
    if scored and (a["weigh"] == "scores" or a["order"] == "select_score"):
        return True
    if not scored and not visit(op["logits"]):
        return False
    # a masked choice is 0, or not among the largest; a bias may be anything
    return a["weigh"] != "choice" or bias is None or visit(bias)


def gate_sum(function: Function, gates: Value) -> float | None:
    """Return what every token's gates add up to (to 1e-6), where that can be shown; None means not known."""
    op = function.producers.get(gates.name)
    if op is None or op.name != "moe.route" or op.get("expert_scale") is not None:
        return None
    a = op.settings
    bias, given = op.get("bias"), op.get("given")
    experts = op["logits"].type.shape[1]
    if a["score"] != "softmax" or a["weigh"] == "logits" or not experts.is_Integer:
        return None
    if a["order"] == "select_score":
        least, normal = 1.0, a["renorm"] in ("none", "sum")  # what the sum is at least before it is divided by itself
    else:  # the k largest shares of 1
        least, normal = a.integer("k") / int(experts), a["renorm"] == "sum" and not (bias or given) and a["groups"] == 1
    divided = a["renorm"] == "none" or (a.number("eps") <= 1e-7 * least and a.number("min_sum") <= least / 2)
    return a.number("scale") if normal and divided else None


def is_distinct(function: Function, value: Value) -> bool:
    """Return whether the numbers along the last axis can be shown to differ: indices of a topk or an argsort."""
    while (op := function.producers.get(value.name)) is not None:
        last = len(value.type.shape) - 1
        match op.name:
            case "moe.route":
                given = op.get("given")
                if given is None:
                    return value == op.results[1]
                value = given
                continue
            case "core.topk":
                return value == op.results[1] and op.attributes["axis"] == last
            case "core.argsort":
                return op.attributes["axis"] == last
            case "core.cast" if op.attributes["to"] in ("i32", "i64"):
                pass
            case "core.slice":
                pass
            case "core.reshape" if op.inputs[0].type.shape[-1:] == value.type.shape[-1:]:
                pass
            case _:
                return value.type.shape[last] == 1
        value = op.inputs[0]
    return value.type.shape[-1] == 1
