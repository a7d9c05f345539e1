"""From stage moe to stage kernel: what ONNX Runtime has as one op becomes that op, the rest stays as it is.

Attention with its cache becomes GroupQueryAttention, routed experts become MoE. Each refusal has a reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ...compiler.errors import Refuse
from ...compiler.ir import Attr, Const, Function, Module, Op, Value, make_attrs
from ...compiler.ops import OPS
from ...compiler.recipes import Recipe, Step, range_length, step
from .ranges import distinct, gate_sum, not_negative

HEAD_MULTIPLE = 8  # ONNX Runtime refuses other head sizes at run time
BEFORE_HEADS = (0, 2, 1, 3)  # [B, H, S, D] <-> [B, S, H, D]


def lower(module: Module, why: list[str] | None = None) -> Module:
    """Return the module at stage kernel; `why` gets a line for each attention and MoE block left in plain ops."""
    from .emit import check

    if module.stage == "kernel":
        return module
    functions = tuple(_lower_function(f, why if why is not None else []) for f in module.functions)
    result = replace(module, stage="kernel", functions=functions)
    check(result)
    return result


@dataclass
class _Draft:
    """A function being rewritten: its ops so far, new weights, and which value stands for which with other axes."""

    function: Function
    ops: list[Op] = field(default_factory=list)
    consts: dict[str, Const] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    turned: dict[str, Value] = field(default_factory=dict)  # [B, H, S, D] value -> the same as [B, S, H, D]

    def fresh(self, base: str) -> str:
        name, number = base, 1
        while name in self.taken:
            name, number = f"{base}.{number}", number + 1
        self.taken.add(name)
        return name

    def add(self, name: str, *operands: Value | None, hint: str, loc: tuple[str, ...], **attrs: Attr) -> Value:
        """Add an op with one result and return it."""
        (type_,) = OPS[name].infer([None if v is None else v.type for v in operands], attrs)
        result = Value(self.fresh(hint), type_)
        self.ops.append(Op(name, operands, (result,), make_attrs(attrs), loc=loc))
        return result


def _lower_function(function: Function, why: list[str]) -> Function:
    draft = _Draft(function, consts={c.value.name: c for c in function.consts}, taken=set(function.names))
    rewrites = {"nn.attention": _group_query_attention, "moe.experts": _moe}
    for op in function.ops:
        rewrite = rewrites.get(op.name)
        kept = len(draft.ops)
        try:
            new = rewrite(draft, op) if rewrite else op
        except Refuse as refusal:
            del draft.ops[kept:]
            place = ", ".join(op.loc) or f"%{op.results[0].name}"
            why.append(f"@{function.name} {place}: {op.name} stays in plain ops: {refusal.reason}")
            new = op
        draft.ops.append(new)
    return _without_idle(replace(function, ops=tuple(draft.ops), consts=tuple(draft.consts.values())))


def _without_idle(function: Function) -> Function:
    """Drop ops and weights that nothing reads, and a second op that makes the value of a fused one."""
    made: set[str] = set()
    ops: list[Op] = []
    needed = {v.name for v in function.results}
    for op in reversed(function.ops):
        names = {v.name for v in op.results}
        if names & needed and not names <= made:
            ops.append(op)
            made |= names
            needed |= {v.name for v in op.inputs}
    consts = tuple(c for c in function.consts if c.value.name in needed)
    return replace(function, ops=tuple(reversed(ops)), consts=consts)


# --- attention -------------------------------------------------------------------------------------------------


def _group_query_attention(draft: _Draft, op: Op) -> Op:
    """Return cache append and attention as one op; Refuse says what ONNX Runtime's op cannot do."""
    q, k, v, mask, sinks = op.operands
    assert q and k and v
    attributes: dict[str, Any] = op.attributes
    appends = [_append(draft.function, state, op) for state in (k, v)]
    width, new = q.type.shape[3], q.type.shape[2]
    if v.type.shape[3] != width:
        raise Refuse(
            f"keys have {width} numbers a head and values {v.type.shape[3]}; GroupQueryAttention wants the same"
        )
    if not width.is_Integer or int(width) % HEAD_MULTIPLE:
        raise Refuse(f"GroupQueryAttention takes heads of a multiple of {HEAD_MULTIPLE} numbers, here {width}")
    if k == v:
        raise Refuse("keys and values are one cache, GroupQueryAttention makes two", k)
    if any(x.type.dtype != "f32" for x in (q, k, v)):
        raise Refuse(f"it is {q.type.dtype}, the target's attention is f32")
    if any(append.operands[1].type.shape[2] != new for append in appends):  # type: ignore[union-attr]
        raise Refuse("the number of queries is not the number of tokens appended to the cache")
    if not all(x.is_Integer for x in (q.type.shape[1], k.type.shape[1])) or q.type.shape[1] % k.type.shape[1]:
        raise Refuse(f"{q.type.shape[1]} heads do not divide into {k.type.shape[1]} groups")
    if attributes["scale"] == 0:
        raise Refuse("a scale of 0 means the default to GroupQueryAttention")
    new_rows = [append.operands[1] for append in appends]
    rows = [_before_heads(draft, x, op.loc) for x in (q, *new_rows) if x is not None]
    bias = mask and draft.add("ort.attention_bias", mask, hint="attention_bias", loc=op.loc, tokens=new)
    operands = (*rows, *(append.operands[0] for append in appends), bias, sinks)
    return Op("ort.group_query_attention", operands, (*op.results, k, v), op.attrs, loc=op.loc)


def _append(function: Function, state: Value, attention: Op) -> Op:
    """Return the op that appends to a cache which only this attention and the caller read."""
    append = function.producers.get(state.name)
    if append is None or append.name != "nn.cache_append" or append.attributes["axis"] != 2:
        raise Refuse(f"{state} is not a cache that the step's tokens are appended to", state)
    others = [user for user in function.uses[state.name] if user is not None and user is not attention]
    if others:
        raise Refuse(f"{state} is also read by {others[0].name}", state)
    return append


def _before_heads(draft: _Draft, value: Value, loc: tuple[str, ...]) -> Value:
    """Return [B, H, S, D] as [B, S, H, D]; ops on single heads move before the transpose, which then falls away."""
    if value.name not in draft.turned:
        moved = _move(draft, value)
        if moved is None:
            moved = draft.add("core.transpose", value, hint=f"{value.name}.rows", loc=loc, perm=BEFORE_HEADS)
        draft.turned[value.name] = moved
    return draft.turned[value.name]


def _move(draft: _Draft, value: Value) -> Value | None:
    """Return the value made with the axes in the other order, or None where there is no transpose to save."""
    op = draft.function.producers.get(value.name)
    if op is None:
        return None
    hint = f"{value.name}.rows"
    inner = op.operands if op.name == "core.concat" else op.operands[:1]
    match op.name:
        case "core.transpose" if op.attributes["perm"] == BEFORE_HEADS:
            return op.operands[0]
        case "nn.rope" | "nn.rms_norm":
            pass
        case "core.concat" | "core.slice" if op.attributes["axis"] == 3:
            pass
        case _:
            return None
    moved = [_move(draft, x) for x in inner if x is not None]
    if any(x is None for x in moved):
        return None
    name = "ort.rotary_embedding" if op.name == "nn.rope" else op.name
    rest = op.operands[len(inner) :]
    return draft.add(name, *moved, *rest, hint=hint, loc=op.loc, **op.attributes)


# --- routed experts --------------------------------------------------------------------------------------------


def _moe(draft: _Draft, op: Op) -> Op:
    """Return routed experts as com.microsoft.MoE; Refuse says what it cannot do."""
    x, ids, gates, up, down, up_bias, down_bias = op.operands
    assert x and ids and gates and up and down
    attributes: dict[str, Any] = OPS[op.name].complete(op.attributes)
    act, gated = attributes["act"], attributes["gated"]
    if x.type.dtype != "f32":
        raise Refuse(f"it is {x.type.dtype}, MoE on the CPU is f32")
    if gated and act != "silu":
        raise Refuse(f"MoE has no gated {act}")
    if not gated and act not in ("silu", "relu", "identity"):
        raise Refuse(f"MoE has no exact {act}")
    if not not_negative(draft.function, gates):
        raise Refuse(f"the weights {gates} cannot be shown to be 0 or more, and MoE gets them as logarithms", gates)
    if not distinct(draft.function, ids):
        raise Refuse(f"the experts {ids} of a token cannot be shown to differ", ids)
    if gated and attributes["layout"] == "concat":
        up = _interleave(draft, up)
        up_bias = up_bias and _interleave(draft, up_bias)
    kept = {name: attributes[name] for name in ("act", "gated", "alpha", "beta", "limit")}
    kept = {n: v for n, v in kept.items() if n in op.attributes}
    if total := gate_sum(draft.function, gates):
        kept["gate_sum"] = total
    return Op("ort.moe", (x, ids, gates, up, down, up_bias, down_bias), op.results, make_attrs(kept), loc=op.loc)


def _interleave(draft: _Draft, value: Value) -> Value:
    """Return the weight with its gate rows and up rows in turn."""
    const = draft.consts.get(value.name)
    if const is None:
        raise Refuse(f"{value} is not a weight, its rows cannot be interleaved beforehand", value)
    name = f"{value.name}.interleaved"
    if name not in draft.consts:
        new = Value(draft.fresh(name), value.type)
        draft.consts[name] = Const(new, interleaved(const.recipe))
    return draft.consts[name].value


def interleaved(recipe: Recipe) -> Recipe:
    """Return the recipe with the two halves of axis 1 in turn: row 0 of both, row 1 of both, ..."""
    match recipe:
        case Step("cast", (item,)):
            return step("cast", interleaved(item), to=recipe.attributes["to"])
        case Step("concat", (gate, up)) if (
            recipe.attributes["axis"] == 1 and range_length(gate) == range_length(up) == 1 and gate.type == up.type
        ):
            return step("interleave", gate, up, axis=1)
    rows = recipe.type.sizes[1]
    halves = [step("slice", recipe, axis=1, start=start, stop=start + rows // 2) for start in (0, rows // 2)]
    return step("interleave", *halves, axis=1)
