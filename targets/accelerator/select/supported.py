"""The table of what an accelerator runs: ops with kernels, and ops that the framework computes between kernels.

The framework (torch) has shapes, tables, and arithmetic on values that are few beside the weights.
"""

from __future__ import annotations

import difflib

from ....compiler.ir.module import Op
from . import attention, dense, experts, latent, recurrent, rounding, sparse, states
from .implementations import Selector

_ROOMS = (attention, dense, experts, latent, recurrent, rounding, sparse, states)
IMPLEMENTATIONS: dict[str, Selector] = {
    name: select for room in _ROOMS for name, select in room.IMPLEMENTATIONS.items()
}
# and core.*; a convolution over tokens only where the program does something else with its window than acc.window_conv
FRAMEWORK = ("nn.embedding", "nn.new_state", "nn.conv_window", "nn.causal_conv")


def why_unsupported(op: Op) -> str | None:
    """Return None if an op has kernels or is left to the framework, else why not, with the ops that come near."""
    if op.callee or op.name in IMPLEMENTATIONS or op.name in FRAMEWORK or op.name.startswith("core."):
        return None
    near = difflib.get_close_matches(op.name, IMPLEMENTATIONS, n=3, cutoff=0.5) or sorted(IMPLEMENTATIONS)
    return f"no kernel computes {op.name}; there are those for {', '.join(near)}"
