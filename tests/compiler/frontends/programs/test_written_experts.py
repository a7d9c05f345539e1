"""Torch modules that nobody prepared: what they give is what the artifact gives, and only chosen experts are computed."""

import subprocess
import sys

import moec
import numpy as np
import pytest
import torch
import written_experts as written
from moec.compiler.driver import compile_source
from moec.compiler.errors import MoecError
from places import ROOT


def example_of(kind, tokens=5):
    """Return a seeded module in eval mode, and tokens for it."""
    torch.manual_seed(0)
    module = kind().eval()
    shape = (2, tokens, written.WIDTH) if kind is written.EinsumOverBatches else (tokens, written.WIDTH)
    return module, torch.randn(*shape)


@pytest.mark.parametrize("kind", written.RAISED, ids=lambda kind: kind.__name__)
def test_experts_are_raised_and_equal_the_module(kind, tmp_path):
    module, x = example_of(kind)
    compiled = compile_source(module, example_inputs=x, out=tmp_path / "a")
    names = [op.name for op in compiled.module.main.ops]
    # nothing is left that computes an expert for every token
    assert {"ort.moe", "moe.experts"} & set(names) and "core.matmul" not in names, names
    for tokens in (1, 7, 33):
        _, x = example_of(kind, tokens)
        wanted = module(x).detach().numpy()
        found = compiled.artifact(x)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


REFUSED = {
    written.ExpertChoice: "chooses tokens for each expert (expert choice), not experts for each token",
    written.SoftMixture: "is a softmax over all experts: it is 0 for none",
    written.OneMissing: "of 8 experts those that are added up are [0, 1, 2, 3, 4, 5, 6]",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_is_no_choice_stays_and_says_why(kind, tmp_path):
    module, x = example_of(kind)
    compiled = compile_source(module, example_inputs=x, out=tmp_path / "a")
    assert any(REFUSED[kind] in note.reason for note in compiled.notes), [str(n) for n in compiled.notes]
    wanted = module(x).detach().numpy()
    assert np.abs(compiled.artifact(x) - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_code_that_depends_on_data_is_refused_with_its_line(tmp_path):
    module, x = example_of(written.OnlyThoseChosen)
    with pytest.raises(MoecError) as found:
        moec.compile(module, example_inputs=x, out=tmp_path / "a")
    assert "written_experts.py" in found.value.excerpt and "ids.unique()" in found.value.excerpt
    assert "loop over all experts" in found.value.todo
    assert not (tmp_path / "a").exists()


def test_int4_keeps_the_router_and_is_near(tmp_path):
    module, x = example_of(written.Einsum)
    artifact = moec.compile(module, example_inputs=x, out=tmp_path / "a", quantize="int4")
    wanted = module(x).detach().numpy()
    assert 1e-4 < np.abs(artifact(x) - wanted).max() / np.abs(wanted).max() < 0.2
    assert artifact.lossy and artifact.verify(against=module).passed


def test_training_mode_is_put_back(tmp_path):
    module, x = example_of(written.NoisyRouter)
    module.train()
    artifact = moec.compile(module, example_inputs=x, out=tmp_path / "a")
    assert module.training and all(part.training for part in module.modules())
    wanted = module.eval()(x).detach().numpy()
    assert np.abs(artifact(x) - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_example(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples/export_torch_module.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    # both forms have the same weights and the same experts: less than a sixth of the bytes with int4
    sizes = {a.name: sum(file.stat().st_size for file in a.glob("model.onnx*")) for a in tmp_path.iterdir()}
    assert abs(sizes["einsum-f32"] - sizes["loop-f32"]) < 1000
    assert sizes["loop-int4"] < sizes["loop-f32"] / 6
