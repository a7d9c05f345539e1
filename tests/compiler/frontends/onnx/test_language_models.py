"""Language models in ONNX: moec's own, read back, and those of ONNX Runtime GenAI's builder and of mobius."""

import moec
import numpy as np
import pytest
from moec.compiler.frontends.families import FAMILIES
from tiny_models import random_model, save


def greedy_steps(artifact, ids, steps=8):
    """Return the logits of the last tokens, step by step, of padded prompts that are continued greedily."""
    session, rows = artifact.session(), len(ids)
    mask = np.ones(ids.shape, np.int64)
    mask[0, :2] = 0
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


@pytest.mark.long
@pytest.mark.parametrize("quantize", ["f32", "int4", "int8"])
def test_own_model_comes_back_with_the_same_numbers(checkpoint, quantize, tmp_path):
    first = moec.compile(checkpoint, out=tmp_path / "a", quantize=quantize)
    again = moec.compile(tmp_path / "a/model.onnx", out=tmp_path / "b")
    names = {op.name for op in moec.load(tmp_path / "b/program.moir").main.ops}
    assert "onnx.node" not in names and ("ort.moe" if quantize == "f32" else "ort.qmoe") in names
    assert [(s["past"], s["present"]) for s in again.manifest["states"]] == [
        (s["past"], s["present"]) for s in first.manifest["states"]
    ]
    ids = np.random.default_rng(0).integers(3, 90, (2, 7))
    wanted, found = greedy_steps(first, ids), greedy_steps(again, ids)
    assert np.array_equal(found.argmax(-1), wanted.argmax(-1))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


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
