"""A finished model as the runtime takes it: the file itself, or a changed copy in memory.

It is changed for another accuracy (whether activations beside quantized weights are int8 or f32), and where the file with
the weights is a link: the runtime reads weights only beside a model, and looks at where the links of both end. In a hub's
cache every file of a folder is a link to a file that is named by its hash.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...compiler.errors import MoecError

if TYPE_CHECKING:
    import onnx

    from .capabilities import Variant

ATTRIBUTE = "accuracy_level"
# operators with that attribute: the attribute with the bits of the weights, and the input with their zero points
OPERATORS = {"QMoE": ("expert_weight_bits", 11), "MatMulNBits": ("bits", 3)}


def open_model(path: Path, data: str, accuracy: str | None = None) -> tuple[str | bytes, Path]:
    """Return what the runtime opens, and the folder in which it then finds the file `data` with the weights.

    `accuracy` is set at all nodes; MoecError where a node cannot have it.
    """
    weights = Path(os.path.realpath(path.with_name(data)))
    if accuracy is None and weights.parent == Path(os.path.realpath(path)).parent:
        return str(path), path.parent
    import onnx

    model = onnx.load(path, load_external_data=False)
    if accuracy is not None:
        _set_accuracy(model, path, accuracy)
    for tensor in _all_initializers(model.graph):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value == data:
                entry.value = weights.name
    return model.SerializeToString(deterministic=True), weights.parent


def _all_initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the initializers of a graph and of those in its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_initializers(attribute.g)


def _set_accuracy(model: onnx.ModelProto, path: Path, accuracy: str) -> None:
    from .capabilities import ACCURACIES, best_level, shipped_record
    from .onnx.graph import CONTRIB

    if accuracy not in ACCURACIES:
        raise MoecError(f"there is no accuracy {accuracy}", todo=f"there are {', '.join(ACCURACIES)}")
    for node in model.graph.node:
        if node.op_type not in OPERATORS:
            continue
        level, reason = best_level(shipped_record(), [_variant_of_node(node)], accuracy)
        if reason:
            todo = f"compile with --accuracy {accuracy}"
            raise MoecError(f"a node cannot be {accuracy}: {reason}", where=str(path), model=node.doc_string, todo=todo)
        for attribute in node.attribute:
            if attribute.name == ATTRIBUTE:
                attribute.i = level
        node.domain = CONTRIB  # moec's kernels have one accuracy


def _variant_of_node(node: onnx.NodeProto) -> Variant:
    from .capabilities import PLAIN, Variant

    bits, zeros = OPERATORS[node.op_type]
    numbers = {a.name: a.i for a in node.attribute}
    unsigned = "u" if len(node.input) > zeros and node.input[zeros] else ""
    format = f"{unsigned}int{numbers[bits]}_g{numbers['block_size']}"
    return Variant(node.op_type, format, **PLAIN.get(node.op_type, {}))
