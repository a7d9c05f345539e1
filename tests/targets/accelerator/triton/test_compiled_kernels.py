"""Every kernel of whole models compiles for every GPU architecture, without spills, and takes what was predicted."""

import moec
import pytest
from chips_for_tests import needs_triton
from moec.targets.accelerator.artifact.objects import compile_kernels
from moec.targets.accelerator.artifact.spec import kernel_specs
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.triton.predict import agrees_with_prediction
from places import CONFIGS

# two buckets: decoding, and a prompt; a full matrix of buckets takes half an hour
TOKENS = (4, 8192)
UNITS = {
    "nvidia-h200": "wgmma", "nvidia-b200": "tcgen05", "nvidia-rtx5090": "mma", "amd-mi300x": "mfma", "amd-mi355x": "mfma",
    "nvidia-b300": "tcgen05", "nvidia-rtx4090": "mma", "nvidia-gb10": "mma",
}  # fmt: skip
PRODUCTS = ("grouped_up", "grouped_down", "linear", "gated_up", "attention")
CASES = [
    pytest.param(
        model, target, marks=() if (model, target) == ("OLMoE-1B-7B-0924", "nvidia-h200") else pytest.mark.long
    )
    for model in ("OLMoE-1B-7B-0924", "DeepSeek-V4-Flash")
    for target in (UNITS if model.startswith("OLMoE") else [*UNITS][:5])
]


@needs_triton
@pytest.mark.parametrize(("model", "target"), CASES)
def test_all_kernels_compile(model, target):
    profile = find_profile(target, {})
    module = moec.compile(CONFIGS / model, target=target, stop_after="kernel")
    made = compile_kernels(kernel_specs(module, profile, tokens=TOKENS), profile, "kernels")
    assert len(made.files) == len(made.kernels.kernels) >= 20
    wrong = []
    for kernel in made.kernels.kernels:
        (found,) = kernel.objects.values()
        assert "error" not in found, f"{kernel.name}: {found['error']}"
        assert found["spills"] == 0, kernel.name
        if not agrees_with_prediction(found["shared_predicted"], found["shared"]):
            wrong.append((kernel.name, kernel.best.tile, found["shared"], found["shared_predicted"]))
        if kernel.high == max(TOKENS) and kernel.kind in PRODUCTS and kernel.best.tile.m >= 64:
            assert UNITS[target] in found["instructions"], (kernel.name, kernel.best.tile, found["instructions"])
    prompt = [k for k in made.kernels.kernels if k.high == max(TOKENS) and k.kind == "grouped_up"]
    assert not wrong, wrong
    # where the fast instructions want 64 rows a prompt's experts have them
    assert prompt and all(k.best.tile.m >= 64 for k in prompt if UNITS[target] in ("wgmma", "tcgen05"))
