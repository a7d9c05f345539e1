"""The `moec` command as a user types it: results on standard output, one message for an error, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from moec.compiler.errors import MoecError
from moec.compiler.text.parser import parse_module
from moec_command import MOEC, invoke, shell
from places import CONFIGS

COMMANDS = ("compile", "opt", "run", "verify", "bench", "inspect", "list", "plan", "targets")

PROGRAM = """moec 1 stage graph
dim B in 1..8
dim S in 1..64
dim P in 0..64

func @main(%x: f32[B, S, 4])
    -> (f32[B, S, 4]) {
  const %w : f32[4, 4] = tensor("w", f32[4, 4])
  %y = core.linear(%x, %w, _) : f32[B, S, 4]
  %z = core.neg(%y) : f32[B, S, 4]
  %u = core.neg(%y) : f32[B, S, 4]
  %v = core.add(%z, %u) : f32[B, S, 4]
  return %v
}
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.moir"
    path.write_text(PROGRAM, "utf-8")
    return path


# --- help and wrong use --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Examples:\n    moec {command}" in result.stdout


def test_help_of_all():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(f"  {command} " in result.stdout for command in COMMANDS)
    assert not any("..." in line for line in result.stdout.splitlines() if line.split()[:1] in [[c] for c in COMMANDS])


def test_version():
    import moec as package

    assert invoke("--version").stdout == f"moec, version {package.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compyle"], "No such command 'compyle'"),
        (["compile"], "Missing argument 'SOURCE'"),
        (["compile", "m", "-D", "context"], "'context' is not KEY=VALUE"),
        (["compile", "m", "--target", "nvidia-h200", "-D", "engines=vllm,sglang,tp=8,ep=no"], "ep cannot be no"),
        (["compile", "m", "-o", "m.moir"], "add --stop-after kernel"),
        (["compile", "m", "--stop-after", "moe", "--verify"], "--verify needs an artifact"),
        (["compile", "m", "--json", "--stop-after", "moe"], "--json describes an artifact"),
        (["run", "d"], "give one of --prompt, --prompt-file, --tokens and --inputs"),
        (["run", "d", "--tokens", "1", "--prompt", "a"], "give one of --prompt, --prompt-file, --tokens and --inputs"),
        (["run", "d", "--tokens", "1,b"], "not a list of token ids"),
        (["run", "d", "--tokens", "1", "--top-p", "0"], "--top-p"),
        (["inspect", "d", "--context", "-1"], "--context"),
        (["list", "cats"], "'cats' is not one of"),
    ],
)
def test_wrong_use(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "nowhere"], "error: the source does not exist"),
        (
            ["compile", CONFIGS / "OLMoE-1B-7B-0924", "--weights", "w", "--stop-after", "moe"],
            "error: weights are named for a .moir source only",
        ),
        (
            ["compile", "d", "--quantize", "q4_k_m"],
            "error: there is no format q4_k_m\n  did you mean int4? (moec list formats)",
        ),
        (
            ["compile", "d", "--quantize", "8bit"],
            "error: there is no format 8bit\n  did you mean int8? (moec list formats)",
        ),
        (
            ["compile", "d", "--quantize", "w3a16"],
            "error: there is no format w3a16\n  did you mean grid3_g64? (moec list formats)",
        ),
        (["compile", "nowhere", "--target", "abacus"], "error: there is no target"),
        (["inspect", "nowhere"], "error: the source does not exist"),
        (["opt", "nowhere.moir"], "error: "),
        (["run", "nowhere", "--tokens", "1"], "error: there is no such folder"),
        (["verify", "nowhere"], "error: there is no such folder"),
        (["verify", "nowhere", "--text", "gone.txt"], "error: the file cannot be read: No such file"),
        (["targets", "abacus"], "error: there is no target 'abacus'"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--debug", "targets", "x"], ["targets", "x", "--debug"]])
def test_debug_shows_the_traceback_too(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback (most recent call last)")
    assert "\nerror: there is no target 'x'" in result.stderr


def failing(monkeypatch, error: BaseException) -> Result:
    from moec.compiler.cli import listing

    def fail(name):
        raise error

    monkeypatch.setattr(listing, "list_targets", fail)
    return invoke("targets")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MoecError("pass x changes the numbers", exit_code=1), 1, "error: pass x changes the numbers\n"),
        (ZeroDivisionError("oops"), 70, "error: moec failed: ZeroDivisionError: oops\n  run the command again"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "error: No such file or directory\n  at a/b\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_exit_codes(monkeypatch, error, code, message):
    result = failing(monkeypatch, error)
    assert result.exit_code == code
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 2


def test_a_closed_pipe_is_quiet():
    with subprocess.Popen([*MOEC, "list", "ops", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_interrupt_is_one_line(tmp_path):
    fifo = tmp_path / "pipe.moir"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [*MOEC, "opt", str(fifo)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell starts background jobs with interrupts ignored, and they pass that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process, fifo.open("w"):  # opens once the command reads
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_the_command_starts_without_heavy_imports():
    code = "import sys, moec.compiler.cli.commands; print([m for m in ('torch', 'transformers', 'onnxruntime', 'onnx', 'sympy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# --- IR in, IR out -------------------------------------------------------------------------------------------------


def test_opt_prints_ir_that_parses(program):
    result = invoke("opt", program, "-p", "cleanup")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("core.neg") == 1
    assert invoke("opt", program).stdout == PROGRAM
    assert parse_module(result.stdout).stage == "graph"


def test_opt_reads_standard_input_and_writes_a_file(program, tmp_path):
    out = tmp_path / "new" / "out.moir"
    done = shell("opt", "-", "-p", "cleanup", "--check", "--why", "-o", out, input=PROGRAM)
    assert (done.returncode, done.stdout) == (0, "")
    assert out.read_text("utf-8") == invoke("opt", program, "-p", "cleanup").stdout


def test_opt_says_where_the_text_is_wrong():
    result = invoke("opt", "-", input=PROGRAM.replace("%w, _) : f32[B, S, 4]", "%w, _) : f32[B, S, 5]"))
    assert result.exit_code == 2
    assert "<stdin>:9:33" in result.stderr
    assert "^" in result.stderr


def test_opt_dumps(program, tmp_path):
    result = invoke("opt", program, "-p", "cleanup", "--dump", tmp_path / "dumps")
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "dumps").iterdir())[-1] == "01.cleanup.moir"


# --- what there is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "name"),
    [("ops", "moe.experts"), ("passes", "lift-moe"), ("families", "Mixtral"), ("rules", None), ("systems", "hgx-h200")],
)
def test_lists(what, name):
    rows = json.loads(invoke("list", what, "--json").stdout, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    names = [row["name"] for row in rows]
    assert name is None or name in names
    assert all(row.get("doc", "x") for row in rows)
    table = invoke("list", what).stdout
    assert len(table.splitlines()) == 2 + len(rows)
    assert all(line.startswith(n) for line, n in zip(table.splitlines()[2:], names, strict=True))


def test_targets():
    rows = json.loads(invoke("targets", "--json").stdout)
    assert "cpu" in [row["name"] for row in rows]
    (cpu,) = json.loads(invoke("targets", "cpu", "--json").stdout)
    assert set(cpu) == {"name", "pipeline", "doc", "runtime", "processor"}


def test_inspect_a_program(program):
    report = json.loads(invoke("inspect", program, "--json", "--context", "3").stdout)
    assert report["parameters"]["total"] == 16
    assert report["per_token"]["context"] == 3
    assert report["per_token"]["flops"] == 2 * 16 + 3 * 4
    text = invoke("inspect", program).stdout
    assert "parameters" in text and "@main" in text and "dims: B in 1..8" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_inspect_a_config():
    result = invoke("inspect", CONFIGS / "OLMoE-1B-7B-0924")
    assert result.exit_code == 0, result.stderr
    assert "6.919 B" in result.stdout and "1.282 B" in result.stdout
    assert "@layer     0..15" in result.stdout
