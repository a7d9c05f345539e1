"""The library: programs as text, figures of a source, tokens one by one, logits and scores, sizes as text, what a program brings."""

import subprocess
import sys

import moec
import numpy as np
import pytest
from click.testing import CliRunner
from moec.compiler.cli.commands import main
from moec.compiler.rewrite.rules import rule
from moec.compiler.runtime.artifact import Artifact
from moec.compiler.weights.memory import parse_bytes
from places import ROOT

PROGRAM = """moec 1 stage graph
dim T in 1..64

func @main(%x: f32[T, 8])
    -> (f32[T, 8]) {
  %y = core.neg(%x) : f32[T, 8]
  %z = core.neg(%y) : f32[T, 8]
  return %z
}
"""
TOKENS = [5, 9, 2, 11, 30, 7, 3]
PLUGIN = '''
import moec
from moec.compiler.ops import op
from moec.compiler.rewrite.rules import rule

@op("mine.twice", "x: A[*X] -> y: A[*X]", flops=1)
def twice(x):
    """Double every number."""
    return x * 2

@rule(before="%y = core.neg(%x)\\n%z = core.neg(%y)", after="%z = core.abs(%x)")
def plugged_signs(m, target):
    """Take two signs for an absolute value."""

moec.register(plugged_signs)
'''


def test_a_module_is_its_text():
    module = moec.parse(PROGRAM)
    assert str(module) == PROGRAM and moec.parse(str(module)) == module
    assert "\n" not in repr(module) and "2 ops" in repr(module)


def test_what_there_is_is_found_by_name():
    assert "nvidia-h200" in moec.targets.TARGETS
    done = subprocess.run(
        [sys.executable, "-c", "import moec; print('cpu' in moec.targets.TARGETS)"], capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr


def test_a_config_is_inspected():
    found = moec.inspect(ROOT / "examples/tiny-moe", context=100)
    assert found["per_token"]["context"] == 100 and found["parameters"]["total"] > found["parameters"]["active"] > 0


def test_a_rule_of_ones_own_is_a_pass():
    @rule(before="%y = core.neg(%x)\n%z = core.neg(%y)", after="%z = core.abs(%x)")
    def two_signs(m, target):
        """Take two signs for an absolute value."""

    moec.register(two_signs)
    changed = moec.opt(moec.parse(PROGRAM), "two-signs")
    assert [op.name for op in changed.main.ops] == ["core.abs"]


def test_what_moec_has_is_not_registered():
    @rule(before="%y = core.neg(%x)\n%z = core.neg(%y)", after="%z = core.abs(%x)")
    def cleanup(m, target):
        """Not this one."""

    with pytest.raises(moec.MoecError, match="moec has cleanup itself"):
        moec.register(cleanup)
    with pytest.raises(moec.MoecError, match="a str cannot be registered"):
        moec.register("cleanup")


def test_a_plugin_is_a_file(tmp_path):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    text = PROGRAM.replace("-> (f32", "-> (f32").replace("return %z", "%w = mine.twice(%z) : f32[T, 8]\n  return %w")
    (tmp_path / "program.moir").write_text(text)
    done = CliRunner().invoke(
        main, ["opt", str(tmp_path / "program.moir"), "--plugin", str(tmp_path / "plugin.py"), "-p", "plugged-signs"]
    )
    assert done.exit_code == 0, done.output
    assert "core.abs" in done.stdout and "core.neg" not in done.stdout and "mine.twice" in done.stdout


def test_a_plugin_that_fails_says_why(tmp_path):
    (tmp_path / "plugin.py").write_text("1 / 0\n")
    done = CliRunner().invoke(main, ["--plugin", str(tmp_path / "plugin.py"), "list", "passes"])
    assert done.exit_code == 2 and "plugin.py cannot be run: ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(("text", "wanted"), [("500MB", 500_000_000), ("1.5GB", 1_500_000_000), (4096, 4096)])
def test_sizes_are_text_too(text, wanted):
    assert parse_bytes(text) == wanted


def test_a_size_that_is_none():
    with pytest.raises(moec.MoecError, match="'much' is not a size"):
        moec.compile(ROOT / "examples/tiny-moe", memory_limit="much")


def test_tokens_come_one_by_one(tiny_lm):
    artifact = Artifact.open(tiny_lm[1])
    wanted = artifact.run(tokens=TOKENS, max_new_tokens=12, greedy=True)
    stream = artifact.stream(tokens=TOKENS, max_new_tokens=12, greedy=True)
    assert next(stream).id == wanted.tokens[0][0]
    assert [token.id for token in stream] == wanted.tokens[0][1:]
    drawn = [t.id for t in artifact.stream(tokens=TOKENS, max_new_tokens=12, temperature=0.9, seed=3)]
    assert drawn == artifact.run(tokens=TOKENS, max_new_tokens=12, temperature=0.9, seed=3).tokens[0]


def test_logits_and_scores_equal_transformers(tiny_lm):
    import torch

    model, folder = tiny_lm
    artifact, tokens = Artifact.open(folder), (TOKENS * 8)[:50]  # more than one part
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    np.testing.assert_allclose(artifact.logits(tokens=tokens), wanted.numpy(), atol=1e-4 * float(wanted.abs().max()))
    scores = torch.log_softmax(wanted.double(), dim=-1)[torch.arange(49), torch.tensor(tokens[1:])]
    np.testing.assert_allclose(artifact.scores(tokens=tokens), scores.numpy(), atol=1e-4)
