"""Comparing with the source model: equal where it is equal, and what a difference looks like."""

import copy
import json
import math

import moec
import numpy as np
import pytest
from moec.compiler.errors import MoecError
from moec.compiler.runtime.artifact import Artifact, record_figures
from moec.compiler.runtime.compare import SAMPLE, compare_prompts, compare_with_source, token_differences
from moec.compiler.runtime.reference import Reference, open_reference
from moec.compiler.runtime.text_score import TextScore, score_text
from moec.compiler.runtime.verdict import verdict_line

SMALL = {"tokens": 60, "steps": 12}


class Changed:
    """A runner that changes the logits of another one."""

    def __init__(self, runner, change):
        self.runner, self.change = runner, change

    def step(self, input_ids, attention_mask, position_ids, states=None, last=0):
        logits, states = self.runner.step(input_ids, attention_mask, position_ids, states)
        return self.change(logits, attention_mask.shape[1] - input_ids.shape[1]), states


def changed(artifact, change):
    return Changed(artifact.session(spinning=False), change)


def add_noise(size):
    rng = np.random.default_rng(0)
    return lambda logits, past: logits + size * rng.standard_normal(logits.shape).astype(np.float32)


def test_an_equal_model_passes(tiny_lm):
    model, folder = tiny_lm
    ticks = []
    with moec.watch_progress(ticks.append):
        found = compare_with_source(Artifact.open(folder), model, **SMALL)
    assert found.passed and found.relative < 1e-5
    assert [case.lengths for case in found.cases] == [(33, 19, 6), (33, 19, 6), (1,), (7,), (33,)]
    assert [case.greedy for case in found.cases] == [13, 2, 9, 9, 9]
    assert found.text.kl_max < 1e-8 and found.text.top1 == 1 and found.text.tokens == 59
    assert found.text.perplexity == pytest.approx(found.text.reference_perplexity, rel=1e-5)
    parts = [tick.done for tick in ticks if tick.phase == "verifying" and tick.done]
    assert parts == list(range(1, ticks[-2].total + 1)) and ticks[-1].seconds is not None
    assert json.dumps(found.to_dict(), allow_nan=False) and "equal to" in found.lines()[-1]


def test_a_wrong_prefill_fails(tiny_lm):
    model, folder = tiny_lm
    artifact = Artifact.open(folder)
    found = compare_with_source(artifact, model, session=changed(artifact, add_noise(0.05)), **SMALL)
    assert not found.passed and found.relative > 1e-3
    assert found.text.kl_mean > 1e-5 and found.text.perplexity != found.text.reference_perplexity
    assert "differs" in found.lines()[-1]


def test_a_wrong_cache_is_seen_in_decode_only(tiny_lm):
    model, folder = tiny_lm
    artifact = Artifact.open(folder)
    wrong = changed(artifact, lambda logits, past: logits * (1.01 if past > 36 else 1))
    found = compare_with_source(artifact, model, session=wrong, **SMALL)
    assert found.cases[0].prefill < 1e-5 < 1e-3 < found.cases[0].decode
    assert not found.passed


def test_padding_is_left_out(tiny_lm):
    model, folder = tiny_lm

    def spoil(logits, past):
        if past == 0:
            logits[1, :3] = np.nan
        return logits

    wrong = changed(Artifact.open(folder), spoil)
    found = compare_prompts(wrong, Reference.of(model, "model"), [[1, 2, 3, 4, 5], [6, 7]], 3)
    assert found.prefill < 1e-5 and found.greedy_agrees


def test_a_lossy_artifact_reports(tiny_lm_copy, tiny_lm):
    path = tiny_lm_copy / "moec.json"
    path.write_text(path.read_text().replace('"lossy": false', '"lossy": true'))
    artifact = Artifact.open(tiny_lm_copy)
    found = compare_with_source(artifact, tiny_lm[0], session=changed(artifact, add_noise(0.05)), **SMALL)
    assert found.passed and not found.lossless and found.relative > 1e-3
    broken = changed(artifact, lambda logits, past: logits * np.nan)
    found = compare_with_source(artifact, tiny_lm[0], session=broken, **SMALL)
    assert not found.passed and found.to_dict()["relative"] is None
    figures = record_figures(tiny_lm_copy, found.to_dict()).manifest["figures"]
    assert figures["passed"] is False


def test_greedy_tokens_may_differ_in_a_tie():
    class Fixed:
        def __init__(self, logits):
            self.logits = np.array(logits, np.float32)

        def step(self, ids, mask, positions, states=None, last=0):
            return np.broadcast_to(self.logits, (*ids.shape, len(self.logits))).copy(), ()

    tie = compare_prompts(Fixed([1.0, 2.0, 2.0001]), Fixed([1.0, 2.0001, 2.0]), [[1, 2]], 4)
    assert tie.greedy == 0 and tie.tie and tie.greedy_agrees
    other = compare_prompts(Fixed([1.0, 2.0, 2.1]), Fixed([1.0, 2.1, 2.0]), [[1, 2]], 4)
    assert not other.tie and not other.greedy_agrees


def test_relative():
    wanted = np.array([[1.0, -4.0, 2.0]], np.float32)
    assert token_differences(wanted, wanted) == 0
    assert token_differences(wanted + 0.4, wanted) == pytest.approx(0.1)
    masked = np.array([[1.0, -np.inf, 2.0]], np.float32)
    assert token_differences(masked, masked) == 0
    assert np.isnan(token_differences(wanted, masked)) and np.isnan(token_differences(masked, wanted))
    assert np.isnan(token_differences(wanted * np.nan, wanted))


def test_scores_are_what_the_formulas_say():
    class Table:
        def __init__(self, shares):
            self.logits = np.log(np.array(shares)).astype(np.float32) + 3

        def step(self, ids, mask, positions, states=None, last=0):
            return self.logits[ids], ()

    p = [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]
    q = [[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [0.1, 0.3, 0.6]]
    found = score_text(Table(q), Table(p), [np.array([0, 1, 2, 0])])
    kl = [sum(a * math.log(a / b) for a, b in zip(p[i], q[i], strict=True)) for i in (0, 1, 2)]
    assert found.kl_mean == pytest.approx(np.mean(kl), rel=1e-4) and found.kl_max == pytest.approx(max(kl), rel=1e-4)
    assert found.top1 == pytest.approx(2 / 3) and found.top1_bf16 is None
    bf16 = Table([[0.1, 0.8, 0.1], [0.5, 0.4, 0.1], [0.1, 0.3, 0.6]])  # agrees on the first and the last
    assert score_text(Table(q), Table(p), [np.array([0, 1, 2, 0])], bf16=bf16).top1_bf16 == pytest.approx(2 / 3)
    assert found.perplexity == pytest.approx((0.5 * 0.1 * 0.1) ** (-1 / 3), rel=1e-4)
    assert found.reference_perplexity == pytest.approx((0.25 * 0.1 * 0.2) ** (-1 / 3), rel=1e-4)


def test_the_context_limits_what_is_compared(tiny_lm):
    found = compare_with_source(Artifact.open(tiny_lm[1]), tiny_lm[0], lengths=(60, 200), tokens=100)
    shapes = [(case.lengths, case.steps) for case in found.cases]
    assert shapes == [((64, 38, 12), 0), ((64, 38, 12), 0), ((60,), 4), ((64,), 0)]
    assert found.passed


def test_a_live_model_is_left_as_it_was(tiny_lm):
    import torch

    model = copy.deepcopy(tiny_lm[0]).to(torch.bfloat16).train()
    attention = model.config._attn_implementation
    with open_reference(model) as reference:
        assert reference.model.dtype == torch.float32
    assert model.dtype == torch.bfloat16 and model.training and model.config._attn_implementation == attention
    other = copy.deepcopy(tiny_lm[0]).train()
    with open_reference(other) as reference:
        assert reference.model is other and not other.training
    assert other.training and other.config._attn_implementation == attention


def test_a_folder_with_experts_and_a_missing_tensor(tmp_path):
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    # loaded and not converted: .to(bfloat16) rounds the rope frequencies too
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with open_reference(tmp_path) as reference, open_reference(model) as live:
        assert (reference.context, reference.vocabulary) == (64, 64)
        case = compare_prompts(reference, live, [[1, 2, 3, 4, 5, 6, 7], [8, 9]], 6, split=True)
        assert case.prefill < 1e-5 and case.decode < 1e-5 and case.greedy == 7
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lacking = pytest.raises(MoecError, match=r"lacks 1 tensors, such as model\.layers\.1\.mlp\.gate")
    with lacking, open_reference(tmp_path):
        pass


def test_sources_that_cannot_be_compared_with(tiny_lm, tmp_path):
    artifact = Artifact.open(tiny_lm[1])
    with pytest.raises(MoecError, match="does not name a source"):
        artifact.verify()
    with pytest.raises(MoecError, match="is not there"):
        artifact.verify(tmp_path / "nothing")
    with pytest.raises(MoecError, match="cannot be compared with"):
        artifact.verify(42)
    with pytest.raises(MoecError, match="no tokenizer for the text"):
        artifact.verify(tiny_lm[0], text="words")


def test_the_sample_text_is_there():
    text = SAMPLE.read_text("utf-8")
    assert 2500 < len(text) < 4000 and "def " in text


@pytest.mark.parametrize(
    "bits, kl, wanted",
    [
        (4.9, 0.031, "as much as is usual"),  # q4_K_M of Llama 3 8B in llama.cpp
        (6.57, 0.0055, "as much as is usual"),  # q6_K
        (4.5, 0.01, "less than is usual"),
        (8.6, 0.1, "compared with"),  # nothing of so many bits was measured
        (5.0, 0.08, "more than is usual"),
        (5.0, 0.5, "far more than is usual"),
        (5.0, math.nan, "no numbers"),
    ],
)
def test_verdict(bits, kl, wanted):
    line = verdict_line("tiny", bits, TextScore("text", 9, kl, 1.0, 0.9, 11.0, 10.0))
    assert wanted in line and line.endswith("top-1 agreement 90.0%, perplexity +10.00%")
