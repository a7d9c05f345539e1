"""Every command and example of README.md, taken from the file itself, runs; those that take long are marked."""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import checkpoint_formats as formats
import click
import pytest
import torch
from gguf_models import write_model
from moec.compiler.cli.commands import main
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.text.parser import parse_module
from moec.targets import declare_kernel_ops
from moec_command import invoke
from places import ROOT
from tiny_models import random_model, save

TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SHELL = [body for kind, body in BLOCKS if not kind and re.match(r"(moec|pip|python) ", body)]
PYTHON = [body for kind, body in BLOCKS if kind == "python"]
PROGRAMS = [body for kind, body in BLOCKS if not kind and body.startswith("func @")]
TREES = [body for kind, body in BLOCKS if not kind and body.startswith("compiler/")]
EXAMPLE = "examples/tiny-moe"
SIZES = {
    "head_dim": 64,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
}  # groups of 64 divide them
SLOW = (
    EXAMPLE,
    "tiny-moe-cpu",
    "method=gptq",
    "auto",
    "inspect out",
    "run out",
    "verify out",
    "my-chip",
    "ascend",
    "fp8-folder",
)  # words of commands that take a while


def commands(block):
    """Return the commands of a block: comments are left out, and lines joined by && are one after the other."""
    words = shlex.split(re.sub(r"&&\s*\n", "&& ", block).replace("\n", " \n ").replace("\n", "'\n'"), comments=False)
    found, current, comment = [], [], False
    for word in words:
        if word.startswith("#"):
            comment = True
        if word in ("&&", "\n"):
            found.append(current)
            current, comment = [], False
        elif not comment:
            current.append(word)
    return [command for command in (*found, current) if command]


COMMANDS = [command for block in SHELL for command in commands(block)]
MOEC = [command for command in COMMANDS if command[0] == "moec"]
OTHERS = [command for command in COMMANDS if command[0] != "moec"]


def test_every_block_is_one_that_is_tested():
    assert len(SHELL) + len(PYTHON) + len(PROGRAMS) + len(TREES) == len(BLOCKS)
    assert MOEC and len(PYTHON) == 2 and len(PROGRAMS) == 1 and len(TREES) == 1


@pytest.mark.parametrize("command", OTHERS, ids=" ".join)
def test_what_is_no_command_of_moec(command):
    """Environments are made as CI makes them; here it is enough that what they name is there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    match command:
        case ["python", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"]:
            return
        case ["pip", "install", "-c", "constraints.txt", *what]:
            assert (ROOT / "constraints.txt").is_file()
            assert what[-1] == "." or what[-1].removeprefix(".[").removesuffix("]") in extras
        case ["python", "-m", "pytest", "-n", "2", "--dist", "loadfile"]:
            assert any(name.startswith("pytest-xdist") for name in extras["test"])
        case _:
            pytest.fail(f"README has a command that nothing tests: {command}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with everything that README's commands name, DIR and the like as tiny models of those names."""
    place = tmp_path_factory.mktemp("readme")
    (place / "examples").symlink_to(ROOT / "examples")
    with torch.no_grad():
        plain = save(
            random_model(FAMILIES["qwen3_moe"], vocab_size=2048, max_position_embeddings=1024, **SIZES), place / "DIR"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / EXAMPLE / name, plain / name)
    skipped = ("lm_head", "embed_tokens", ".gate", "norm")

    def write(kind):
        return lambda name, weight: None if name.endswith(skipped) else kind(weight)

    for name, kind, config in (
        ("gptq-folder", formats.gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}),
        (
            "fp8-folder",
            lambda w: formats.fp8(w, (32, 32), "weight_scale_inv"),
            {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
        ),
    ):
        copy = Path(shutil.copytree(plain, place / f"{name}-plain"))
        formats.quantize_folder(place / name, copy, config, write(kind))
    (place / "gguf").mkdir()
    with torch.no_grad():
        file, _ = write_model(place / "gguf", "mixtral", lambda name: "f32" if "gate_inp" in name else "q4_0")
    shutil.move(file, place / "model-Q4_0.gguf")
    (place / "folder-with-config-json").mkdir()
    shutil.copy(ROOT / EXAMPLE / "config.json", place / "folder-with-config-json")
    shutil.copy(ROOT / "targets/accelerator/chip/profiles/nvidia-h200.toml", place / "my-chip.toml")
    (place / "text.txt").write_text((ROOT / EXAMPLE / "heldout.txt").read_text("utf-8")[:20000], "utf-8")
    return place


def marks(command):
    return [pytest.mark.long] if any(word in " ".join(command) for word in SLOW) else []


@pytest.mark.parametrize("command", [pytest.param(c, marks=marks(c), id=" ".join(c[1:])) for c in MOEC])
def test_commands(command, folder, monkeypatch):
    """In the order of the file: some go on from what an earlier one wrote."""
    monkeypatch.chdir(folder)
    result = invoke(*command[1:])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()
    for out in (*Path().glob("DIR-*"), *Path().glob("fp8-folder-cpu*"), Path("out")):
        if "compile" in command and "-o" not in command and out.exists():
            shutil.rmtree(out)


def run_python(code):
    """Run a block as it stands."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the runtime's threads want the cores too
    try:
        exec(compile(code, "README.md", "exec"), {})
    finally:
        torch.set_num_threads(threads)


def test_python_of_a_torch_module(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    run_python(PYTHON[1])
    assert capsys.readouterr().out == "(9, 64)\n"


def test_python(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    run_python(PYTHON[0])
    text = capsys.readouterr().out
    assert "'passed': True" in text and len(text.splitlines()) > 1
    files = {path.name for path in Path("my-model-cpu").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= files
    config = json.loads(Path("my-model-cpu/config.json").read_text("utf-8"))
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]


def test_the_program_is_the_examples(folder, monkeypatch):
    """The lines of the IR, but for what README leaves out, are those that moec prints."""
    monkeypatch.chdir(folder)
    declare_kernel_ops()
    found = invoke("compile", EXAMPLE, "--stop-after", "moe").stdout
    assert parse_module(found).stage == "moe"
    for line in PROGRAMS[0].splitlines():
        parts = [re.escape(part) for part in line.split("...")]
        assert line.strip() == "..." or re.search(".*".join(parts), found), line


@pytest.mark.parametrize("line", TREES[0].splitlines() if TREES else [])
def test_the_folders_are_there(line):
    assert (ROOT / line.split()[0]).is_dir()


@pytest.mark.parametrize("text", sorted(set(re.findall(r"`(moec [^`]+)`", TEXT))))
def test_commands_in_the_text(text):
    """Each command and option that a sentence names is one that there is."""
    words = shlex.split(text.replace("[", "").replace("]", ""))
    command = main.commands[words[1]]
    known = {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known
