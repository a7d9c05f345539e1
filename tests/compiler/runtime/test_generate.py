"""Generation: batches, stopping, sampling, and text that comes in whole characters."""

import json

import numpy as np
import pytest
from moec.compiler.errors import MoecError
from moec.compiler.runtime import generate as generation
from moec.compiler.runtime.artifact import Artifact
from moec.compiler.runtime.generate import PromptCache, generate, left_pad, sample_token
from moec.compiler.runtime.tokenizer import TextStream, Tokenizer, load_tokenizer
from moec.targets.cpu.run.session import load_session

PROMPTS = [[5, 9, 2, 11, 30], [7], [3, 3, 8]]


def test_left_pad():
    ids, mask, positions = left_pad([[4, 5, 6], [9]])
    assert ids.tolist() == [[4, 5, 6], [0, 0, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_greedy_equals_transformers(tiny_lm):
    import torch

    model, folder = tiny_lm
    found = generate(load_session(folder), [PROMPTS[0]], max_new_tokens=20, greedy=True)
    wanted = model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert found.tokens == [wanted[0, 5:].tolist()]
    assert found.prompt_tokens == 5 and found.prefill_rate > 0 and found.decode_rate > 0


class Counting:
    """A session that notes how many tokens each step is given."""

    def __init__(self, session):
        self.session, self.sizes = session, []
        self.context, self.vocabulary = session.context, session.vocabulary

    def step(self, input_ids, *given, **options):
        self.sizes.append(input_ids.shape[1])
        return self.session.step(input_ids, *given, **options)


def test_a_conversation_runs_only_what_is_new(tiny_lm):
    session, cache = Counting(load_session(tiny_lm[1])), PromptCache()
    first = generate(session, PROMPTS[:1], max_new_tokens=4, greedy=True, cache=cache)
    longer = [[*PROMPTS[0], *first.tokens[0], 7, 8]]
    session.sizes.clear()
    second = generate(session, longer, max_new_tokens=4, greedy=True, cache=cache)
    assert session.sizes == [3, 1, 1, 1] and second.prompt_tokens == 3  # the last token of the answer, and two more
    assert second.tokens == generate(load_session(tiny_lm[1]), longer, max_new_tokens=4, greedy=True).tokens
    session.sizes.clear()
    other = [[1, *longer[0][1:]]]
    third = generate(session, other, max_new_tokens=2, greedy=True, cache=cache)
    assert session.sizes[0] == len(other[0])
    assert third.tokens == generate(load_session(tiny_lm[1]), other, max_new_tokens=2, greedy=True).tokens


@pytest.mark.parametrize("sampling", [{"greedy": True}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}])
def test_rows_of_a_batch_do_not_disturb_each_other(tiny_lm, sampling):
    session = load_session(tiny_lm[1])
    batch = generate(session, PROMPTS, max_new_tokens=12, **sampling)
    first = generate(session, PROMPTS[:1], max_new_tokens=12, **sampling)
    assert batch.tokens[0] == first.tokens[0]
    if "greedy" in sampling:
        assert batch.tokens[1] == generate(session, PROMPTS[1:2], max_new_tokens=12, **sampling).tokens[0]


def test_prefill_in_parts_gives_the_same(tiny_lm, monkeypatch):
    session = load_session(tiny_lm[1])
    whole = generate(session, PROMPTS, max_new_tokens=8, greedy=True)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 6)  # two columns of three rows a step
    assert generate(session, PROMPTS, max_new_tokens=8, greedy=True).tokens == whole.tokens


def test_stops_at_eos_row_by_row(tiny_lm):
    session = load_session(tiny_lm[1])
    free = generate(session, PROMPTS, max_new_tokens=12, greedy=True).tokens
    eos = {free[1][2]}
    seen = []
    found = generate(session, PROMPTS, max_new_tokens=12, greedy=True, eos=eos, on_token=lambda *a: seen.append(a))
    for row, tokens in enumerate(found.tokens):
        ends = [i for i, token in enumerate(free[row]) if token in eos]
        assert tokens == free[row][: ends[0] + 1 if ends else None]
        assert [token for r, token in seen if r == row] == tokens


def test_seed_decides(tiny_lm):
    session = load_session(tiny_lm[1])
    runs = [generate(session, [[1]], max_new_tokens=24, temperature=2.0, seed=s).tokens for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0][0]) == 24


def test_nothing_asked_for(tiny_lm):
    assert generate(load_session(tiny_lm[1]), [[1], [2]], max_new_tokens=0).tokens == [[], []]


def draw(logits, count=4000, **settings):
    rng = np.random.default_rng(0)
    drawn = [sample_token(np.asarray(logits, np.float32), rng, **settings) for _ in range(count)]
    return np.bincount(drawn, minlength=len(logits)) / count


def test_pick_follows_the_distribution():
    share = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(share[[2, 0, 3, 1]])
    np.testing.assert_allclose(draw(logits, temperature=1.0), share[[2, 0, 3, 1]], atol=0.03)
    hot = np.sqrt(share) / np.sqrt(share).sum()
    np.testing.assert_allclose(draw(logits, temperature=2.0), hot[[2, 0, 3, 1]], atol=0.03)
    np.testing.assert_allclose(draw(logits, temperature=1.0, top_k=2), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(draw(logits, temperature=1.0, top_p=0.79), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(draw(logits, temperature=1.0, top_p=0.3), [0, 1, 0, 0])
    np.testing.assert_allclose(draw(logits, temperature=1e-12), [0, 1, 0, 0])
    np.testing.assert_allclose(draw([*logits, -np.inf], temperature=1.0, top_p=0.9999)[4], 0)


def test_top_p_of_a_flat_distribution_needs_more_than_the_first_candidates():
    share = draw(np.zeros(4096), count=3000, temperature=1.0, top_p=0.5)
    assert 1024 < (share > 0).sum() <= 2049


def test_pick_takes_the_first_of_equals():
    assert sample_token(np.array([1.0, 3.0, 3.0], np.float32), np.random.default_rng(), 0.0) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_must_be_numbers(bad):
    with pytest.raises(MoecError, match="not finite") as caught:
        sample_token(np.array([1.0, bad, 2.0], np.float32), np.random.default_rng(), 1.0)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "no tokens"),
        ([[1], []], {}, "no tokens"),
        ([[1]], {"max_new_tokens": -1}, "number of new tokens"),
        ([[1]], {"temperature": -0.5}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": 0}, "top-k"),
        ([[1]], {"top_p": 0.0}, "top-p"),
        ([[1]], {"top_p": 1.5}, "top-p"),
        ([[1] * 65], {"max_new_tokens": 10}, "context of 64"),
    ],
)
def test_settings_that_mean_nothing(tiny_lm, prompts, settings, message):
    with pytest.raises(MoecError, match=message):
        generate(load_session(tiny_lm[1]), prompts, **settings)


# --- text --------------------------------------------------------------------------------------------------------

BYTES = Tokenizer(lambda text: list(text.encode()), lambda ids: bytes(ids).decode("utf-8", errors="replace"))


@pytest.mark.parametrize("text", ["plain words", "Grüße, 你好 🙂🙂!", "é" * 100, "end 🙂", ""])
def test_stream_gives_whole_characters(text):
    stream = TextStream(BYTES)
    pieces = [stream.push(token) for token in BYTES.encode(text)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert stream.finish() == ""


def test_stream_shows_broken_bytes_and_unfinished_characters():
    data = [*b"a", 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, *b"b", *"🙂".encode()[:3]]
    stream = TextStream(BYTES)
    text = "".join(stream.push(token) for token in data)
    assert text == "a" + 5 * "\ufffd" + "b"
    assert text + stream.finish() == BYTES.decode(data)


def test_stream_of_random_bytes_loses_nothing():
    data = np.random.default_rng(0).integers(0, 256, 400).tolist()
    stream = TextStream(BYTES)
    assert "".join(stream.push(t) for t in data) + stream.finish() == BYTES.decode(data)


@pytest.fixture(scope="module")
def tokenizer_json():
    """Return a byte-level BPE of 40 tokens in the form of tokenizer.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate("<>abcdefghijklmnopqrstuvwxyzĠĊ0123456789")}
    vocabulary["ab"] = vocabulary.pop("9")
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made.to_str()


@pytest.mark.parametrize("config", [None, {}, {"tokenizer_class": "PreTrainedTokenizerFast"}])
def test_load_tokenizer(tmp_path, tokenizer_json, config):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(tmp_path)
    assert found.decode(found.encode("abba cab")) == "abba cab"
    assert len(found.encode("abba")) == 3


def test_no_tokenizer_and_a_broken_one(tmp_path):
    with pytest.raises(MoecError, match="no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "--tokens" in caught.value.todo
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(MoecError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_artifact_run(tiny_lm_copy, tokenizer_json):
    artifact = Artifact.open(tiny_lm_copy)
    plain = artifact.run(tokens=[7, 8], max_new_tokens=6)
    assert len(plain.tokens) == 1 and plain.text is None  # no generation_config.json: greedy
    with pytest.raises(MoecError, match="no tokenizer"):
        artifact.run("ab")
    with pytest.raises(MoecError, match="either"):
        artifact.run()
    (tiny_lm_copy / "tokenizer.json").write_text(tokenizer_json)
    (tiny_lm_copy / "config.json").write_text(json.dumps({"eos_token_id": plain.tokens[0][3]}))
    artifact = Artifact.open(tiny_lm_copy)
    pieces = []
    found = artifact.run(tokens=[7, 8], max_new_tokens=6, on_text=lambda row, text: pieces.append(text))
    assert found.tokens == [plain.tokens[0][: plain.tokens[0].index(plain.tokens[0][3]) + 1]]
    assert "".join(pieces) == found.text[0]
    assert len(artifact.run(["ab", "abc d"], max_new_tokens=3, eos=()).tokens[1]) == 3


def test_artifact_takes_sampling_from_generation_config(tiny_lm_copy):
    path = tiny_lm_copy / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": [3, 4]}))
    artifact = Artifact.open(tiny_lm_copy)
    assert artifact.sampling() == {"temperature": 0.7, "top_k": 20, "top_p": 1.0}
    assert artifact.eos == {3, 4}
    path.write_text(json.dumps({"temperature": 0.7}))
    assert artifact.sampling()["temperature"] == 0
