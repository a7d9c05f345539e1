"""Whole models of the families through an accelerator's kernels, in the simulator, against transformers in f32 and bf16."""

import os
import subprocess
import sys

import moec
import numpy as np
import pytest
from chips_for_tests import needs_triton
from moec.compiler.frontends.families import FAMILIES
from moec.targets.accelerator.run.launchers import Simulated
from places import SUPPORT
from tiny_models import random_model
from whole_models import check_near, run_beside, takes_padding

STEPS = 3
ATTENTION = ("deepseek_v3", "gpt_oss", "deepseek_v4", "mimo_v2_flash", "llama4_text", "olmoe", "step3p7")  # a kind each
# with states that do not grow
RECURRENT = ("lfm2_moe", "qwen3_next", "jamba", "granitemoehybrid", "minimax", "kimi_linear")
# experts that the model's code spells out, or makes of weights
SPELLED = ("jetmoe", "muse_spark", "dbrx", "longcat_flash")
# other kinds of routing and attention: Sparsemixer, experts that mix with a state, an indexer, two kinds of heads, ...
OTHERS = (
    ("phimoe", "amd-mi355x"), ("zaya", "ascend-950dt"), ("gemma4_text", "amd-mi355x"), ("inkling_text", "ascend-950dt"),
    ("dots3_note_text", "amd-mi355x"), ("nemotron_h", "nvidia-h200"), ("axk2", "cambricon-mlu370"),
)  # fmt: skip
CHIPS = ("nvidia-h200", "amd-mi355x", "ascend-950dt", "cambricon-mlu370")
QUICK = (("gpt_oss", "amd-mi355x"),)
LONG = [
    pytest.param(f, c, marks=pytest.mark.long) for f in (*ATTENTION, *RECURRENT) for c in CHIPS if (f, c) not in QUICK
] + [pytest.param(f, c, marks=pytest.mark.long) for f, c in (*zip(SPELLED, CHIPS, strict=True), *OTHERS)]


@pytest.mark.parametrize(("family", "chip"), [*QUICK, *LONG])
def test_two_sequences_and_cached_steps(family, chip, tmp_path):
    """Most tokens are about as far off as those of the model in bf16, in the prefill and in the steps behind it."""
    model = random_model(FAMILIES[family])
    options = {"kernels": "source", "buckets": "4,64"}
    artifact = moec.compile(model, target=chip, out=tmp_path / "a", options=options)
    lengths = (12, 7) if takes_padding(artifact) else (12, 12)
    check_near(run_beside(model, family, artifact.session(threads=1), lengths, STEPS))


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "chip"),
    [("qwen3_next", "nvidia-h200"), ("jamba", "amd-mi355x"), ("granitemoehybrid", "ascend-950dt")],
)
def test_one_token_and_two_longer_sequences(family, chip, tmp_path):
    """States that do not grow: from one token on, and after 40 and 11 of which some are padding, by chunks or one by one."""
    model = random_model(FAMILIES[family])
    artifact = moec.compile(model, target=chip, out=tmp_path / "a", options={"kernels": "source", "buckets": "4,64"})
    assert takes_padding(artifact)
    for lengths in ((1,), (40, 11)):
        check_near(run_beside(model, family, artifact.session(threads=1), lengths, 8))


# wide enough latents for both forms: of latent attention, of that by indices (a step has more tokens than are chosen), of
# sliding, and of that without positions
LATENT = {
    "deepseek_v3": {"kv_lora_rank": 32, "num_hidden_layers": 2}, "deepseek_v32": {"kv_lora_rank": 32, "index_topk": 44}, "glm5_next": {"kv_lora_rank": 32},
    "dots3_note_text": {"kv_lora_rank": 32, "swa_kv_lora_rank": 32},
}  # fmt: skip
MANY = 40  # new tokens of a sequence, of which these forms need 32 to be expanded


@pytest.mark.parametrize(
    "family", [*list(LATENT)[:1], *(pytest.param(f, marks=pytest.mark.long) for f in list(LATENT)[1:])]
)
def test_both_forms_of_latent_attention(family, tmp_path, monkeypatch):
    """A prompt that is expanded and cached steps that are absorbed, and shorter prompts, of a token and of eleven."""
    model = random_model(FAMILIES[family], **LATENT[family])
    options = {"kernels": "source", "buckets": "4,128"}
    artifact = moec.compile(model, target="nvidia-h200", out=tmp_path / "a", options=options)
    run, ran = Simulated.__call__, []
    monkeypatch.setattr(
        Simulated, "__call__", lambda self, launch, *given: (ran.append(launch.name), run(self, launch, *given))
    )
    session = artifact.session(threads=1)
    second = 23 if takes_padding(artifact) else MANY
    for lengths, steps, expanded in (((1,), 0, False), ((11,), 0, False), ((MANY, second), 8, True)):
        ran.clear()
        far = run_beside(model, family, session, lengths, steps)
        check_near(far, (slice(1), slice(1, None)) if steps else (slice(None),))
        assert any("expand_keys" in name for name in ran) == expanded
        assert any("absorb" in name for name in ran) == (steps > 0 or not expanded)


@pytest.mark.long
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32"])
def test_latents_in_eight_bits(family, tmp_path):
    """Rounded on a chip whose E4M3 is at half, read absorbed, widened to be expanded, and read where they were chosen."""
    changes = {"kv_lora_rank": 32, "num_hidden_layers": 1, "first_k_dense_replace": 1}
    model = random_model(FAMILIES[family], **changes, **({"index_topk": 44} if family == "deepseek_v32" else {}))
    options = {"kernels": "source", "buckets": "4,128"}
    artifact = moec.compile(model, target="amd-mi325x", out=tmp_path / "a", kv="fp8", options=options)
    far, wide = run_beside(model, family, artifact.session(threads=1), (MANY, 23), 6)
    for part in (slice(1), slice(1, None)):
        off, least = (np.median(np.concatenate(rows[part])) for rows in (far, wide))
        assert 1.2 * least < off < 0.08, (off, least)


@needs_triton
@pytest.mark.parametrize(
    "name", ["gpt_oss", *(pytest.param(f, marks=pytest.mark.long) for f in ("deepseek_v3-", "deepseek_v32"))]
)
def test_one_in_the_interpreter(name):
    file = SUPPORT / "triton_whole_model.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short", file, "-k", name],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
