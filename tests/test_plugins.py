"""A package outside of moec that brings a target, a chip, a pass and an op: installed in a folder, used by the commands."""

import json
import os
import subprocess
import sys

import pytest
import torch
from places import ROOT
from safetensors.torch import save_file

CHIP = ROOT / "targets/accelerator/chip/profiles/nvidia-h100.toml"

OPS = '''
"""Ops of the package outside."""
from moec.compiler.ops import op

@op("outside.twice", "x: A[*X] -> y: A[*X]", flops=1)
def twice(x):
    """Double every number."""
    return x * 2
'''
PASSES = '''
"""Passes of the package outside."""
from moec.compiler.rewrite.declare import pass_
from moec.compiler.rewrite.rules import apply_rules, rule

@rule(before="%y = outside.twice(%x)", after="%y = core.add(%x, %x)")
def twice_into_add(m, target):
    """Add what is doubled to itself."""

@pass_(reads="any")
def add_for_twice(module, target, *, often: int = 1):
    """Write outside.twice as an addition."""
    return apply_rules(module, target, (twice_into_add,))
'''
TARGET = '''
"""The cpu target of moec, for programs with ops of this package too."""
from dataclasses import replace
from moec.compiler.ir.pipelines import PassCall, put_before
from moec.targets.cpu import TARGET as CPU

TARGET = replace(CPU, name="outside-cpu", doc="ONNX Runtime, behind a pass of its own.",
                 pipeline=put_before(CPU.pipeline, ["lower"], PassCall("add-for-twice")))
'''
INIT = '"""A package outside of moec."""\nfrom pathlib import Path\n\nCHIP = Path(__file__).with_name("chip.toml")\n'
ENTRIES = """[moec.ops]
outside = outside_moec.ops
[moec.passes]
add-for-twice = outside_moec.passes:add_for_twice
[moec.targets]
outside-cpu = outside_moec.target:TARGET
[moec.chips]
outside-chip = outside_moec:CHIP
"""
PROGRAM = """moec 1 stage graph
dim B in 1..4
dim S in 1..16

func @main(%input_ids: i64[B, S]) -> (f32[B, S, 10]) {
  const %embed : f32[10, 10] = tensor("embed", f32[10, 10])
  const %next : f32[10, 10] = tensor("next", f32[10, 10])
  %x = nn.embedding(%input_ids, %embed) : f32[B, S, 10]
  %d = outside.twice(%x) : f32[B, S, 10]
  %logits = core.linear(%d, %next, _) : f32[B, S, 10]
  return %logits
}
"""


def install(folder, entries=ENTRIES, name="outside-moec", **files):
    """Write a package and what an installer writes beside it."""
    package = folder / name.replace("-", "_")
    package.mkdir(parents=True)
    chip = CHIP.read_text("utf-8").replace('name = "nvidia-h100"', 'name = "outside-chip"')
    texts = {"__init__": INIT, "ops": OPS, "passes": PASSES, "target": TARGET, **files}
    for module, text in texts.items():
        (package / f"{module}.py").write_text(text, "utf-8")
    (package / "chip.toml").write_text(chip, "utf-8")
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(entries, "utf-8")
    return folder


def moec(site, *arguments, cwd=None):
    """Run a command with the packages of a folder beside the installed ones."""
    return subprocess.run(
        [sys.executable, "-m", "moec.compiler.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(site)}, cwd=cwd or site, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = install(tmp_path_factory.mktemp("site"))
    (folder / "program.moir").write_text(PROGRAM, "utf-8")
    (folder / "weights").mkdir()
    count_up = torch.eye(10).roll(1, 0)  # row n + 1 is that of token n
    save_file({"embed": torch.eye(10), "next": count_up}, folder / "weights/model.safetensors")
    return folder


def test_what_is_brought_is_listed(site):
    passes = {row["name"]: row for row in json.loads(moec(site, "list", "passes", "--json").stdout)}
    assert passes["add-for-twice"]["options"] == ["often: int = 1"] and "quantize" in passes
    ops = {row["name"]: row for row in json.loads(moec(site, "list", "ops", "--json").stdout)}
    assert ops["outside.twice"]["doc"] == "Double every number." and "core.add" in ops
    assert ops["moe.experts"]["attributes"] == {"act": "gated(silu)"}
    targets = {row["name"]: row["doc"] for row in json.loads(moec(site, "targets", "--json").stdout)}
    assert targets["outside-cpu"].startswith("ONNX Runtime, behind")
    assert targets["outside-chip"].startswith("NVIDIA H100") and "nvidia-h100" in targets
    (chip,) = json.loads(moec(site, "targets", "outside-chip", "-D", "cores=7", "--json").stdout)
    assert next(f["value"] for f in chip["figures"] if f["figure"] == "cores") == 7


def test_a_pass_and_an_op_run_and_are_checked(site):
    done = moec(site, "opt", "program.moir", "-p", "add-for-twice,lift-moe", "--check")
    assert done.returncode == 0, done.stderr
    assert "core.add(%x, %x)" in done.stdout and "outside." not in done.stdout
    lifted = moec(site, "opt", "program.moir", "-p", "lift-moe")
    assert "stage moe" in lifted.stdout and "outside.twice" in lifted.stdout


def test_a_target_compiles_and_its_artifact_runs(site, tmp_path):
    refused = moec(site, "compile", "program.moir", "--weights", "weights", "-o", tmp_path / "cpu")
    assert refused.returncode == 2 and "the target cpu has no kernel for outside.twice" in refused.stderr
    done = moec(
        site, "compile", "program.moir", "--weights", "weights", "--target", "outside-cpu", "-o", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/moec.json").read_text())["target"] == "outside-cpu"
    ran = moec(site, "run", tmp_path / "out", "--tokens", "1,2", "--max-new-tokens", 3, "--greedy")
    assert ran.stdout.strip() == "3,4,5", ran.stderr


def test_a_chip_is_predicted_for(site):
    (site / "plain.moir").write_text(PROGRAM.replace("outside.twice(%x)", "core.neg(%x)"), "utf-8")
    done = moec(site, "inspect", "plain.moir", "--target", "outside-chip", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predicted"]


BROKEN = {
    "an import that fails": ({"passes": "import nothing_of_this_name"}, ("list", "passes"), "cannot be imported: ModuleNotFoundError"),
    "a module that exits": ({"target": "raise SystemExit(3)"}, ("targets",), "cannot be imported: SystemExit: 3"),
    "a pass that is none": ({"passes": "add_for_twice = 3"}, ("list", "passes"), "brings add-for-twice as int, which is not a function under @pass_"),
    "a pass of another name": ({"passes": PASSES.replace("def add_for_twice", "def other").replace("1):", "1):") + "\nadd_for_twice = other\n"}, ("list", "passes"), "named other"),
    "a target of another name": ({"target": TARGET.replace("outside-cpu", "inside")}, ("targets",), "named inside"),
    "no ops": ({"ops": ""}, ("opt", "program.moir"), "declares no op outside.*"),
    "no file": ({"__init__": "CHIP = 3"}, ("targets",), "brings outside-chip as int"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_named(case, tmp_path):
    files, command, said = BROKEN[case]
    install(tmp_path, **files)
    (tmp_path / "program.moir").write_text(PROGRAM, "utf-8")
    done = moec(tmp_path, *command)
    assert done.returncode == 2 and done.stderr.startswith("error: the package outside-moec ")
    assert said in done.stderr and "Traceback" not in done.stderr


def test_a_broken_package_is_in_the_way_of_nobody_else(tmp_path):
    install(tmp_path, passes="import nothing_of_this_name", target="raise SystemExit(3)")
    assert moec(tmp_path, "compile", "nothere").stderr.startswith("error: the source does not exist")


def test_names_that_are_taken(tmp_path):
    install(tmp_path / "one", ENTRIES.replace("add-for-twice =", "cleanup ="))
    done = moec(tmp_path / "one", "list", "passes")
    assert done.returncode == 2 and "brings cleanup, which moec has itself" in done.stderr
    install(tmp_path / "two")
    install(tmp_path / "two", ENTRIES.replace("outside_moec", "another_moec"), name="another-moec")
    done = moec(tmp_path / "two", "list", "passes")
    assert done.returncode == 2 and "outside-moec" in done.stderr and "another-moec" in done.stderr
