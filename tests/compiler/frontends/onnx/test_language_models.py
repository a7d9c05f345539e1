"""Language models in ONNX: moec's own, read back, and those of ONNX Runtime GenAI's builder and of mobius."""

import moec
import numpy as np
import onnx
import onnxruntime
import pytest
from moec.compiler.frontends.families import FAMILIES
from onnx_files import filled_model
from tiny_models import random_model, save


def greedy_steps(artifact, ids, steps=8, padded=2):
    """Return the logits of the last tokens, step by step, of padded prompts that are continued greedily."""
    session, rows = artifact.session(), len(ids)
    mask = np.ones(ids.shape, np.int64)
    mask[0, :padded] = 0
    positions = np.clip(np.cumsum(mask, 1) - 1, 0, None)
    found, states = [], None
    for _ in range(steps):
        logits, states = session.step(ids, mask, positions, states)
        found.append(logits[:, -1])
        ids = found[-1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones((rows, 1), np.int64)], axis=1)
        positions = positions[:, -1:] + 1
    return np.stack(found)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the folder of a tiny model with experts."""
    return save(random_model(FAMILIES["olmoe"]), tmp_path_factory.mktemp("olmoe"))


@pytest.mark.parametrize(
    ("quantize", "kv", "states"),
    [
        ("int4", "auto", ["f16"]),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                ("f32", "f32", ["f32"]),
                ("int8", "bf16", ["bf16"]),
                ("int4", "int8", ["i8", "f32"]),
                ("grid4_g32", "auto", ["f16"]),
            ]
        ),
    ],
)
def test_own_model_comes_back_with_the_same_numbers(checkpoint, quantize, kv, states, tmp_path):
    """Weights keep their codes and caches their type; nothing of what moec's own functions compute stays in many ops."""
    first = moec.compile(checkpoint, out=tmp_path / "a", quantize=quantize, kv=kv)
    again = moec.compile(tmp_path / "a/model.onnx", out=tmp_path / "b")
    names = {op.name for op in moec.load(tmp_path / "b/program.moir").main.ops}
    experts = {"f32": "ort.moe", "grid4_g32": "ort.grid_experts"}.get(quantize, "ort.qmoe")
    attention = "ort.group_query_attention" if kv == "f32" else "ort.stored_attention"
    assert {experts, attention} <= names and "onnx.node" not in names
    # angles are not looked up by rows; of a grid the embedding is, which is decoded by plain ops
    assert ("core.take" in names) == (quantize == "grid4_g32")
    assert [s["dtype"] for s in again.manifest["states"]][: len(states)] == states
    for entries in ("states", "inputs"):
        assert again.manifest[entries] == first.manifest[entries]
    ids = np.random.default_rng(0).integers(3, 90, (2, 7))
    wanted, found = greedy_steps(first, ids), greedy_steps(again, ids)
    assert np.array_equal(found.argmax(-1), wanted.argmax(-1))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    if kv != "f32":  # ONNX Runtime rounds other numbers to int8 than moec's kernels do
        assert again.verify(lengths=(16,), steps=4, tokens=20).passed


def run_steps(file, ids, steps):
    """Return the logits of ONNX Runtime on a source, step by step, of prompts that are continued greedily."""
    session, rows = onnxruntime.InferenceSession(file), len(ids)
    inputs, names = {i.name: i for i in session.get_inputs()}, [o.name for o in session.get_outputs()]
    states = {}
    for name, entry in inputs.items():
        if name.startswith("past"):
            sizes = [n if isinstance(n, int) else 0 for n in entry.shape[1:]]
            states[name] = np.zeros([rows, *sizes[:2], sizes[2] or 16], np.float32)
    mask, found = np.ones(ids.shape, np.int64), []
    for _ in range(steps):
        positions = np.arange(mask.shape[1] - ids.shape[1], mask.shape[1])[None].repeat(rows, 0)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **states}
        made = session.run(None, {name: array for name, array in given.items() if name in inputs})
        results = dict(zip(names, made, strict=True))
        states = {name: results[name.replace("past_key_values", "present")] for name in states}
        found.append(results["logits"][:, -1])
        ids = found[-1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones((rows, 1), np.int64)], axis=1)
    return np.stack(found)


def growing_caches(file):
    """Return a copy of a model whose caches are no rings of a fixed length: these are of another size than what is past."""
    model = onnx.load(file)
    for node in model.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "sliding_window_cache"]
        del node.attribute[:]
        node.attribute.extend(kept)
    onnx.save(model, copy := file.with_name("growing.onnx"))
    return copy


@pytest.mark.long
@pytest.mark.parametrize("name", ["genai_gpt_oss", "mobius_qwen3_moe", "torch_olmoe"])
def test_models_of_other_exporters_are_raised(name, tmp_path):
    """What computes every expert, or copies weights for each token, computes the chosen ones; attention is one op."""
    file = tmp_path / "x.onnx"
    file.write_bytes(filled_model(name).SerializeToString())
    artifact = moec.compile(file, out=tmp_path / "a")
    ops = [op.name for op in moec.load(tmp_path / "a/program.moir").main.ops]
    assert ops.count("ort.moe") == ops.count("ort.group_query_attention") == 2
    assert not {"onnx.node", "core.matmul"} & set(ops)
    ids = np.random.default_rng(0).integers(3, 90, (2, 7))
    wanted = run_steps(growing_caches(file), ids, 12)
    if name != "genai_gpt_oss":  # whose caches are rings
        assert artifact.verify(lengths=(16,), steps=4, tokens=20).passed
    found = greedy_steps(artifact, ids, 12, padded=0)
    assert np.array_equal(found.argmax(-1), wanted.argmax(-1))
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_caches_of_plain_operators_become_states(tiny_lm, tmp_path):
    # GPT-2 by hand: caches are joined with Concat, attention is MatMul, Softmax and MatMul
    artifact = moec.load(tiny_lm[1])
    again = moec.compile(tiny_lm[1] / "model.onnx", out=tmp_path / "b")
    names = {op.name for op in moec.load(tmp_path / "b/program.moir").main.ops}
    assert "nn.cache_append" in names and "onnx.node" not in names
    assert again.manifest["dims"].keys() == artifact.manifest["dims"].keys()
    ids = np.random.default_rng(0).integers(3, 40, (2, 7))
    wanted, found = greedy_steps(artifact, ids), greedy_steps(again, ids)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
