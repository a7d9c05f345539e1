"""From stage moe to stage kernel: what ONNX Runtime has as one op becomes that op, the rest stays as it is.

Attention with its cache becomes GroupQueryAttention, routed experts become MoE. Each refusal has a reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...compiler.draft import Draft as _Draft
from ...compiler.draft import rewrite_ops
from ...compiler.errors import Refuse
from ...compiler.ir import Const, Module, Op, Value, make_attrs
from ...compiler.ops import OPS
from ...compiler.recipes import Recipe, Step, range_length, step
from .lower_attention import group_query_attention, plain_attention
from .lower_mlp import gated_mlp
from .lower_slices import join_slices
from .ranges import distinct, not_negative


def lower(module: Module, why: list[str] | None = None) -> Module:
    """Return the module at stage kernel; `why` gets a note for each attention and MoE block left in plain ops."""
    from .emit import check

    if module.stage == "kernel":
        return module
    rewrites = {"nn.cached_attention": group_query_attention, "nn.gated_mlp": gated_mlp, "moe.experts": _moe}
    notes = why if why is not None else []
    functions = tuple(
        join_slices(rewrite_ops(_Draft(f), rewrites, "lower", notes, {"nn.cached_attention": plain_attention}))
        for f in module.functions
    )
    result = replace(module, stage="kernel", functions=functions)
    check(result)
    return result


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
