"""What the code of a model, or of a library, prints, logs and warns of does not reach the terminal of a command."""

import os
import subprocess
import sys

import pytest
from moec.compiler.frontends.families import FAMILIES

CODE = """
import sys
import warnings
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

class LoudConfig(LlamaConfig):
    model_type = "loud"

class LoudForCausalLM(LlamaForCausalLM):
    config_class = LoudConfig

    def forward(self, *args, **kwargs):
        print("printed while it ran")
        print("printed as an error", file=sys.stderr)
        warnings.warn("warned while it ran")
        logging.get_logger("transformers.loud").warning("logged while it ran")
        return super().forward(*args, **kwargs)
"""


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """Return a folder with the config of a model whose own code says a lot."""
    folder = tmp_path_factory.mktemp("loud")
    (folder / "modeling_loud.py").write_text(CODE)
    config = FAMILIES["llama"].config()
    config.auto_map = {
        "AutoConfig": "modeling_loud.LoudConfig",
        "AutoModelForCausalLM": "modeling_loud.LoudForCausalLM",
    }
    config.save_pretrained(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"model_type": "llama"', '"model_type": "loud"'))
    return folder


def compiled(loud, tmp_path, *options):
    command = [sys.executable, "-c", "from moec.compiler.cli import main; main()"]
    return subprocess.run(
        [*command, "compile", str(loud), "--stop-after", "graph", "--trust-remote-code", "-q", *options],
        capture_output=True, text=True, check=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)},
    )  # fmt: skip


def test_a_loud_model_is_not_heard(loud, tmp_path):
    result = compiled(loud, tmp_path)
    assert result.stderr == ""
    assert result.stdout.startswith("moec ") and "while it ran" not in result.stdout


@pytest.mark.long
def test_warnings_are_heard_with_debug(loud, tmp_path):
    result = compiled(loud, tmp_path, "--debug")
    assert "while it ran" not in result.stdout
    # what Python prints on sys.stderr is dropped while a model is traced; loggers hold the stream that they began with
    assert "logged while it ran" in result.stderr and "printed" not in result.stderr
