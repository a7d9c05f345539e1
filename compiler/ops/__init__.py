"""Every op of the IR, by dialect: core (arithmetic and shapes), nn (layers), moe (routed experts).

`OPS` is filled by the imports below; a target's kernel ops join it when that target is imported.
"""

from . import core, moe, nn
from .define import OPS, OpDef, op

__all__ = ["OPS", "OpDef", "core", "moe", "nn", "op"]
