"""Selects the kernel that appends to a cache where it lies."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from ....compiler.ir.dims import dim
from ....compiler.ir.module import Op
from ..chip.chip import Profile
from ..kernels.append import Appended, append_kernel
from ..kernels.norm import power_of_two
from ..tile.packing import Packing
from .implementations import Computation, Implementation, Selector, Tokens, only_implementation, row_shapes, row_tile
from .search import KernelTemplate


def _select_append(op: Op, weights: Mapping[str, Packing]) -> Computation | None:
    """Return the append of this step's tokens; the framework appends anything else, and numbers that are no activations."""
    past, new, axis = op["past"].type, op["new"].type, op.settings.integer("axis")
    lead, width = sympy.Mul(*past.shape[:axis]), sympy.Mul(*past.shape[axis + 1 :])
    grows = (past.shape[axis], new.shape[axis]) == (dim("P"), dim("S"))
    if past.dtype != "f32" or not grows or not width.is_Integer or not lead.free_symbols <= {dim("B")}:
        return None
    p = Appended(str(lead), int(width))

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        scalars = {"B": tokens.batch, "S": tokens.new, "P": tokens.past, "C": tokens.past + tokens.new}
        kernel = KernelTemplate(
            "append", lambda t, layout: append_kernel(p, row_tile(t), layout), scalars,
            row_shapes(power_of_two(p.width), (1, 4, 16)), staged=False, appended={"present": ("past", "present")},
        )  # fmt: skip
        return only_implementation(kernel)

    return Computation("append", p, {}, implementations)


IMPLEMENTATIONS: dict[str, Selector] = {"nn.cache_append": _select_append}
