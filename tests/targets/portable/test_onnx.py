"""Models of standard operators alone: in ONNX Runtime, and in the reference evaluator of the package onnx."""

import numpy as np
import onnx
import pytest
from moec.compiler import driver
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.targets import open_target
from onnx.reference import ReferenceEvaluator
from tiny_models import padded_batch, random_model, stepped


def all_nodes(nodes):
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from all_nodes(attribute.g.node)


def reference_logits(path, arrays, artifact):
    """Return what onnx itself computes for a step without past tokens."""
    session = ReferenceEvaluator(str(path))
    empty = {
        s["past"]: np.zeros([{"B": len(arrays["input_ids"]), "P": 0}.get(n, n) for n in s["shape"]], np.float32)
        for s in artifact.manifest["states"]
    }
    wanted = [o["name"] for o in artifact.manifest["outputs"]]
    return session.run(wanted, {**arrays, **empty, "logits_to_keep": np.array([0], np.int64)})[0]


@pytest.mark.parametrize(
    "family",
    [
        "qwen3_moe",
        *(pytest.param(f, marks=pytest.mark.long) for f in ("mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe")),
    ],
)
def test_a_model_of_standard_operators_computes_the_same(tmp_path, family):
    model = random_model(FAMILIES[family])
    artifact = driver.compile(model, "onnx", tmp_path / "out")
    path = artifact.folder / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    found = onnx.load(path, load_external_data=False)
    assert {(o.domain, o.version) for o in found.opset_import} == {("", 23)}
    assert {node.domain for node in all_nodes(found.graph.node)} == {""}
    ids, mask, positions = padded_batch(128, 9)
    wanted, _ = stepped(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    real, wanted = mask.numpy() > 0, wanted.numpy()
    arrays = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    names = {entry["name"] for entry in artifact.manifest["inputs"]}
    evaluated = reference_logits(path, {k: v for k, v in arrays.items() if k in names}, artifact)
    assert np.abs(evaluated - wanted)[real].max() < 1e-4 * np.abs(wanted[real]).max()
    session = artifact.session(spinning=False)
    first, states = session.step(ids[:, :6].numpy(), mask[:, :6].numpy(), positions[:, :6].numpy())
    second, _ = session.step(ids[:, 6:].numpy(), mask.numpy(), positions[:, 6:].numpy(), states)
    both = np.concatenate([first, second], 1)
    assert np.abs(both - wanted)[real].max() < 1e-4 * np.abs(wanted[real]).max()


@pytest.mark.long
@pytest.mark.parametrize(
    ("experts", "quantize"), [("packed", None), ("tiled", None), ("packed", "int4"), ("tiled", "int4")]
)
def test_openvino_computes_the_same(tmp_path, experts, quantize):
    openvino = pytest.importorskip("openvino")
    model = random_model(FAMILIES["qwen3_moe"])
    artifact = driver.compile(model, "onnx", tmp_path / "out", quantize=quantize, options={"experts": experts})
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.compile_model(str(artifact.folder / "model.onnx"), "CPU", exact)
    ids, mask, positions = padded_batch(128, 9)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    states = artifact.manifest["states"]
    past = {s["past"]: np.zeros([{"B": 3, "P": 0}.get(n, n) for n in s["shape"]], np.float32) for s in states}

    def step(first, last, past):
        arrays = {name: t[:, first:last].numpy() for name, t in given.items()} | {
            "attention_mask": mask[:, :last].numpy()
        }
        found = compiled({**arrays, **past})
        return found["logits"].copy(), {s["past"]: found[s["present"]].copy() for s in states}

    first, past = step(0, 6, past)
    second, _ = step(6, 9, past)
    if quantize:
        wanted, _ = artifact.session(spinning=False).step(ids.numpy(), mask.numpy(), positions.numpy())
    else:
        wanted = stepped(model, input_ids=ids, attention_mask=mask, position_ids=positions)[0].numpy()
    off = np.abs(np.concatenate([first, second], 1) - wanted)[mask.numpy() > 0]
    assert off.max() < 1e-4 * np.abs(wanted).max()


def test_what_has_no_standard_form_is_refused(tmp_path):
    with pytest.raises(MoecError, match="LinearAttention of com"):
        driver.compile(random_model(FAMILIES["qwen3_next"]), "onnx", tmp_path / "out")
    with pytest.raises(MoecError, match="there is no form loop of experts"):
        open_target("onnx", {"experts": "loop"})
    with pytest.raises(MoecError, match="target onnx has no option expert"):
        open_target("onnx", {"expert": "tiled"})


@pytest.mark.parametrize(
    ("quantize", "experts", "family"),
    [
        ("int4", "packed", "qwen3_moe"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                ("int8", "packed", "gpt_oss"),
                ("int4", "tiled", "qwen3_moe"),
                ("experts=int4_g16,attention=int8", "tiled", "mixtral"),
            ]
        ),
    ],
)
def test_a_quantized_model_is_decoded_along_rows(tmp_path, quantize, experts, family):
    """Codes of 4 bits are integers of 4 bits where all are read; onnx itself decodes them as ONNX Runtime does."""
    model = random_model(FAMILIES[family], num_hidden_layers=2)
    artifact = driver.compile(model, "onnx", tmp_path / "out", quantize=quantize, options={"experts": experts})
    path = artifact.folder / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    found = onnx.load(path, load_external_data=False)
    nodes = list(all_nodes(found.graph.node))
    assert {node.domain for node in nodes} == {""}
    ranks = {tensor.name: len(tensor.dims) for tensor in found.graph.initializer}
    for node in (n for n in nodes if n.op_type == "DequantizeLinear"):
        axis = next(a.i for a in node.attribute if a.name == "axis")
        assert axis > 0 and axis == ranks.get(node.input[0], axis + 1) - 1
    types = {tensor.data_type for tensor in found.graph.initializer}
    assert (onnx.TensorProto.UINT4 in types) == ("int4" in quantize)
    ids, mask, positions = padded_batch(128, 9)
    arrays = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
    evaluated = reference_logits(path, arrays, artifact)
    logits, _ = artifact.session(spinning=False).step(*arrays.values())
    # the operators of com.microsoft decode the same codes
    cpu = driver.compile(model, out=tmp_path / "cpu", quantize=quantize, accuracy="exact")
    wanted, _ = cpu.session(spinning=False).step(*arrays.values())
    real = mask.numpy() > 0
    assert np.abs(evaluated - logits)[real].max() < 1e-4 * np.abs(logits[real]).max()
    assert np.abs(wanted - logits)[real].max() < 1e-4 * np.abs(logits[real]).max()
    exact = stepped(model, input_ids=ids, attention_mask=mask, position_ids=positions)[0].numpy()
    assert 1e-4 < np.abs(exact - logits)[real].max() / np.abs(exact[real]).max() < 1
