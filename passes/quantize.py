"""Stores weights in fewer bits, each role in a format of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..compiler.errors import MoecError
from ..compiler.formats import FORMAT_NAMES, GROUPS, Format, find_format
from ..compiler.ir import Const, Function, Module, Op, Value
from ..compiler.pipeline import pass_
from ..compiler.recipes import step
from ..compiler.rewrite import Why
from ..compiler.roles import weight_operands, weight_roles

KEEP = ("f32", "none")
# groups that are tried in turn where the user names none; attention is the most sensitive part of a small model
PREFERRED = (128, 64, 32, 16)
PREFERRED_ATTENTION = (64, 32, 16)


@pass_(reads="moe", tolerance=1.0)
def quantize(
    module: Module, target: Any, why: Why, *, experts: str = "int4", attention: str = "int4", shared: str = "int4",
    dense: str = "int4", router: str = "f32", embedding: str = "int8", head: str = "int4", group: int | None = None,
    symmetric: bool = False, method: str = "rtn",
) -> Module:  # fmt: skip
    """Store weights in fewer bits.

    Each role takes a number of bits (int8, int4, int2), a format of its own (uint4_g64, mxfp4, nvfp4, fp8_b128), or f32
    to be left as it is. Weights of 2 and 4 bits have zero points unless `symmetric` is set. `group` is the number of
    weights that share a scale; without one it is the largest that divides and that the target holds and is not slow at.
    """
    policy = {
        "experts": experts, "attention": attention, "shared": shared, "dense": dense, "router": router,
        "embedding": embedding, "head": head,
    }  # fmt: skip
    for spec in policy.values():
        check_spec(spec)
    if group is not None and group not in GROUPS:
        raise MoecError(f"{group} is no group size", todo=f"there are {', '.join(map(str, GROUPS))}")
    roles = weight_roles(module)
    notes: list[str] = []
    functions = {}
    for function in module.functions:
        chosen = {
            place: format
            for place, spec in _specs(function, roles[function.name], policy)
            if (format := _choose(function, place, spec, group, symmetric, target, roles[function.name], notes))
        }
        functions[function.name] = _store(function, chosen, method)
    tell = why.append if isinstance(why, list) else why
    for note in notes if tell else ():
        tell(note)  # type: ignore[misc]
    return module.with_functions(functions)


def check_spec(spec: str) -> None:
    """Raise MoecError unless a text names a number of bits, a format, or f32."""
    if spec not in KEEP and not re.fullmatch(r"u?int[248]", spec) and find_format(spec) is None:
        raise MoecError(
            f"there is no format {spec}", todo=f"there are f32, int8, int4, int2, {', '.join(FORMAT_NAMES)}"
        )


Place = tuple[int, int]  # an op and one of its operands


def _specs(function: Function, roles: Mapping[Place, str], policy: Mapping[str, str]) -> list[tuple[Place, str]]:
    return [(place, policy[role]) for place, role in roles.items() if policy[role] not in KEEP]


# --- which format ----------------------------------------------------------------------------------------------


def _choose(
    function: Function, place: Place, spec: str, group: int | None, symmetric: bool, target: Any,
    roles: Mapping[Place, str], notes: list[str],
) -> Format | None:  # fmt: skip
    """Return the format of a weight; None where no group fits a weight whose group nobody asked for."""
    op, role = function.ops[place[0]], roles[place]
    weights = [v for k in weight_operands(op) if (v := op.operands[k]) is not None]  # an op stores all alike
    named = find_format(spec)
    if named is not None:
        candidates = [named]
    else:
        bits = int(spec.lstrip("uint"))
        zeros = spec.startswith("u") or (bits < 8 and not symmetric)
        preferred = PREFERRED_ATTENTION if role == "attention" and bits <= 4 else PREFERRED
        # two groups in a row or more, where there is a choice: it is small matrices that lose most
        shortest = min(int(v.type.shape[-1]) for v in weights)
        groups = [group] if group else [g for g in preferred if 2 * g <= shortest] or preferred
        names = [f"{'u' * zeros}int{bits}_g{g}" for g in groups]
        candidates = [f for name in names if (f := find_format(name))]
    asked_for = named is not None or group is not None
    reasons = []
    for format in candidates:
        # what the user asks for may be slow: lowering notes it
        reason = _obstacle(op, weights, format, target, or_slow=not asked_for)
        if not reason:
            return format
        reasons.append(f"{format.name}: {reason}")
    what = f"{op.operands[place[1]]} ({role}, {weights[0].type.shape[-1]} columns) cannot be stored as {reasons[0]}"
    if asked_for:
        where = f"{op.operands[place[1]]} in @{function.name}"
        raise MoecError(
            what, where=where, model=", ".join(op.loc), todo=_would_work(op, weights, candidates[0], target)
        )
    notes.append(f"note: @{function.name} {', '.join(op.loc)}: {what}; it stays f32")
    return None


def _obstacle(op: Op, weights: list[Value], format: Format, target: Any, or_slow: bool = True) -> str:
    """Return why weights cannot have a format, or with `or_slow` should not; nothing if they can."""
    for weight in weights:
        if weight.type.dtype != "f32":
            return f"it is {weight.type.dtype}"
        if weight.type.sizes[-1] % format.group:
            return f"groups of {format.group} do not divide {weight.type.sizes[-1]}"
    if target is None:
        return ""
    return target.holds(op, format) or (or_slow and target.slow(op, format)) or ""


def _would_work(op: Op, weights: list[Value], format: Format, target: Any) -> str:
    """Return the formats like this one that the weights could have."""
    names = [f"{prefix}int{bits}_g{g}" for bits in (format.bits, 4, 8) for prefix in ("", "u") for g in GROUPS]
    fitting = [n for n in dict.fromkeys(names) if (f := find_format(n)) and not _obstacle(op, weights, f, target)]
    return f"formats that work: {', '.join(fitting[:8])}" if fitting else "leave this role at f32"


# --- storing it ------------------------------------------------------------------------------------------------


def _store(function: Function, chosen: Mapping[Place, Format], method: str) -> Function:
    """Return the function with the chosen operands quantized; the same weight in two formats becomes two."""
    if not chosen:
        return function
    consts = {c.value.name: c for c in function.consts}
    taken = set(function.names)
    made: dict[tuple[str, str], Value] = {}

    def stored(value: Value, format: Format) -> Value:
        key = (value.name, format.name)
        if key not in made:
            options = {} if method == "rtn" else {"method": method}
            recipe = step("quantize", consts[value.name].recipe, to=format.name, **options)
            name = f"{value.name}.{format.name}"
            while name in taken:
                name += ".1"
            taken.add(name)
            made[key] = Value(name, recipe.type)
            consts[name] = Const(made[key], recipe)
        return made[key]

    ops = []
    for i, op in enumerate(function.ops):
        operands = [
            stored(v, chosen[i, k]) if v is not None and (i, k) in chosen else v for k, v in enumerate(op.operands)
        ]
        ops.append(replace(op, operands=tuple(operands)) if any(k[0] == i for k in chosen) else op)
    used = {v.name for op in ops for v in op.inputs} | {v.name for v in function.results}
    kept = tuple(c for c in consts.values() if c.value.name in used)
    return _with_old_names(replace(function, consts=kept, ops=tuple(ops)), made)


def _with_old_names(function: Function, made: Mapping[tuple[str, str], Value]) -> Function:
    """Give a quantized weight the name of the one that it stands for, where that is gone and there is one of it."""
    kept = {c.value.name for c in function.consts}
    olds = [old for old, _ in made]
    names = {new.name: old for (old, _), new in made.items() if old not in kept and olds.count(old) == 1}

    def named(value: Value | None) -> Value | None:
        return value and replace(value, name=names.get(value.name, value.name))

    consts = tuple(replace(c, value=named(c.value)) for c in function.consts)  # type: ignore[arg-type]
    ops = tuple(replace(op, operands=tuple(map(named, op.operands))) for op in function.ops)
    return replace(function, consts=consts, ops=ops)
