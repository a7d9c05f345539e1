"""ONNX models written by hand: what is carried through, functions, external data, and what is refused."""

import json
import subprocess
import sys

import moec
import numpy as np
import onnx
import onnxruntime
import pytest
from moec.compiler.driver import compile_source
from moec.compiler.errors import MoecError
from moec_command import invoke
from onnx import TensorProto, helper, numpy_helper
from places import ROOT

RNG = np.random.default_rng(0)


def model_of(nodes, inputs, outputs, weights=(), opset=23, functions=(), domains=()):
    """Return a model; inputs and outputs are names with shapes, or with an element type too."""
    infos = [
        [helper.make_tensor_value_info(name, kind, shape) for name, shape, *rest in given for kind in rest or [TensorProto.FLOAT]]
        for given in (inputs, outputs)
    ]  # fmt: skip
    tensors = [numpy_helper.from_array(array, name) for name, array in dict(weights).items()]
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    graph = helper.make_graph(nodes, "main", *infos, tensors)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def run_model(model, *arrays):
    """Return what ONNX Runtime gives for arrays."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], arrays, strict=True)))


def test_unknown_operator_is_carried_with_its_reason(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Celu", ["h"], ["c"], alpha=0.5),
        helper.make_node("Mod", ["c", "m"], ["y"], fmod=1),
    ]
    weights = {"w": RNG.standard_normal((8, 4)).astype("f"), "m": np.float32([0.75])}
    model = model_of(nodes, [("x", ["T", 8])], [("y", ["T", 4])], weights, opset=18)
    onnx.save(model, tmp_path / "x.onnx")
    compiled = compile_source(tmp_path / "x.onnx", out=tmp_path / "a", check=True)
    assert [op.name for op in compiled.module.main.ops].count("onnx.node") == 2
    reason = "no op of the IR stands for the operator Celu"
    assert any(reason in str(note) for note in compiled.notes)
    unfused = json.loads((tmp_path / "a/moec.json").read_text())["unfused"]
    assert any(entry["reason"] == reason for entry in unfused)
    x = RNG.standard_normal((3, 8)).astype("f")
    assert np.allclose(compiled.artifact(x), run_model(model, x)[0], atol=1e-5)
    assert invoke("verify", str(tmp_path / "a")).exit_code == 0
    shown = invoke("compile", str(tmp_path / "x.onnx"), "--stop-after", "moe", "--why")
    assert reason in shown.stderr + shown.stdout


def test_functions_are_inlined_with_their_attributes():
    inner = helper.make_function(
        "mine", "Scaled", ["a"], ["b"],
        [helper.make_node("Constant", [], ["two"], value_float=2.0), helper.make_node("Mul", ["a", "two"], ["t"]),
         helper.make_node("Relu", ["t"], ["c"]), helper.make_node("Softmax", ["c"], ["b"])],
        [helper.make_opsetid("", 23)], ["axis"],
    )  # fmt: skip
    node = inner.node[3]
    node.attribute.append(onnx.AttributeProto(name="axis", ref_attr_name="axis", type=onnx.AttributeProto.INT))
    nodes = [
        helper.make_node("Scaled", ["x"], ["h"], domain="mine", axis=0),
        helper.make_node("Scaled", ["h"], ["y"], domain="mine", axis=1),
    ]
    model = model_of(nodes, [("x", ["T", 6])], [("y", ["T", 6])], functions=[inner], domains=["mine"])
    module = moec.load(model)
    assert [op.attributes.get("axis") for op in module.main.ops if op.name == "core.softmax"] == [0, 1]


def test_shapes_that_a_graph_computes_are_folded(tmp_path):
    # x.view(b, s, 2, 4).transpose(1, 2) as an exporter spells it
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["b"]),
        helper.make_node("Gather", ["shape", "one"], ["s"]),
        helper.make_node("Unsqueeze", ["b", "axes"], ["b1"]),
        helper.make_node("Unsqueeze", ["s", "axes"], ["s1"]),
        helper.make_node("Concat", ["b1", "s1", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["heads"]),
        helper.make_node("Transpose", ["heads"], ["y"], perm=[0, 2, 1, 3]),
    ]
    weights = {"zero": np.int64(0), "one": np.int64(1), "axes": np.int64([0]), "rest": np.int64([2, -1])}
    model = model_of(nodes, [("x", ["B", "S", 8])], [("y", ["B", 2, "S", 4])], weights)
    module = moec.load(model)
    assert [op.name for op in module.main.ops] == ["core.reshape", "core.transpose"]
    artifact = moec.compile(model, out=tmp_path / "a")
    x = RNG.standard_normal((2, 5, 8)).astype("f")
    assert np.array_equal(artifact(x), run_model(model, x)[0])


def test_half_floats_are_computed_in_f32(tmp_path):
    weights = {"w": RNG.standard_normal((8, 4)).astype(np.float16)}
    half = TensorProto.FLOAT16
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [("x", ["T", 8], half)], [("y", ["T", 4], half)], weights)  # fmt: skip
    onnx.save(model, tmp_path / "x.onnx")
    artifact = moec.compile(tmp_path / "x.onnx", out=tmp_path / "a")
    x = RNG.standard_normal((3, 8)).astype("f")
    assert np.allclose(artifact(x), x @ weights["w"].astype("f"), atol=1e-5)
    assert artifact.verify().passed


def save_external(folder, location, size=128, offset=None, length=None):
    """Write a model whose weight lies in a file."""
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [("x", ["T", 8])], [("y", ["T", 4])], {"w": np.zeros((8, 4), "f")})  # fmt: skip
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    folder.mkdir(exist_ok=True)
    (folder / "x.onnx").write_bytes(model.SerializeToString())
    (folder / "w.bin").write_bytes(RNG.standard_normal(size // 4).astype("f").tobytes())
    return folder / "x.onnx"


def test_external_data_is_read_where_it_lies(tmp_path):
    file = save_external(tmp_path / "m", "w.bin", size=256, offset=64)
    artifact = moec.compile(file, out=tmp_path / "a")
    w = np.frombuffer((tmp_path / "m/w.bin").read_bytes(), "f")[16:48].reshape(8, 4)
    x = RNG.standard_normal((3, 8)).astype("f")
    assert np.allclose(artifact(x), x @ w, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"location": "../secret.bin"}, "outside of the model's folder"),
        ({"location": "/etc/passwd"}, "outside of the model's folder"),
        ({"location": "link.bin"}, "outside of the model's folder"),
        ({"location": "gone.bin"}, "cannot open"),
        ({"location": "w.bin", "offset": 4}, "128 bytes"),
        ({"location": "w.bin", "length": 64}, "128 bytes"),
        ({"location": "w.bin", "offset": -1}, "no number"),
    ],
)
def test_external_data_stays_in_the_folder_and_the_file(options, message, tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(128))
    file = save_external(tmp_path / "m", **options)
    (tmp_path / "m/link.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(MoecError, match=message):
        moec.compile(file, out=tmp_path / "a")


def test_link_out_of_a_cache_is_followed(tmp_path):
    # as the Hugging Face cache has it: both are links to files that lie in one folder
    save_external(tmp_path / "blobs", "w.bin")
    (tmp_path / "snapshot").mkdir()
    for name in ("x.onnx", "w.bin"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    assert moec.compile(tmp_path / "snapshot/x.onnx", out=tmp_path / "a").folder == tmp_path / "a"


REFUSED = {
    "no graph": (onnx.ModelProto(), "no graph with outputs"),
    "opset": (model_of([helper.make_node("Relu", ["x"], ["y"])], [("x", [2])], [("y", [2])], opset=11), "opset 11"),
    "data": (
        model_of([helper.make_node("NonZero", ["x"], ["y"])], [("x", ["T"])], [("y", [1, "N"], TensorProto.INT64)]),
        "places|rows that a mask chooses",
    ),
    "domain": (
        model_of([helper.make_node("Foo", ["x"], ["y"], domain="mine")], [("x", [2])], [("y", [2])], domains=["mine"]),
        "mine.Foo",
    ),
    "cycle": (model_of([helper.make_node("Add", ["y", "x"], ["y"])], [("x", [2])], [("y", [2])]), "read before"),
    "types": (
        model_of([helper.make_node("Add", ["x", "z"], ["y"])], [("x", [2]), ("z", [3])], [("y", [2])]),
        "do not broadcast",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_reason(name, tmp_path):
    model, message = REFUSED[name]
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(MoecError, match=message) as found:
        moec.compile(tmp_path / "x.onnx", out=tmp_path / "a")
    assert "x.onnx" in found.value.where


def test_function_that_calls_itself_is_refused(tmp_path):
    node = helper.make_node("Again", ["a"], ["b"], domain="mine")
    inner = helper.make_function("mine", "Again", ["a"], ["b"], [node, node], [helper.make_opsetid("mine", 1)])
    model = model_of([helper.make_node("Again", ["x"], ["y"], domain="mine")], [("x", [2])], [("y", [2])], functions=[inner], domains=["mine"])  # fmt: skip
    with pytest.raises(MoecError, match="deep"):
        moec.load(model)


def test_example(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples/export_from_onnx.py", tmp_path],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    off = {line.split(":")[0]: float(line.split()[-1]) for line in done.stdout.splitlines()}
    assert off["layer-f32"] < 1e-5 < off["layer-int4"] < 0.5
    assert "ort.moe" in (tmp_path / "layer-f32/program.moir").read_text()


def test_file_that_is_no_model(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    with pytest.raises(MoecError, match="no ONNX model"):
        moec.compile(tmp_path / "x.onnx", out=tmp_path / "a")
    with pytest.raises(MoecError, match="No such file"):
        moec.compile(tmp_path / "y.onnx", out=tmp_path / "a")
