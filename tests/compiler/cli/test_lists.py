"""Lists of what there is, one of it in full, what a shell completes, and options that would be ignored."""

import json
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from moec.compiler.cli.commands import main
from moec.compiler.cli.table import show_rows
from moec.compiler.weights.memory import capped_threads, usable_threads
from places import ROOT


def invoke(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def test_one_op_is_shown_in_full():
    shown = invoke("list", "ops", "moe.experts").stdout
    assert shown.startswith("name: moe.experts\nsignature: x: A[T, D], ids: i64[T, K]") and "act=gated(silu)" in shown
    row = json.loads(invoke("list", "ops", "moe.experts", "--json").stdout)
    assert len(row) == 1 and row[0]["doc"].count("\n\n") >= 1
    assert (
        "\n\n"
        not in next(r for r in json.loads(invoke("list", "ops", "--json").stdout) if r["name"] == "moe.experts")["doc"]
    )


def test_one_rule_is_shown_with_both_sides():
    shown = invoke("list", "rules", "square_into_rms_norm").stdout
    assert "\nbefore:\n  %" in shown and "\nafter: %y = nn.rms_norm" in shown


def test_an_unknown_name_has_others_near_it():
    result = invoke("list", "ops", "moe.expert")
    assert result.exit_code == 2 and "did you mean moe.experts" in result.stderr


@pytest.mark.parametrize("what", ["ops", "passes", "rules", "families", "formats", "systems"])
def test_lists_fit_80_columns(what, monkeypatch, capsys):
    """On a terminal of 80 columns no line is longer; in a pipe every row is one line."""
    rows = json.loads(invoke("list", what, "--json").stdout)
    plain = invoke("list", what).stdout.splitlines()
    assert len(plain) == len(rows) + 2
    monkeypatch.setattr("moec.compiler.cli.table.PIPE_WIDTH", 80)
    show_rows(rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(row["name"][:40]) for line in lines) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "incomplete", "wanted"),
    [
        (["compile", "x", "--target"], "nvidia-h2", ["nvidia-h20", "nvidia-h20-3e", "nvidia-h200"]),
        (["compile", "x", "--quantize"], "experts=int4,he", ["experts=int4,head="]),
        (["compile", "x", "--quantize"], "experts=mxf", ["experts=mxfp4", "experts=mxfp8"]),
        (["opt", "x", "-p"], "cleanup,lift", ["cleanup,lift-moe"]),
        (["list", "ops"], "moe.exp", ["moe.experts"]),
        (["targets"], "ascend-910", ["ascend-910b", "ascend-910c"]),
    ],
)
def test_a_shell_completes(arguments, incomplete, wanted):
    shell = ShellComplete(main, {}, "moec", "_MOEC_COMPLETE")
    assert sorted(item.value for item in shell.get_completions(arguments, incomplete)) == wanted


def test_the_line_of_the_readme_completes_in_bash():
    command = [sys.executable, "-c", "from moec.compiler.cli.commands import main; main(prog_name='moec')"]
    done = subprocess.run(command, env={"_MOEC_COMPLETE": "bash_complete", "COMP_WORDS": "moec com", "COMP_CWORD": "1",
                                        "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.split() == ["plain,compile"]
    assert "_MOEC_COMPLETE=bash_source moec" in (ROOT / "README.md").read_text()


def test_threads_are_those_that_run_at_once():
    assert capped_threads(None) is None and capped_threads(1) == 1
    assert capped_threads(10**6) == usable_threads()


def test_more_threads_than_there_are_is_said(tmp_path):
    result = invoke("run", tmp_path, "--prompt", "x", "--threads", 10**6)
    assert f"this machine runs {usable_threads()} at once" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "x", "--inputs", "y.npz", "--greedy"], "--greedy is for language models"),
        (["run", "x", "--inputs", "y.npz", "--max-new-tokens", "3"], "--max-new-tokens is for language models"),
        (["compile", "x", "--stop-after", "moe", "--resume"], "--resume goes on with the files of an artifact"),
        (["compile", ROOT / "examples", "--download"], "--download fetches a model by its name"),
    ],
)
def test_options_that_would_be_ignored_are_errors(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2 and message in result.stderr
