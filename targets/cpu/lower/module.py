"""From stage moe to stage kernel: what ONNX Runtime has as one op becomes that op, the rest stays as it is.

Attention with its cache becomes GroupQueryAttention, routed experts become MoE or QMoE, quantized linears MatMulNBits.
Each refusal has a reason.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from ....compiler.errors import MoecError, Refuse
from ....compiler.formats.table import find_format
from ....compiler.ir.module import Function, Module, Op
from ....compiler.ir.notes import Note, Rewritten
from ....compiler.rewrite.editor import Editor, Rewrite, rewrite_ops
from .. import ops, ops_quantized
from ..capabilities import ACCURACIES, FAST, Record, activation_variant, routing_variant, shipped_record, version_note
from .attention import group_query_attention, plain_attention
from .logits import keep_last_tokens
from .mlp import gated_mlp
from .quantized import interleave_gate, lower_embedding, lower_experts, lower_experts_to_loop, lower_linear
from .ranges import gate_sum, is_distinct, not_negative
from .slices import join_slices

assert ops and ops_quantized  # what ops are lowered to is declared there


def lower_module(module: Module, accuracy: str = FAST, record: Record | None = None) -> Rewritten:
    """Return the module at stage kernel, with a note for each attention and MoE block left in plain ops.

    `accuracy` is `fast` (activations beside quantized weights are rounded to int8) or `exact` (they stay f32). Only
    what the record (by default the one that moec comes with) calls right is used.
    """
    if accuracy not in ACCURACIES:
        raise MoecError(f"there is no accuracy {accuracy}", todo=f"there are {', '.join(ACCURACIES)}")
    if module.stage == "kernel":
        return Rewritten(module)
    record = record or shipped_record()
    about_record = version_note(record)
    notes = [Note(about_record)] if about_record else []
    functions = []
    for function in module.functions:
        lowered, found = _lower_function(function, accuracy, record)
        functions.append(keep_last_tokens(lowered) if lowered.name == "main" else lowered)
        notes += found
    return Rewritten(replace(module, stage="kernel", functions=tuple(functions)), tuple(notes))


def _lower_function(function: Function, accuracy: str, record: Record) -> tuple[Function, list[Note]]:
    blocks: dict[str, Rewrite] = {
        "nn.cached_attention": partial(group_query_attention, record=record),
        "nn.gated_mlp": gated_mlp,
        "moe.experts": partial(_lower_routed_experts, accuracy=accuracy, record=record),
    }
    instead: dict[str, Rewrite] = {
        "nn.cached_attention": plain_attention,
        "moe.experts": partial(lower_experts_to_loop, record=record),
    }
    weights: dict[str, Rewrite] = {
        "core.linear": partial(lower_linear, accuracy=accuracy, record=record),
        "nn.block_linear": partial(lower_linear, accuracy=accuracy, record=record),
        "nn.embedding": partial(lower_embedding, record=record),
    }
    merged, about_choices = rewrite_ops(function, {"moe.experts": _merge_choices}, "lower")
    fused, about_blocks = rewrite_ops(merged, blocks, "lower", instead)
    # blocks have become linears too: those on quantized weights come last
    lowered, about_weights = rewrite_ops(fused, weights, "lower")
    return join_slices(lowered), [*about_choices, *about_blocks, *about_weights]


# --- routed experts --------------------------------------------------------------------------------------------


def _merge_choices(editor: Editor, op: Op) -> Op:
    """Return routed experts whose ids may be equal, as those of a table may, with ids that differ.

    Equal ids become one with the sum of their gates; experts without weight fill the places that become free. MoE and
    QMoE choose by scores, one for each expert, and could not tell two equal ids apart.
    """
    ids, gates = op["ids"], op["gates"]
    if is_distinct(editor.function, ids) or not not_negative(editor.function, gates):
        return op
    tokens, chosen = ids.type.shape
    none = editor.add(
        "core.full", hint="no_gates", shape=(tokens, op["up"].type.shape[0]), value=0.0, dtype=gates.type.dtype
    )
    merged = editor.add("core.scatter_add", none, ids, gates, hint="merged", axis=1)
    hints = ("merged.gates", "merged.ids")
    gates, ids = editor.add_all("core.topk", merged, hints=hints, k=int(chosen), axis=1)
    return op.reading(ids=ids, gates=gates)


def _lower_routed_experts(editor: Editor, op: Op, accuracy: str, record: Record) -> Op:
    """Return routed experts as the op for their weights; Refuse says what it cannot do."""
    return (
        lower_experts(editor, op, accuracy, record)
        if find_format(op["up"].type.dtype)
        else _lower_to_moe(editor, op, record)
    )


def _lower_to_moe(editor: Editor, op: Op, record: Record) -> Op:
    """Return routed experts as com.microsoft.MoE; Refuse says what it cannot do."""
    x, ids, gates, up, down = (op[name] for name in ("x", "ids", "gates", "up", "down"))
    up_bias, down_bias = op.get("up_bias"), op.get("down_bias")
    act = op.settings.activation("act")
    if x.type.dtype != "f32":
        raise Refuse(f"it is {x.type.dtype}, MoE on the CPU is f32")
    if reason := record.refusal([activation_variant("MoE", act)]):
        raise Refuse(reason)
    positive = not_negative(editor.function, gates)
    if reason := record.refusal([routing_variant("MoE", "zero weights" if positive else "negative weights")]):
        raise Refuse(reason if positive else f"the weights {gates} may be negative, and {reason}", gates)
    if not is_distinct(editor.function, ids):
        raise Refuse(f"the experts {ids} of a token cannot be shown to differ", ids)
    act, up, up_bias = interleave_gate(editor, act, up, up_bias)
    kept: dict[str, Any] = {"act": act}
    if total := gate_sum(editor.function, gates):
        kept["gate_sum"] = total
    return op.become("ort.moe", x, ids, gates, up, down, up_bias, down_bias, **kept)
