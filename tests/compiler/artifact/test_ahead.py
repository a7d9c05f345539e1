"""What is wrong with a request is said before the model is imported, in one message."""

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from moec.compiler.artifact.ahead import output_folder
from moec.compiler.frontends import load
from moec_command import invoke
from places import TINY


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Return a function that runs `moec compile` and returns its message; importing anything fails the test."""

    def no_import(*arguments, **options):
        pytest.fail("the model was imported")

    monkeypatch.setattr(load, "load", no_import)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, source=TINY):
        before = sorted(tmp_path.rglob("*"))
        result = invoke("compile", source, *arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
        assert len(result.stderr.splitlines()) <= 3 and len(result.stderr) < 400
        assert sorted(tmp_path.rglob("*")) == before
        return result.stderr

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "int5"], "there is no format int5"),
        (["--quantize", "experts=uint4_g23"], "did you mean"),
        (["--quantize", "expert=int4"], "pass quantize has no option expert"),
        (["--quantize", "int4,group=33"], "33 is no group size"),
        (["--quantize", "int4,group=x"], "option group of pass quantize is x, not an int"),
        (["--quantize", "int4,method=best"], "there is no method best"),
        (["--quantize", "int4,starved=no"], "starved is no"),
        (["--quantize", "keep,attention=int5"], "there is no format int5"),
        (["--quantize", ","], "--quantize is empty"),
        (["--quantize", "gone.json"], "the plan cannot be read: No such file or directory"),
        (["--quantize", "auto"], "--quantize auto needs a budget"),
        (["--quantize", "auto", "--budget", "4"], "'4' is no budget"),
        (["--quantize", "auto,method=gptq", "--budget", "4bpw"], "there is no calibration text"),
        (["--budget", "4bpw"], "a budget is for --quantize auto"),
        (["--quantize", "int4,method=gptq"], "there is no calibration text"),
        (["--quantize", "int4,method=gptq", "--calibration", "gone.txt"], "cannot read the calibration text: No such file"),
        (["--quantize", "int4,method=gptq", "--calibration", "empty.txt"], "the calibration text is empty"),
        (["--quantize", "int4,method=gptq", "--calibration", "folder"], "the calibration text is empty, or no file"),
        (["--pipeline", "cleanup,cleenup"], "there is no pass cleenup"),
        (["--pipeline", "cleanup{x=1}"], "pass cleanup has no option x"),
        (["--stop-after", "kernels"], "did you mean kernel?"),
        (["--target", "nvidia-h300"], "there is no target 'nvidia-h300'"),
        (["--memory-limit", "1kB"], "1000 bytes are too few"),
        (["-o", "file.txt"], "file.txt is a file, not a folder"),
        (["-o", "file.txt/a/out"], "file.txt is a file, not a folder"),
        (["-o", "full"], "full is not empty and was not written by moec"),
        (["--dump", "file.txt"], "no dumps can be written there"),
        (["--dump", "file.txt/x"], "no dumps can be written there"),
    ],
)  # fmt: skip
def test_wrong_requests(refused, tmp_path, arguments, message):
    for name in ("folder", "full"):
        (tmp_path / name).mkdir()
    for name, content in (("empty.txt", ""), ("file.txt", "x"), ("full/x", "x")):
        (tmp_path / name).write_text(content)
    assert message in refused(*arguments)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "nothing can be written in" in refused("-o", tmp_path / "closed" / "out")


def test_a_full_disk(refused, tmp_path, monkeypatch):
    """tiny-moe has 15.3 MB of bfloat16: the artifact in float32 takes twice that, in few bits a part of it."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, 10**6 if Path(place).exists() else 0))
    assert "GB, the disk has 0.001 GB left" in refused("-o", "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, 0))
    assert "the disk has 0 GB left" in refused("-o", "out", "--quantize", "int4")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": "hot"}, "temperature of generation_config.json cannot be 'hot'"),
        ({"eos_token_id": "2"}, "eos_token_id of generation_config.json is not a token id"),
    ],
)
def test_wrong_generation_config(refused, tmp_path, config, message):
    source = Path(shutil.copytree(TINY, tmp_path / "in"))
    (source / "generation_config.json").write_text(json.dumps(config))
    assert message in refused("-o", "out", source=source)


def test_room_is_judged_again_before_weights_are_read(tmp_path, monkeypatch):
    """A disk with room for half of the checkpoint, but not for all of it in float32."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**9, 10**9, 20 * 10**6))
    result = invoke("compile", TINY, "-o", tmp_path / "out")
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert "the artifact takes 0.03" in result.stderr


@pytest.mark.parametrize(
    "source, settings, name",
    [
        ("tiny", ("cpu",), "tiny-cpu"),
        ("tiny/", ("cpu", "int4"), "tiny-cpu-int4"),
        ("tiny", ("cpu", "int4,method=gptq"), "tiny-cpu-int4-method-gptq"),
        ("tiny", ("nvidia-h200", "auto", "4.5bpw"), "tiny-nvidia-h200-auto-4.5bpw"),
        ("tiny", ("cpu", "plans/quantization.json"), "tiny-cpu-quantization"),
        ("model-Q4_0.gguf", ("cpu",), "model-Q4_0-cpu"),
        ("org/name@v2", ("cpu", "int8"), "name@v2-cpu-int8"),
    ],
)
def test_the_default_name_tells_source_target_and_formats(tmp_path, monkeypatch, source, settings, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    target, quantize, budget = (*settings, None, None)[:3]
    assert output_folder(None, source, target, quantize, budget) == Path(name)
    assert output_folder("mine", source, target, quantize, budget) == Path("mine")
