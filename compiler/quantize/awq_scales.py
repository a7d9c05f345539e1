"""AWQ (Lin et al. 2023): channels with large inputs are scaled up before rounding, and their inputs down by as much.

Where the inverse can go is fixed by the program: into the weight of an RMSNorm when all that reads the norm is linear
(the readers that stay f32 are scaled too, exactly), and into the up rows of an expert for its down columns when the
expert is linear in u. Elsewhere a weight is rounded as it is. The factors themselves are fitted by weights/awq.py.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.module import Function, Op, Value
from ..ir.notes import Note, note_on
from ..ir.recipes import FITTED, Recipe, Tensor
from ..ir.types import TensorType
from ..weights.steps.table import step

_LINEAR = ("core.linear", "moe.experts")


def fold_awq_scales(function: Function) -> tuple[Function, list[Note]]:
    """Return the function with its weights scaled where that can be undone exactly, and notes where it cannot."""
    recipes = {c.value.name: c.recipe for c in function.consts}
    folds = {"nn.rms_norm": _fold_norm, "moe.experts": _fold_experts}
    reasons = [(op, folds[op.name](function, op, recipes)) for op in function.ops if op.name in folds]
    consts = tuple(replace(c, recipe=recipes[c.value.name]) for c in function.consts)
    return replace(function, consts=consts), [note_on(function, op, reason) for op, reason in reasons if reason]


def _fold_norm(function: Function, norm: Op, recipes: dict[str, Recipe]) -> str:
    """Scale the weights that read a norm, and the norm's own; return why they cannot be."""
    weight = norm["w"]
    readers = _reading_ops(function, norm.results[0])
    if not any(op is not None and op.name in _LINEAR for op in readers):
        return ""
    reason = ""
    scaled: list[Value] = []
    for op in readers:
        if op is None or op.name not in _LINEAR:
            reason = f"{op.name if op else 'the result'} reads it, which is not linear in it"
            break
        read = op["w"] if op.name == "core.linear" else op["up"]
        if read.name not in recipes or read.type.dtype != "f32" or len(function.uses[read.name]) != 1:
            reason = f"{read} is not a weight of its own"
        scaled.append(read)
    if weight.name not in recipes or len(function.uses[weight.name]) != 1 or weight.type.dtype != "f32":
        reason = f"{weight} is not a weight of its own"
    if reason:
        return f"no scale for its readers: {reason}"
    width = weight.type.sizes[0]
    factors = Tensor(f"{weight.name}{FITTED}", TensorType.of("f32", width))
    recipes[weight.name] = step("scale", recipes[weight.name], factors, axes=(0,), inverse=True)
    for read in scaled:
        recipes[read.name] = step("scale", recipes[read.name], factors, axes=(len(read.type.shape) - 1,))
    return ""


def _reading_ops(function: Function, value: Value) -> list[Op | None]:
    """Return what reads a value, through reshapes that keep its last axis."""
    found: list[Op | None] = []
    for op in function.uses.get(value.name, []):
        keeps = op is not None and op.name == "core.reshape" and op.results[0].type.shape[-1] == value.type.shape[-1]
        found += _reading_ops(function, op.results[0]) if op is not None and keeps else [op]
    return found


def _fold_experts(function: Function, op: Op, recipes: dict[str, Recipe]) -> str:
    """Scale the down columns of experts, and their up rows; return why they cannot be."""
    act = op.settings.activation("act")
    up, down = op["up"], op["down"]
    linear = act.gated and act.beta == 0 and not act.clamped
    plain = not act.interleaved and op.get("up_bias") is None
    own = all(v.name in recipes and v.type.dtype == "f32" and len(function.uses[v.name]) == 1 for v in (up, down))
    if not (linear and plain and own):
        return "no scale for down: its inputs are not linear in up"
    experts, _, inner = down.type.sizes
    factors = Tensor(f"{down.name}{FITTED}", TensorType.of("f32", experts, inner))
    recipes[down.name] = step("scale", recipes[down.name], factors, axes=(0, 2))
    recipes[up.name] = step("scale", recipes[up.name], factors, axes=(0, 1), start=inner, inverse=True)
    return ""
