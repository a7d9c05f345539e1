"""Each example of the folder runs as its first lines say, and is short enough to be read at once."""

import subprocess
import sys

import pytest
from places import ROOT

NAMES = ("compile_and_run", "plain_onnxruntime", "own_rule", "own_op", "plan_bits", "serve_and_ask")
LONGEST = 60  # lines


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """Return the folder that the first example writes, and what that says."""
    folder = tmp_path_factory.mktemp("examples") / "tiny"
    return folder, run_example("compile_and_run", folder)


def run_example(name, *arguments):
    command = [sys.executable, ROOT / f"examples/{name}.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file", [*(f"{name}.py" for name in NAMES), "own_chip.toml"])
def test_it_is_short(file):
    assert len((ROOT / "examples" / file).read_text("utf-8").splitlines()) < LONGEST


def test_own_rule():
    text = run_example("own_rule")
    assert "%square = core.mul(%x, %x)" in text and "%cube = core.pow(" in text and "the exponent is not 2" in text


def test_own_op():
    assert run_example("own_op").splitlines() == ["[-2.0, -0.924, 0.924, 2.0]", "FLOPs: 12*B"]  # 2 tanh(x / 2)


@pytest.mark.long
def test_compile_and_run(artifact):
    folder, text = artifact
    assert text.startswith("class Stack:") and "tokens/s; " in text and (folder / "model.onnx").is_file()


@pytest.mark.long
def test_plain_onnxruntime_gives_the_tokens_of_moec(artifact):
    from moec import Artifact

    folder, _ = artifact
    found = Artifact.open(folder).run("class Stack:", max_new_tokens=16, temperature=0.0).text[0]
    assert run_example("plain_onnxruntime", folder, "class Stack:") == found + "\n"


@pytest.mark.long
def test_serve_and_ask(artifact):
    pytest.importorskip("uvicorn")
    from moec import Artifact

    folder, _ = artifact
    found = Artifact.open(folder).run("def main():", max_new_tokens=16, temperature=0.0).text[0]
    assert run_example("serve_and_ask", folder) == found + "\n"


@pytest.mark.long
def test_plan_bits(tmp_path):
    text = run_example("plan_bits", tmp_path)
    assert "bits a weight, expected KL" in text and "int8_g64" in text


@pytest.mark.long
def test_own_chip():
    from moec.compiler.driver import predict
    from moec.compiler.frontends.load import load

    chip = str(ROOT / "examples/own_chip.toml")
    found = predict(load(ROOT / "examples/tiny-moe").module, chip, past=100)
    assert found["target"] == "own-chip" and found["time"] > found["bytes"]["weights"] / 1.5e12
