"""`moec plan` as typed, and `moec.plan`, which gives what --json prints and imports a config once."""

import json
import time

import moec
import pytest
from click.testing import CliRunner
from moec.compiler import driver
from moec.compiler.cli.commands import main
from places import ROOT

TINY = str(ROOT / "examples/tiny-moe")
ASKED = {"on": "nvidia-h200:8", "engine": "trtllm", "weights": "fp8", "tp": 2, "attention_dp": 1, "ep": 2, "pp": 1, "batch": 4, "input": 128, "output": 64}  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(main, ["plan", TINY, *arguments])


def typed(asked):
    return [text for name, value in asked.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def test_json_is_what_python_returns():
    result = invoke(*typed(ASKED), "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == moec.plan(TINY, **ASKED)
    assert found["degrees"] == {"tp": 2, "attention_dp": 1, "ep": 2, "moe_tp": 1, "pp": 1}
    assert found["instances"] == 4
    assert found["predicted"]["tpot_ms"] > 0 and found["predicted"]["ttft_ms"] > 0
    assert found["predicted"]["tokens_per_s_per_device"] > 0


def test_a_person_reads_what_matters_first():
    result = invoke("--on", "nvidia-h200:8", "--engine", "vllm", "--batch", "4", "--input", "128", "--output", "64")
    assert result.exit_code == 0, result.stderr
    lines = [line.split(maxsplit=1)[0] for line in result.stdout.splitlines() if line.strip()]
    assert lines[1:7] == ["fits", "plan", "first", "each", "a", "because"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--on", "nowhere"], "there is no system 'nowhere'"),
        (["--on", "nvidia-h200:8", "--tp", "2", "--attention-dp", "1", "--ep", "3", "--pp", "1"], "the nearest that works: --tp"),
        (["--on", "nvidia-h200:8", "--tpot", "50"], "not a time such as 50ms"),
        (["--on", "nvidia-h200:8", "--weights", "fp5"], "no format fp5"),
        (["--on", "nvidia-h200:8", "--input", "9999999"], "the model takes"),
        (["--on", "nvidia-h200:8", "--batch", "100000000", "--input", "128", "--output", "64"], "or --queue"),
    ],
)  # fmt: skip
def test_refusals(arguments, said):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_an_unknown_argument_from_python():
    with pytest.raises(moec.MoecError, match="plan takes no beach"):
        moec.plan(TINY, on="hgx-h200", beach=1)


def test_a_config_is_imported_once(monkeypatch):
    first = moec.plan(TINY, **ASKED)
    monkeypatch.setattr("moec.compiler.frontends.load.load", lambda *a, **k: pytest.fail("imported again"))
    assert moec.plan(TINY, **ASKED) == first


def test_a_changed_config_is_imported_again(tmp_path):
    text = (ROOT / "examples/tiny-moe/config.json").read_text("utf-8")
    (tmp_path / "config.json").write_text(text)
    before = driver.import_workload(tmp_path)
    changed = {**json.loads(text), "num_hidden_layers": 2}
    time.sleep(0.01)
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert driver.import_workload(tmp_path).blocks == 2 != before.blocks
