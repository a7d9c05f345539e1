"""The config.json files of published models, alone: each is inspected and imported, soon, and into a short program."""

import json
import time

import pytest
from moec_command import invoke
from places import CONFIGS

SECONDS = 30  # of one core, for each command
# what is kept of the model -> lines of its program at stage moe, at most; its kinds of layers say why
LINES = {
    "DeepSeek-V3": 170,  # dense and experts
    "DeepSeek-V3.2": 300,
    "DeepSeek-V4-Flash": 400,
    "DeepSeek-V4-Flash-FP8-sgl": 400,  # of model_type deepseek_ref
    "DeepSeek-V4-Pro": 400,
    "GLM-4.5-Air": 90,
    "GLM-5.2": 420,  # layers with an indexer and layers that share one
    "Kimi-K2-Instruct": 170,  # of model_type kimi_k2
    "Llama-4-Scout-17B-16E-Instruct": 250,  # layers with positions and without
    "MiniMax-M2.5": 70,
    "OLMoE-1B-7B-0924": 60,
    "Qwen3-235B-A22B": 60,
    "Qwen3-Next-80B-A3B-Thinking": 210,
    "gpt-oss-20b": 130,
}


def run(*arguments):
    """Run a command and return its output; it has to succeed within the time."""
    start = time.process_time()
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert time.process_time() - start < SECONDS
    return result.stdout


def test_every_config_has_its_bound():
    assert sorted(LINES) == sorted(folder.name for folder in CONFIGS.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("name", LINES)
def test_a_config_alone(name, tmp_path):
    folder, file = CONFIGS / name, tmp_path / "program.moir"
    found = json.loads(run("inspect", str(folder), "--json"))
    assert found["parameters"]["total"] > 10**9
    run("compile", str(folder), "--stop-after", "moe", "-o", str(file))
    text = file.read_text()
    assert "moe.experts(" in text
    assert len(text.splitlines()) <= LINES[name]
