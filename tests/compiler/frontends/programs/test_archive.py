"""Exported programs and `.pt2` files, from the library and the terminal; what a file may not hold."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import moec
import numpy as np
import pytest
import torch
import written_experts as written
from moec.compiler.errors import MoecError
from moec_command import invoke


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a module, its exported program with 1 to 64 tokens, and the file of it."""
    torch.manual_seed(0)
    module = written.Einsum().eval()
    tokens = torch.export.Dim("tokens", min=1, max=64)
    program = torch.export.export(module, (torch.randn(5, written.WIDTH),), dynamic_shapes=({0: tokens},))
    path = tmp_path_factory.mktemp("pt2") / "layer.pt2"
    torch.export.save(program, path)
    return module, program, path


@pytest.fixture(scope="module")
def artifact(exported, tmp_path_factory):
    return moec.compile(exported[2], out=tmp_path_factory.mktemp("a") / "layer")


def test_program_and_file_give_the_same_artifact(exported, artifact, tmp_path):
    module, program, _ = exported
    other = moec.compile(program, out=tmp_path / "b")
    assert (other.folder / "model.onnx").read_bytes() == (artifact.folder / "model.onnx").read_bytes()
    x = torch.randn(9, written.WIDTH)
    wanted = module(x).detach().numpy()
    assert np.abs(artifact(x) - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert np.array_equal(artifact(x=x.numpy()), artifact(x))
    assert artifact.manifest["dims"] == {"x_0": [1, 64]}
    assert artifact.verify().passed and artifact.verify(against=program).passed


@pytest.mark.parametrize(
    ("given", "named", "message"),
    [
        ((), {}, "the input x is missing"),
        ((np.zeros((2, 32), np.float64),), {}, "the input x is float64, f32 is wanted"),
        ((np.zeros((2, 31), np.float32),), {}, "axis 1 of the input x is 31 long, 32 is wanted"),
        ((np.zeros((65, 32), np.float32),), {}, "axis 0 of the input x is 65 long; the program takes 1 to 64"),
        ((np.zeros(32, np.float32),), {}, "the input x has the shape [32]"),
        ((np.zeros((2, 32), np.float32),), {"x": 1}, "the input x is given twice"),
        ((), {"y": 1}, "the input y is not known"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(artifact, given, named, message):
    with pytest.raises(MoecError, match=message.replace("[", r"\[")):
        artifact(*given, **named)


def test_it_is_no_language_model(artifact):
    with pytest.raises(MoecError, match="the artifact is no language model: it cannot continue a text"):
        artifact.run(tokens=[1, 2])


def test_terminal(exported, artifact, tmp_path):
    def run(*args):
        return invoke(*map(str, args))

    x = np.random.default_rng(0).standard_normal((3, written.WIDTH)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    done = run("run", artifact.folder, "--inputs", tmp_path / "x.npz", "--outputs", tmp_path / "y.npz")
    assert done.exit_code == 0, done.output
    with np.load(tmp_path / "y.npz") as found:
        assert np.array_equal(found["output"], artifact(x))
    shown = run("run", artifact.folder, "--inputs", tmp_path / "x.npz", "--json")
    assert np.allclose(json.loads(shown.output)["output"], artifact(x))
    verified = run("verify", artifact.folder)
    assert verified.exit_code == 0 and f"equal to {exported[2]}" in verified.output
    assert run("run", artifact.folder, "--inputs", exported[2]).exit_code == 2
    assert run("run", artifact.folder, "--prompt", "hi").exit_code == 2
    assert run("inspect", exported[2]).exit_code == 0


# --- files that are not trusted ----------------------------------------------------------------------------------


def rewritten(path, out, change):
    """Write the archive anew, each part as `change(name, content)` has it (None: left out)."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            content = change(info.filename.partition("/")[2], old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
        for name, content in getattr(change, "added", {}).items():
            new.writestr(f"layer/{name}", content)
    return out


class Touch:
    """What a pickle of somebody else would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def replaced(part, content):
    return lambda name, old: content(old) if name == part else old


MODEL = "models/model.json"
CHANGES = {
    "size": (replaced(MODEL, lambda c: c.replace(b"Integer(", b"__import__('os').getcwd(", 1)), "is no arithmetic"),
    "target": (
        replaced(MODEL, lambda c: c.replace(b"torch.ops.aten.silu.default", b"torch.os.system", 1)),
        "is not one of torch",
    ),
    "json": (replaced(MODEL, lambda c: c[:-20]), "is not JSON"),
    "deep": (replaced(MODEL, lambda c: b"[" * 100_000), "is not JSON: it is nested too deeply"),
    "no program": (lambda name, old: None if name == MODEL else old, "the file has 0 programs"),
    "no weight": (lambda name, old: None if name == "data/weights/weight_0" else old, "torch cannot read the program"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_file_is_refused(exported, tmp_path, name):
    change, message = CHANGES[name]
    with pytest.raises(MoecError, match=message):
        moec.compile(rewritten(exported[2], tmp_path / "bad.pt2", change), out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("part", ["data/sample_inputs/model.pt", "data/constants/custom_obj_0"])
def test_pickles_are_never_run(exported, tmp_path, part):
    content = io.BytesIO()
    if part.endswith(".pt"):
        torch.save((Touch(tmp_path / "run"),), content)
    else:
        content.write(pickle.dumps(Touch(tmp_path / "run")))

    def change(name, old):
        return None if name == part else old

    change.added = {part: content.getvalue()}
    with pytest.raises(MoecError, match="torch would run"):
        moec.compile(rewritten(exported[2], tmp_path / "bad.pt2", change), out=tmp_path / "a")
    assert not (tmp_path / "run").exists()


def test_file_that_is_no_archive(tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"not a zip")
    with pytest.raises(MoecError, match=r"is no archive of torch\.export\.save"):
        moec.compile(tmp_path / "x.pt2", out=tmp_path / "a")
