"""Every op of the IR, by dialect: core (arithmetic and shapes), nn (layers), moe (routers and routed experts).

`OPS` is filled by the imports below; a target's kernel ops join it when that target is imported.
"""

from . import core, moe, nn, route
from .define import OPS, OpDef, op

__all__ = ["OPS", "OpDef", "core", "moe", "nn", "op", "route"]
