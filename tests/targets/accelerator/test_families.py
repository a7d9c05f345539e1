"""Whole models of the families through an accelerator's kernels, in the simulator, against transformers in f32 and bf16."""

import os
import subprocess
import sys

import moec
import numpy as np
import pytest
import torch
from chips_for_tests import needs_triton
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.runtime.compare import ROUNDING, token_differences
from moec.compiler.runtime.generate import left_pad
from moec.compiler.runtime.reference import Reference, reference_in_bf16
from places import SUPPORT, TINY
from tiny_models import meaning, random_model

STEPS = 3
LEAST = 1e-3  # a difference that counts as none, where the model in bf16 happens to be nearer
ATTENTION = ("deepseek_v3", "gpt_oss", "deepseek_v4", "mimo_v2_flash", "llama4_text", "olmoe", "step3p7")  # a kind each
# with states that do not grow
RECURRENT = ("lfm2_moe", "qwen3_next", "jamba", "granitemoehybrid", "minimax", "kimi_linear")
SPELLED = (
    "jetmoe",
    "muse_spark",
    "dbrx",
    "longcat_flash",
)  # experts that the model's code spells out, or makes of weights
CHIPS = ("nvidia-h200", "amd-mi355x", "ascend-950dt", "cambricon-mlu370")
QUICK = (("deepseek_v3", "nvidia-h200"), ("gpt_oss", "amd-mi355x"))
LONG = [
    pytest.param(f, c, marks=pytest.mark.long) for f in (*ATTENTION, *RECURRENT) for c in CHIPS if (f, c) not in QUICK
] + [pytest.param(f, c, marks=pytest.mark.long) for f, c in zip(SPELLED, CHIPS, strict=True)]


@pytest.mark.parametrize(("family", "chip"), [*QUICK, *LONG])
def test_two_sequences_and_cached_steps(family, chip, tmp_path):
    """Most tokens are about as far off as those of the model in bf16, in the prefill and in the steps behind it."""
    model = random_model(FAMILIES[family])
    options = {"kernels": "source", "buckets": "4,64"}
    artifact = moec.compile(model, target=chip, out=tmp_path / "a", options=options)
    session = artifact.session(threads=1)
    model.set_attn_implementation("eager")
    exact = Reference.of(model, family)
    runners = (session, exact, reference_in_bf16(exact))
    generator = np.random.default_rng(0)
    padding = "position_ids" in {i["name"] for i in artifact.manifest["inputs"]}  # else all rows have one length
    lengths = (12, 7) if padding else (12, 12)
    ids, mask, positions = left_pad([generator.integers(3, session.vocabulary, n).tolist() for n in lengths])
    states = [None] * len(runners)
    far: list[list[np.ndarray]] = [[], []]
    for _ in range(1 + STEPS):
        both = [r.step(ids, mask, positions, s) for r, s in zip(runners, states, strict=True)]
        (found, wanted, bf16), states = zip(*both, strict=True)
        real = mask[:, -ids.shape[1] :].astype(bool)
        for rows, logits in zip(far, (found, bf16), strict=True):
            rows.append(token_differences(logits[real], wanted[real]))
        ids = wanted[:, -1:].argmax(-1)
        mask, positions = np.pad(mask, ((0, 0), (0, 1)), constant_values=1), positions[:, -1:] + 1
    for part in (slice(1), slice(1, None)):
        off, allowed = (np.median(np.concatenate(rows[part])) for rows in far)
        assert off <= ROUNDING * allowed + LEAST, (off, allowed)


@pytest.mark.long
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("spec", ["experts=int4", "int8", "experts=mxfp4", "experts=nvfp4", "experts=fp8_b128"])
def test_stored_formats(spec, chip, tmp_path):
    """Against the program with the numbers that the codes stand for: a prefill and a cached step.

    It is the one before lowering, but for fp8: with its weights activations are rounded.
    """
    stage, tolerance = ("kernel", 0.03) if "fp8" in spec else ("moe", 0.01)
    options = {"kernels": "source", "buckets": "1,16"}
    artifact = moec.compile(TINY, target=chip, out=tmp_path / "a", quantize=spec, options=options)
    session, run = artifact.session(threads=1), meaning(TINY, spec, chip, stage)
    ids = np.arange(50, 61)[None]
    mask, positions = np.ones((1, 12), np.int64), np.arange(12)[None]
    found, states = session.step(ids, mask[:, :11], positions[:, :11])
    step, _ = session.step(np.array([[61]]), mask, positions[:, 11:], states)
    empty = [torch.zeros([{"B": 1, "P": 0}.get(n, n) for n in e["shape"]]) for e in artifact.manifest["states"]]
    whole = [torch.from_numpy(a) for a in (np.append(ids, [[61]], 1), mask, positions)]
    wanted = run([*whole, *empty])[0].numpy()
    off = token_differences(np.concatenate([found, step], 1), wanted)
    assert np.median(off) <= tolerance and off[-1] <= 2 * tolerance


@needs_triton
def test_one_in_the_interpreter():
    file = SUPPORT / "triton_whole_model.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short", file],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
