"""Another accuracy for a finished model: whether activations beside quantized weights are int8 or f32."""

from __future__ import annotations

from pathlib import Path

import onnx

from ...compiler.errors import MoecError
from .lower_quantized import ACCURACIES, EXACT, level

ATTRIBUTE = "accuracy_level"
# with these bits QMoE has no kernel for f32 activations: compiled for `exact`, such experts are other nodes
INT8_ONLY = (2, 8)


def with_accuracy(path: Path, accuracy: str) -> bytes:
    """Return a model file with the accuracy of all its nodes set; MoecError where a node cannot have it."""
    if accuracy not in ACCURACIES:
        raise MoecError(f"there is no accuracy {accuracy}", todo=f"there are {', '.join(ACCURACIES)}")
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        bits = {a.name: a.i for a in node.attribute}.get("expert_weight_bits")
        if accuracy == EXACT and bits in INT8_ONLY:
            raise MoecError(
                f"ONNX Runtime rounds activations to int8 beside experts of {bits} bits",
                where=str(path), model=node.doc_string, todo="compile with --accuracy exact",
            )  # fmt: skip
        for attribute in node.attribute:
            if attribute.name == ATTRIBUTE:
                attribute.i = level(accuracy)
    return model.SerializeToString(deterministic=True)
