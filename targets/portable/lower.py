"""From stage moe to stage kernel for standard ONNX: attention and dense layers in plain ops, experts as one op."""

from __future__ import annotations

from dataclasses import replace

from ...compiler.errors import MoecError
from ...compiler.ir.module import Function, Module, Op
from ...compiler.ir.notes import Note, Rewritten
from ...compiler.rewrite.editor import rewrite_ops
from ..cpu.lower.attention import plain_attention
from ..cpu.lower.logits import keep_last_tokens
from ..cpu.lower.mlp import gated_mlp
from ..cpu.lower.slices import join_slices
from ..cpu.onnx.emit import why_unsupported as why_not_emitted
from .quantized import embedding_of_codes, experts_of_codes, linear_of_codes

_REWRITES = {"nn.cached_attention": plain_attention, "nn.gated_mlp": gated_mlp}
# blocks have become linears too: those on quantized weights come last
_ON_CODES = {"core.linear": linear_of_codes, "nn.embedding": embedding_of_codes, "moe.experts": experts_of_codes}
# ops whose nodes are com.microsoft's and have no form in standard.py
_CONTRIBUTED = {
    "nn.linear_attention": "LinearAttention", "nn.hyper_connection_pre": "HyperConnectionPreMix",
    "nn.hyper_connection_post": "HyperConnectionPostMix", "nn.hyper_connection_head": "HyperConnectionPreMix",
}  # fmt: skip


def why_unsupported(op: Op) -> str | None:
    """Return None if the target runs the op, else why not."""
    if op.name in _CONTRIBUTED:
        return f"{op.name} is {_CONTRIBUTED[op.name]} of com.microsoft: moec has no form of it in standard operators"
    return why_not_emitted(op)


def lower_module(module: Module) -> Rewritten:
    """Return the module at stage kernel; MoecError at the first op that has no form in standard operators."""
    if module.stage == "kernel":
        return Rewritten(module)
    functions: list[Function] = []
    notes: list[Note] = []
    for function in module.functions:
        lowered, found = rewrite_ops(function, _REWRITES, "lower")
        lowered, about_weights = rewrite_ops(lowered, _ON_CODES, "lower")
        lowered = join_slices(lowered)
        functions.append(keep_last_tokens(lowered) if lowered.name == "main" else lowered)
        notes += [*found, *about_weights]
    for function in functions:
        for op in function.ops:
            if reason := why_unsupported(op):
                place = f"%{op.results[0].name} in @{function.name}" if op.results else f"@{function.name}"
                raise MoecError(reason, where=place, model=", ".join(op.loc), todo="use --target cpu")
    return Rewritten(replace(module, stage="kernel", functions=tuple(functions)), tuple(notes))
