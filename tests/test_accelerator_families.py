"""Whole models of the families through an accelerator's kernels, in the simulator, against transformers in f32 and bf16."""

import os
import subprocess
import sys
from pathlib import Path

import moec
import numpy as np
import pytest
from chips_for_tests import needs_triton
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.runtime.compare import ROUNDING, token_differences
from moec.compiler.runtime.generate import left_pad
from moec.compiler.runtime.reference import Reference, rounded
from tiny_models import random_model

STEPS = 3
LEAST = 1e-3  # a difference that counts as none, where the model in bf16 happens to be nearer
ATTENTION = ("deepseek_v3", "gpt_oss", "deepseek_v4", "mimo_v2_flash", "llama4_text", "olmoe")  # a kind each
CHIPS = ("nvidia-h200", "amd-mi355x", "ascend-950dt", "cambricon-mlu370")
QUICK = (("deepseek_v3", "nvidia-h200"), ("gpt_oss", "amd-mi355x"))
LONG = [pytest.param(f, c, marks=pytest.mark.long) for f in ATTENTION for c in CHIPS if (f, c) not in QUICK]


@pytest.mark.parametrize(("family", "chip"), [*QUICK, *LONG])
def test_two_sequences_and_cached_steps(family, chip, tmp_path):
    """Most tokens are about as far off as those of the model in bf16, in the prefill and in each step."""
    model = random_model(FAMILIES[family])
    options = {"kernels": "source", "buckets": "4,64"}
    artifact = moec.compile(model, target=chip, out=tmp_path / "a", options=options)
    session = artifact.session(threads=1)
    model.set_attn_implementation("eager")
    exact = Reference.of(model, family)
    runners = (session, exact, rounded(exact))
    generator = np.random.default_rng(0)
    ids, mask, positions = left_pad([generator.integers(3, session.vocabulary, n).tolist() for n in (12, 7)])
    states = [None] * len(runners)
    for _ in range(1 + STEPS):
        both = [r.step(ids, mask, positions, s) for r, s in zip(runners, states, strict=True)]
        (found, wanted, bf16), states = zip(*both, strict=True)
        real = mask[:, -ids.shape[1] :].astype(bool)
        off, allowed = (np.median(token_differences(x[real], wanted[real])) for x in (found, bf16))
        assert off <= ROUNDING * allowed + LEAST, (off, allowed)
        ids = wanted[:, -1:].argmax(-1)
        mask, positions = np.pad(mask, ((0, 0), (0, 1)), constant_values=1), positions[:, -1:] + 1


@needs_triton
def test_one_in_the_interpreter():
    file = Path(__file__).with_name("triton_whole_model.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short", file],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
