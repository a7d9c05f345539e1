"""Compile an ONNX model of another exporter: experts that it computes for every token become those that were chosen.

python examples/export_from_onnx.py FOLDER [MODEL.onnx]

Without a model a small one is written first, as exporters without an operator for experts write them.
"""

import sys
from pathlib import Path

import moec
import numpy as np
import onnx
from onnx import helper, numpy_helper

WIDTH, INNER, EXPERTS = 64, 128, 8


def layer_of_experts() -> onnx.ModelProto:
    """Return a layer whose experts all see every token, each times a gate that is mostly 0."""
    rng = np.random.default_rng(0)
    weights = {"router": rng.standard_normal((WIDTH, EXPERTS)) / WIDTH**0.5, "k": [2], "last": [-1], "zero": [0.0]}
    nodes = [
        helper.make_node("MatMul", ["x", "router"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=-1),
        helper.make_node("TopK", ["scores", "k"], ["gates", "ids"], axis=-1),
    ]
    total = ""
    for e in range(EXPERTS):
        weights[f"up.{e}"] = rng.standard_normal((WIDTH, INNER)) / WIDTH**0.5
        weights[f"down.{e}"] = rng.standard_normal((INNER, WIDTH)) / INNER**0.5
        weights[f"number.{e}"] = e
        nodes += [
            helper.make_node("MatMul", ["x", f"up.{e}"], [f"h.{e}"]),
            helper.make_node("Relu", [f"h.{e}"], [f"a.{e}"]),
            helper.make_node("MatMul", [f"a.{e}", f"down.{e}"], [f"o.{e}"]),
            helper.make_node("Equal", ["ids", f"number.{e}"], [f"mine.{e}"]),
            helper.make_node("Where", [f"mine.{e}", "gates", "zero"], [f"own.{e}"]),
            helper.make_node("ReduceSum", [f"own.{e}", "last"], [f"gate.{e}"], keepdims=1),
            helper.make_node("Mul", [f"o.{e}", f"gate.{e}"], [f"y.{e}"]),
        ]
        if total:
            nodes.append(helper.make_node("Add", [total, f"y.{e}"], [f"sum.{e}" if e < EXPERTS - 1 else "y"]))
        total = f"sum.{e}" if total else f"y.{e}"
    arrays = {name: np.array(value) for name, value in weights.items()}
    tensors = [
        numpy_helper.from_array(a.astype(np.float32) if a.dtype.kind == "f" else a, name) for name, a in arrays.items()
    ]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["tokens", WIDTH]) for name in "xy")
    graph = helper.make_graph(nodes, "layer", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def main(folder: Path, file: Path | None) -> None:
    folder.mkdir(exist_ok=True)
    if file is None:
        file = folder / "layer.onnx"
        onnx.save(layer_of_experts(), file)
    for quantize in (None, "int4"):
        artifact = moec.compile(file, out=folder / f"layer-{quantize or 'f32'}", quantize=quantize)
        found = artifact.verify()  # ONNX Runtime runs the source
        print(f"{artifact.folder.name}: {artifact.report['bytes']:,} bytes, off by {found.relative:.1g}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "exported"), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
