"""ONNX models of torch's exporter: kept as graphs without their weights, which are made from their names.

`python tests/support/onnx_files.py` writes tests/files/onnx again; it needs onnxscript, which nothing else of moec does.
"""

import hashlib
import sys

import numpy as np
import onnx
import torch
import written_experts as written
from onnx import TensorProto, numpy_helper
from places import FILES

GRAPHS = FILES / "onnx"
_LARGE = 16  # numbers: what has more is a weight


def filled_model(name):
    """Return a kept graph with weights: normal numbers, as large as those of a layer."""
    model = onnx.load(GRAPHS / f"{name}.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and not tensor.raw_data and not tensor.float_data:
            seed = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:4], "little")
            sizes = tuple(tensor.dims)
            numbers = np.random.default_rng(seed).standard_normal(sizes) / max(sizes) ** 0.5
            tensor.CopyFrom(numpy_helper.from_array(numbers.astype(np.float32), tensor.name))
    return model


def stripped_model(model):
    """Return a model without weights and without what the exporter says of lines of code."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) > _LARGE:
            tensor.ClearField("raw_data")
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        copies = [(entry.key, entry.value) for entry in kept]
        del node.metadata_props[:]
        for key, value in copies:
            node.metadata_props.add(key=key, value=value)
    for info in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del info.metadata_props[:]
    del model.graph.metadata_props[:]
    return model


def export_graph(kind):
    """Return what torch exports of a module, whose tokens are of any number."""
    torch.manual_seed(0)
    batched = kind is written.EinsumOverBatches
    x = torch.randn(*((2,) if batched else ()), 5, written.WIDTH)
    sizes = {axis: torch.export.Dim.DYNAMIC for axis in range(x.dim() - 1)}
    return torch.onnx.export(kind().eval(), (x,), dynamo=True, dynamic_shapes=(sizes,), verbose=False).model_proto


if __name__ == "__main__":
    GRAPHS.mkdir(exist_ok=True)
    for chosen in written.RAISED:
        if sys.argv[1:] in ([], [chosen.__name__]):
            raw = stripped_model(export_graph(chosen)).SerializeToString(deterministic=True)
            (GRAPHS / f"{chosen.__name__}.onnx").write_bytes(raw)
