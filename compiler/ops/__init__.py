"""Every op of the IR, by dialect: core (arithmetic and shapes), nn (layers, also fused ones), moe (routers, routed experts),
onnx (what an ONNX model brings).

`OPS` is filled by the imports below; a target's kernel ops join it when that target is imported.
"""

from . import attention, compressed, core, dispatch, hyper_connections, mlp, moe, nn, onnx_node, recurrent, route
from .define import OPS, OpDef, op

__all__ = [
    "OPS",
    "OpDef",
    "attention",
    "compressed",
    "core",
    "dispatch",
    "hyper_connections",
    "mlp",
    "moe",
    "nn",
    "onnx_node",
    "op",
    "recurrent",
    "route",
]
