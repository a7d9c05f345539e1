"""A whole model whose weights and activations are multiplied as codes, in the simulator, against transformers in f32."""

import moec
import numpy as np
import pytest
import torch
from moec.compiler.runtime.compare import token_differences
from places import TINY
from transformers import AutoModelForCausalLM

CASES = [
    ("experts=fp8_b128,attention=fp8_b128", "nvidia-h200", "auto", "fp8_g128"),
    ("experts=fp8_b128,attention=fp8_b128", "amd-mi300x", "fp8", "fp8_g128"),
    ("experts=mxfp4", "amd-mi355x", "fp8", "mxfp8"),
    ("experts=mxfp8,attention=mxfp8", "ascend-950dt", "auto", "mxfp8"),
    ("experts=nvfp4", "nvidia-rtx5090", "fp4", "nvfp4"),
]


@pytest.mark.long
@pytest.mark.parametrize(("spec", "chip", "activations", "rounded"), CASES)
def test_products_of_codes_against_transformers(spec, chip, activations, rounded, tmp_path):
    """Weights of so few bits alone, with activations in bf16, take logits 0.07 off."""
    options = {"kernels": "source", "buckets": "16", "activations": activations}
    artifact = moec.compile(TINY, target=chip, out=tmp_path / "a", quantize=spec, options=options)
    program = (tmp_path / "a/program.moir").read_text("utf-8")
    assert f"to={rounded}" in program
    # what attention gives is rounded by a kernel of its own, all else where it is made, if parts of rows can be
    coded = (1 + ("attention" in spec), ("attention" in spec)) if rounded != "nvfp4" else (0, 2)
    assert (program.count("acc.norm"), program.count("acc.quantize")) == coded
    ids, mask, positions = np.arange(50, 66)[None], np.ones((1, 16), np.int64), np.arange(16)[None]
    found, _ = artifact.session(threads=1).step(ids, mask, positions)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits
    off = token_differences(found, wanted.numpy())
    assert np.median(off) <= 0.1 and off.max() <= 0.2
    ours, theirs = torch.from_numpy(found).log_softmax(-1), wanted.log_softmax(-1)
    assert (theirs.exp() * (theirs - ours)).sum(-1).mean() <= 0.05
