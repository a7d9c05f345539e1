"""What ONNX Runtime holds and runs right on the CPU."""

from __future__ import annotations

from ...compiler.formats import Format
from ...compiler.ir import Op


def holds(op: Op, format: Format) -> str | None:
    """Return None if the target runs an op with its weights in a format, else why not."""
    if format.element != "int":
        return f"ONNX Runtime on the CPU does not run {format.name}"
    widths = [v.type.sizes[-1] for v in op.operands[1:] if v is not None and len(v.type.shape) == 3]
    if op.name == "moe.experts" and min(widths) < 2 * format.group:
        return f"QMoE needs two groups or more in each of the rows of {min(widths)}"
    if op.name != "moe.experts" and format.bits == 2:
        return "MatMulNBits is a hundred times slower with 2 bits"
    return None
