"""What a weight is for, read off the ops that use it: routed experts, router, attention, shared experts, head ...

A linear's role is found by walking from the ops that say what they are: back from attention's queries, keys and values,
on from its result to the output projection, back from the experts' routing, back from the program's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ..ir.module import Function, Module, Op, Value
from ..ops import OPS

LINEARS = ("core.linear", "nn.block_linear")

Uses = Mapping[tuple[int, int], str]  # (position of the op in its function, position of the operand) -> role


def weight_roles(module: Module) -> dict[str, Uses]:
    """Return for each function the role of every weight operand that may be quantized; biases and norms have none."""
    return {function.name: _function_roles(function) for function in module.functions}


def weight_operands(op: Op) -> list[int]:
    """Return the positions of the operands of an op that may be quantized weights."""
    if op.callee:
        return []
    return [i for i, operand in enumerate(OPS[op.name].signature.operands) if operand.dtype == "Q"] + (
        [1] if op.name == "nn.embedding" else []
    )


def _function_roles(function: Function) -> dict[tuple[int, int], str]:
    constants = {c.value.name for c in function.consts}
    routed = any(op.name == "moe.experts" for op in function.ops)
    linears = _linear_roles(function)
    found: dict[tuple[int, int], str] = {}
    for i, op in enumerate(function.ops):
        for k in weight_operands(op):
            operand = op.operands[k]
            if operand is None or operand.name not in constants:
                continue
            match op.name:
                case "moe.experts" | "moe.grouped_linear":
                    role = "experts"
                case "nn.embedding":
                    role = "embedding"
                case _:
                    role = linears.get(id(op)) or ("shared" if routed else "dense")
            found[i, k] = role
    return found


def _linear_roles(function: Function) -> dict[int, str]:
    """Return the roles of linears (by id of the op) that attention, a router or the program's results tell."""
    roles: dict[int, str] = {}

    def mark(ops: Iterable[Op], role: str) -> None:
        for op in ops:
            roles.setdefault(id(op), role)

    for op in function.ops:
        if op.name in ("moe.experts", "moe.route"):
            routing = [op["ids"], op["gates"]] if op.name == "moe.experts" else [op["logits"]]
            mark(_linears_before(function, routing, through=lambda o: o.name not in LINEARS), "router")
    for op in function.ops:
        if _is_attention(op):
            states = {v.name for v in op.inputs if v.type.state}
            mark(
                _linears_before(function, [v for v in op.inputs if v.name not in states], through=lambda o: True),
                "attention",
            )
            mark(_back_states(function, states), "attention")
            outputs = _linears_after(function, [v for v in op.results if not v.type.state])
            mark(outputs, "attention")
            mark(
                _linears_before(function, [o.inputs[0] for o in outputs], through=lambda o: o.name not in LINEARS),
                "attention",
            )
    if function.name == "main":
        logits = [v for v in function.results if not v.type.state]
        mark(_linears_before(function, logits, through=lambda o: o.name not in LINEARS and not o.callee), "head")
    return roles


def _is_attention(op: Op) -> bool:
    return op.name.endswith("attention")


def _back_states(function: Function, states: set[str]) -> list[Op]:
    """Return the linears that make what is appended to the caches."""
    appends = [function.producers[name] for name in sorted(states) if name in function.producers]
    return _linears_before(
        function, [v for op in appends for v in op.inputs if not v.type.state], through=lambda o: True
    )


def _linears_before(function: Function, values: Iterable[Value | None], through: Callable[[Op], bool]) -> list[Op]:
    """Return the linears that values are made with; the walk continues past an op where `through` says so."""
    found: list[Op] = []
    seen: set[str] = set()
    pending = [v for v in values if v is not None]
    while pending:
        op = function.producers.get(pending.pop().name)
        if op is None or op.results[0].name in seen:
            continue
        seen.add(op.results[0].name)
        if op.name in LINEARS:
            found.append(op)
        if through(op):
            pending += op.inputs
    return found


def _linears_after(function: Function, values: Iterable[Value]) -> list[Op]:
    """Return the first linears that read what values become, with those of single heads on the way."""
    found: list[Op] = []
    seen: set[str] = set()
    pending = list(values)
    while pending:
        for user in function.uses.get(pending.pop().name, []):
            if user is None or user.results[0].name in seen:
                continue
            seen.add(user.results[0].name)
            if user.name in LINEARS:
                found.append(user)
            # blocks are those of heads: the output's linear follows them
            if user.name != "core.linear" and not user.callee:
                pending += user.results
    return found
