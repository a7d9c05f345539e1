"""ONNX files of torch's exporter, of modules that nobody prepared: ONNX Runtime on the source says what the artifact has to give."""

import moec
import numpy as np
import onnxruntime
import pytest
import torch
import written_experts as written
from moec.compiler.driver import compile_source
from onnx_files import filled_model

QUICK = {"Einsum", "IndexAdd", "Switch"}
KINDS = [
    pytest.param(kind.__name__, marks=[] if kind.__name__ in QUICK else [pytest.mark.long]) for kind in written.RAISED
]


def saved_model(name, folder):
    """Return the file of a kept graph with weights."""
    file = folder / f"{name}.onnx"
    file.write_bytes(filled_model(name).SerializeToString())
    return file


@pytest.mark.parametrize("name", KINDS)
def test_experts_are_raised_and_equal_onnx_runtime(name, tmp_path):
    file = saved_model(name, tmp_path)
    compiled = compile_source(file, out=tmp_path / "a")
    names = [op.name for op in compiled.module.main.ops]
    # nothing is left that computes an expert for every token
    assert {"ort.moe", "moe.experts"} & set(names), names
    assert not {"core.matmul", "onnx.node"} & set(names), names
    session = onnxruntime.InferenceSession(file)
    (entry,) = session.get_inputs()
    for tokens in (1, 7, 33):
        shape = [n if isinstance(n, int) else tokens for n in entry.shape]
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        (wanted,) = session.run(None, {entry.name: x})
        assert np.abs(compiled.artifact(x) - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.long
def test_program_is_that_of_the_torch_program(tmp_path):
    # both frontends read the same code: the ops are the same, and so are their types but for the name of a size
    module = written.MaskedSum().eval()
    from_torch = moec.compile(module, example_inputs=torch.randn(5, 32), stop_after="moe")
    from_onnx = moec.compile(saved_model("MaskedSum", tmp_path), stop_after="moe")
    assert [op.name for op in from_onnx.main.ops] == [op.name for op in from_torch.main.ops]


def test_int4_is_near_and_verified(tmp_path):
    file = saved_model("Einsum", tmp_path)
    artifact = moec.compile(file, out=tmp_path / "a", quantize="int4")
    found = artifact.verify()
    assert artifact.lossy and found.passed and 1e-4 < found.relative < 0.3
    assert found.against == str(file)
    again = moec.compile(tmp_path / "a" / "program.moir", out=tmp_path / "b")
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()
    assert again.verify(against=file).passed
