"""What can be said about values without running the program: they are 0 or more, they differ along the last axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...compiler.ir import Function, Op, Value
from ...compiler.recipes import Literal

_ALWAYS = {
    "core.softmax", "core.sigmoid", "core.exp", "core.relu", "core.abs", "core.softplus", "core.sqrt", "core.rsqrt",
}  # fmt: skip
# ops whose result is 0 or more when these operands are
_WHEN: dict[str, Callable[[Op], tuple[Value | None, ...]]] = {
    **dict.fromkeys(
        ("core.cast", "core.reshape", "core.transpose", "core.slice", "core.expand", "core.gather", "core.take",
         "core.sum", "core.mean", "core.amax", "core.cumsum", "core.floor", "core.reciprocal", "core.pow"),
        lambda op: op.operands[:1],
    ),
    **dict.fromkeys(
        ("core.add", "core.mul", "core.div", "core.minimum", "core.concat"), lambda op: op.operands
    ),
    "core.where": lambda op: op.operands[1:],
    "core.scatter": lambda op: (op.operands[0], op.operands[2]),
}  # fmt: skip


def not_negative(function: Function, value: Value | None) -> bool:
    """Return whether a value can be shown to be 0 or more in every element (or NaN); False means not known."""
    known: dict[str, bool] = {}

    def visit(value: Value | None) -> bool:
        assert value is not None
        if value.name not in known:
            known[value.name] = _not_negative(function, value, visit)
        return known[value.name]

    return visit(value)


def _not_negative(function: Function, value: Value, visit: Callable[[Value | None], bool]) -> bool:
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
            return value == op.results[0] and visit(op.operands[0])
        case "core.maximum":
            return any(map(visit, op.operands))
        case "core.clamp":
            return attributes.get("max", 0.0) >= 0 and (attributes.get("min", -1.0) >= 0 or visit(op.operands[0]))
        case name if name in _WHEN:
            return all(map(visit, _WHEN[name](op)))
    return False


def distinct(function: Function, value: Value) -> bool:
    """Return whether the numbers along the last axis can be shown to differ: indices of a topk or an argsort."""
    while (op := function.producers.get(value.name)) is not None:
        last = len(value.type.shape) - 1
        match op.name:
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
