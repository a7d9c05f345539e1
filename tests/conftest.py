"""Options of the test run, and a small language model that several tests run."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tiny_lm_artifact import write_tiny_lm

# The same examples in every run, whatever the machine: what must pass before a change lands does not depend on chance or load.
# New ones are looked for with HYPOTHESIS_PROFILE=explore; what it finds becomes an @example.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# two workers share two cores: more threads only wait for each other; commands that the tests start inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    """Add `--update`."""
    parser.addoption("--update", action="store_true", help="write the expected halves of tests/files anew")


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory):
    """Return a random GPT-2 of transformers and an artifact with the same weights, its ONNX written by hand."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2,
        activation_function="gelu_new",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("tiny_lm")
    write_tiny_lm(model, folder)
    return model, folder


@pytest.fixture
def tiny_lm_copy(tiny_lm, tmp_path):
    """Return a folder with a copy of the artifact, to be damaged."""
    return Path(shutil.copytree(tiny_lm[1], tmp_path / "artifact"))


@pytest.fixture
def one_thread():
    """Keep torch's threads from waiting for each other, and for those of ONNX Runtime, on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
