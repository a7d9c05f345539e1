"""The runtime session on a GPT-2 written to ONNX by hand: caches, padding, and everything that can be wrong."""

import json

import numpy as np
import pytest
from moec.compiler.artifact.manifest import SHAPE
from moec.compiler.errors import MoecError
from moec.compiler.runtime.artifact import Artifact
from moec.compiler.runtime.generate import left_pad
from moec.targets.cpu.run.session import load_session, usable_cores

PROMPTS = [[5, 9, 2, 11, 30], [7], [3, 3, 8]]


def positions(length, past=0):
    return np.arange(past, past + length)[None]


def feed(session, tokens, states=None, past=0):
    ids = np.array([tokens])
    return session.step(ids, np.ones((1, past + len(tokens)), np.int64), positions(len(tokens), past), states)


def test_logits_equal_transformers(tiny_lm):
    import torch

    model, folder = tiny_lm
    session = load_session(folder)
    assert (session.vocabulary, session.context, len(session.states)) == (40, 64, 4)
    logits, states = feed(session, PROMPTS[0])
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPTS[0]])).logits.numpy()
    np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())
    assert [tuple(s.shape()) for s in states] == [(1, 2, 5, 8)] * 4 and states.length == 5


def test_steps_equal_the_whole(tiny_lm):
    session = load_session(tiny_lm[1])
    tokens = [4, 8, 15, 16, 23, 4, 2]
    whole, _ = feed(session, tokens)
    first, states = feed(session, tokens[:3])
    parts, past = [first], 3
    for token in tokens[3:5]:
        logits, states = feed(session, [token], states, past)
        parts.append(logits)
        past += 1
    parts.append(feed(session, tokens[5:], states, past)[0])
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)


def test_padded_rows_equal_single_ones(tiny_lm):
    session = load_session(tiny_lm[1])
    ids, mask, where = left_pad(PROMPTS)
    batch, states = session.step(ids, mask, where)
    mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    after, _ = session.step(np.array([[1], [2], [3]]), mask, where[:, -1:] + 1, states)
    for row, prompt in enumerate(PROMPTS):
        alone, own = feed(session, prompt)
        np.testing.assert_allclose(batch[row, -len(prompt) :], alone[0], atol=1e-5)
        next_alone, _ = feed(session, [row + 1], own, len(prompt))
        np.testing.assert_allclose(after[row], next_alone[0], atol=1e-5)


def test_states_are_bound_not_copied(tiny_lm, monkeypatch):
    import onnxruntime

    session = load_session(tiny_lm[1])
    _, states = feed(session, [1, 2, 3])
    places = [s.data_ptr() for s in states]
    monkeypatch.setattr(onnxruntime.OrtValue, "numpy", None)  # nothing may ask for the caches' content
    seen = []
    bind = onnxruntime.IOBinding.bind_ortvalue_input
    monkeypatch.setattr(
        onnxruntime.IOBinding,
        "bind_ortvalue_input",
        lambda self, name, value: (seen.append(value.data_ptr()), bind(self, name, value)),
    )
    feed(session, [4], states, 3)
    assert seen == places


def test_old_states_stay_valid(tiny_lm):
    session = load_session(tiny_lm[1])
    _, states = feed(session, [1, 2, 3])
    first, _ = feed(session, [4], states, 3)
    feed(session, [9], states, 3)
    again, _ = feed(session, [4], states, 3)
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    ("ids", "mask", "where", "message"),
    [
        ((1, 0), (1, 0), (1, 0), "input_ids has the shape"),
        ((3,), (1, 3), (1, 3), "input_ids has the shape"),
        ((1, 3), (1, 2), (1, 3), "attention_mask has the shape"),
        ((1, 3), (1, 3), (1, 1), "position_ids has the shape"),
        ((1, 65), (1, 65), (1, 65), "context of 64"),
    ],
)
def test_wrong_sizes(tiny_lm, ids, mask, where, message):
    session = load_session(tiny_lm[1])
    with pytest.raises(MoecError, match=message):
        session.step(np.ones(ids, np.int64), np.ones(mask, np.int64), np.zeros(where, np.int64))


def test_wrong_tokens_and_states(tiny_lm):
    session = load_session(tiny_lm[1])
    with pytest.raises(MoecError, match="negative"):
        feed(session, [-1])
    for beyond in (40, 10**8, 2**63, 10**30):
        with pytest.raises(MoecError, match=r"outside of the vocabulary of 40 tokens|64-bit integers"):
            feed(session, [1, beyond])
    with pytest.raises(MoecError, match="cannot run the model"):  # positions beyond the table of positions
        session.step(np.ones((1, 1)), np.ones((1, 1)), np.full((1, 1), 100))
    _, states = feed(session, [1, 2])
    with pytest.raises(MoecError, match="not the states of a step"):
        feed(session, [1], list(states), 2)
    with pytest.raises(MoecError, match="states are those of 1 rows"):
        session.step(np.ones((2, 1)), np.ones((2, 3)), np.zeros((2, 1)), states)
    np.testing.assert_array_equal(feed(session, [1, 2])[0], feed(session, [1, 2])[0])  # it goes on working


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.onnx", lambda b: b[: len(b) // 2], "cannot open the model"),
        ("model.onnx", lambda b: b"", "cannot open the model|has no"),
        ("model.onnx.data", lambda b: b[:-100], "cannot open the model"),
        ("moec.json", lambda b: b.replace(b'"past": "past', b'"past": "lost', 1), "the model has no lost_key_values"),
        ("moec.json", lambda b: b.replace(b'"f32"', b'"q3"'), "cannot hold"),
        ("moec.json", lambda b: b.replace(b'"P", 8]}', b"2147483648, 8]}"), r"is .*2147483648.* in moec\.json"),
        ("moec.json", lambda b: b.replace(b'"P", 8]}', b'"P", 9]}'), r"is .*9.* in moec\.json"),
    ],
)
def test_damaged_files(tiny_lm_copy, name, change, message):
    damage(tiny_lm_copy, name, change)
    with pytest.raises(MoecError, match=message) as caught:
        load_session(tiny_lm_copy)
    assert caught.value.where.startswith(str(tiny_lm_copy)) and caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_missing_file(tiny_lm_copy, name):
    (tiny_lm_copy / name).unlink()
    with pytest.raises(MoecError, match=f"lacks {name}"):
        load_session(tiny_lm_copy)
    manifest = json.loads((tiny_lm_copy / "moec.json").read_text())
    del manifest["files"][name]
    (tiny_lm_copy / "moec.json").write_text(json.dumps(manifest))
    with pytest.raises(MoecError, match=r"has no model\.onnx|cannot open the model"):
        load_session(tiny_lm_copy)


def test_threads(tiny_lm):
    assert usable_cores() >= 1
    one = load_session(tiny_lm[1], threads=1)
    assert one.runtime.get_session_options().intra_op_num_threads == 1
    with pytest.raises(MoecError, match="threads"):
        load_session(tiny_lm[1], threads=0)


# --- the artifact around it --------------------------------------------------------------------------------------


def test_open_and_report(tiny_lm):
    artifact = Artifact.open(tiny_lm[1], check=True)
    assert artifact.target == "cpu" and not artifact.lossy
    report = artifact.report
    assert report["states"] == 4 and report["bytes"] == sum(report["files"].values()) > 0
    assert json.dumps(report)


def test_swapped_names_of_states_are_refused(tiny_lm_copy):
    """Two states of one shape whose names are exchanged: the wrong one would be read, and other tokens come out."""
    path = tiny_lm_copy / "moec.json"
    manifest = json.loads(path.read_text())
    first, second = manifest["states"][:2]
    assert first["shape"] == second["shape"]
    first["past"], second["past"] = second["past"], first["past"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(MoecError, match=f"{second['past']} comes back as {second['present']} in moec.json"):
        load_session(tiny_lm_copy)


def test_states_in_another_order_are_the_same(tiny_lm, tiny_lm_copy):
    path = tiny_lm_copy / "moec.json"
    manifest = json.loads(path.read_text())
    manifest["states"].reverse()
    path.write_text(json.dumps(manifest))
    np.testing.assert_array_equal(*(feed(load_session(f), PROMPTS[0])[0] for f in (tiny_lm[1], tiny_lm_copy)))


def test_an_artifact_of_the_first_version_runs(tiny_lm, tiny_lm_copy):
    """There was one schema so far, and its first manifests had none of the keys that may be missing."""
    path = tiny_lm_copy / "moec.json"
    manifest = json.loads(path.read_text())
    for key in SHAPE:
        if isinstance(key, str) and key.endswith("?"):
            manifest.pop(key[:-1], None)
    for state in manifest["states"]:
        state.pop("in_place", None)
    path.write_text(json.dumps(manifest))
    wanted, found = (
        Artifact.open(f).run(tokens=PROMPTS[0], max_new_tokens=8, greedy=True) for f in (tiny_lm[1], tiny_lm_copy)
    )
    assert found.tokens == wanted.tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1, "moec": "0"}', "source is missing"),
    ],
)
def test_wrong_manifest(tmp_path, text, message):
    (tmp_path / "moec.json").write_text(text)
    with pytest.raises(MoecError, match=message):
        Artifact.open(tmp_path)


def test_no_artifact(tmp_path):
    with pytest.raises(MoecError, match="no such folder"):
        Artifact.open(tmp_path / "nothing")
    with pytest.raises(MoecError, match=r"has no moec\.json"):
        Artifact.open(tmp_path)


def test_changed_file_is_found(tiny_lm_copy):
    damage(tiny_lm_copy, "model.onnx.data", lambda b: b[:-1] + bytes([b[-1] ^ 1]))
    Artifact.open(tiny_lm_copy)
    with pytest.raises(MoecError, match="sha256 differs"):
        Artifact.open(tiny_lm_copy, check=True)


def test_files_outside_are_refused(tiny_lm_copy):
    damage(tiny_lm_copy, "moec.json", lambda b: b.replace(b'"model.onnx":', b'"../model.onnx":'))
    with pytest.raises(MoecError, match="outside of the artifact"):
        Artifact.open(tiny_lm_copy)
