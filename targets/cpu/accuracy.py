"""Another accuracy for a finished model: whether activations beside quantized weights are int8 or f32."""

from __future__ import annotations

from pathlib import Path

import onnx

from ...compiler.errors import MoecError
from .capabilities import ACCURACIES, PLAIN, Variant, best_level, shipped

ATTRIBUTE = "accuracy_level"
# operators with that attribute: the attribute with the bits of the weights, and the input with their zero points
OPERATORS = {"QMoE": ("expert_weight_bits", 11), "MatMulNBits": ("bits", 3)}


def with_accuracy(path: Path, accuracy: str) -> bytes:
    """Return a model file with the accuracy of all its nodes set; MoecError where a node cannot have it."""
    if accuracy not in ACCURACIES:
        raise MoecError(f"there is no accuracy {accuracy}", todo=f"there are {', '.join(ACCURACIES)}")
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type not in OPERATORS:
            continue
        level, reason = best_level(shipped(), [_variant(node)], accuracy)
        if reason:
            todo = f"compile with --accuracy {accuracy}"
            raise MoecError(f"a node cannot be {accuracy}: {reason}", where=str(path), model=node.doc_string, todo=todo)
        for attribute in node.attribute:
            if attribute.name == ATTRIBUTE:
                attribute.i = level
    return model.SerializeToString(deterministic=True)


def _variant(node: onnx.NodeProto) -> Variant:
    bits, zeros = OPERATORS[node.op_type]
    numbers = {a.name: a.i for a in node.attribute}
    unsigned = "u" if len(node.input) > zeros and node.input[zeros] else ""
    format = f"{unsigned}int{numbers[bits]}_g{numbers['block_size']}"
    return Variant(node.op_type, format, **PLAIN.get(node.op_type, {}))
