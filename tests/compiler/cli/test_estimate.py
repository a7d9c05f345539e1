"""The small question, in one line: bytes as compiled, whether they fit, tokens a second from the measured bandwidth."""

import json
import re

import pytest
from click.testing import CliRunner
from moec.compiler import driver
from moec.compiler.cli.commands import main
from moec.compiler.text.printer import print_module
from moec.targets.systems.here import measure_here
from places import TINY


def invoke(*arguments):
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program of tiny-moe, traced once."""
    path = tmp_path_factory.mktemp("program") / "tiny.moir"
    path.write_text(print_module(driver.compile(TINY, stop_after="moe")))
    return path


@pytest.mark.long
def test_bytes_are_those_of_the_artifact(program, tmp_path):
    result = invoke(program, "--quantize", "int4", "--target", "cpu", "--context", 100, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    artifact = driver.compile(program, weights=TINY, out=tmp_path / "out", quantize="int4")
    stored = sum(artifact.report["files"][name] for name in ("model.onnx", "model.onnx.data"))
    assert found["weights"] == pytest.approx(stored, rel=0.1)
    counted = artifact.manifest["figures"]["counted"]["per_token"]["compiled_bytes_read"]
    each = {"f16": 2, "f32": 4}[artifact.manifest["states"][0]["dtype"]]  # as the artifact has kernels or not
    cache = 4 * 2 * 2 * 64 * 100 * each  # layers, keys and values, heads, width, tokens, bytes
    assert found["bytes_per_token"] == pytest.approx(counted + cache, rel=0.01)
    assert found["fits"] is True and found["needed"] > found["weights"] + cache
    bandwidth = measure_here().device.bandwidth.value
    assert found["tokens_per_second"] == pytest.approx(0.8 * bandwidth / found["bytes_per_token"])


def test_it_is_one_line(program):
    for target, asked in (("cpu", "int8"), ("nvidia-h200", "experts=mxfp4")):
        result = invoke(program, "--quantize", asked, "--target", target)
        assert result.exit_code == 0, result.stderr
        (line,) = result.stdout.splitlines()
        assert re.fullmatch(
            rf"{asked} for {target}: \S+ MB of weights, .* need; fits in .* GB; about \S+ tokens/s .*", line
        )


def test_wrong_use():
    assert "no format int5" in invoke(TINY, "--quantize", "int5").stderr
    assert "--batch is for accelerators" in invoke(TINY, "--quantize", "int4", "--batch", 2).stderr
