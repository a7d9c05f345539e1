"""Which quantized formats the kernels of an accelerator read, and which of them should not be chosen unasked."""

from __future__ import annotations

import difflib

from ....compiler.formats.format import Format
from ....compiler.formats.table import NAMED
from ....compiler.ir.module import Op
from ..tile.packing import reads_format

HOLDERS = ("core.linear", "nn.gated_mlp", "moe.experts")  # ops of stage moe whose kernels read quantized weights
_DEEPEST = 128  # columns that a kernel takes of a weight in one step


def why_not_held(op: Op, format: Format) -> str | None:
    """Return why an op of stage moe cannot have its weights in a format, None if it can."""
    if op.name == "nn.embedding":
        return "rows of the embedding are looked up by the framework, in bf16"
    if op.name not in HOLDERS:
        near = difflib.get_close_matches(op.name, HOLDERS, n=1) or HOLDERS
        return f"no kernel of {op.name} reads quantized weights; those of {', '.join(near)} do"
    if not reads_format(format):
        known = ", ".join(f.name for f in NAMED if reads_format(f))
        return f"no kernel reads {format.name}; they read integers of 4 and 8 bits, {known}"
    return None


def why_slow(op: Op, format: Format) -> str | None:
    """Return why a format that an op holds should not be chosen, None if it may be."""
    if format.group > _DEEPEST:
        return f"kernels read {_DEEPEST} columns at a time; a group of {format.group} spares them no scale"
    return None
