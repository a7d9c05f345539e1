"""The runner: options, contracts, checks, dumps, reproducers."""

from __future__ import annotations

import re
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from moec.compiler.check.compare import describe_difference, small_dims
from moec.compiler.errors import MoecError
from moec.compiler.ir.module import Module, Value
from moec.compiler.ir.pipelines import PassCall, parse_pipeline
from moec.compiler.ir.types import TensorType, make_attrs
from moec.compiler.rewrite.declare import pass_
from moec.compiler.rewrite.pipeline import run_pipeline
from moec.compiler.text.parser import parse_module
from moec.passes import PASSES
from moec.targets import TARGETS
from places import FILES

TEXT = """moec 1 stage graph
dim B in 1..64
dim S in 1..64

func @layer(%x: f32[B, S, 8]) -> (f32[B, S, 8]) weights "layers.{layer}." {
  const %w : f32[8] = tensor("norm.weight", f32[8])
  %n = nn.rms_norm(%x, %w) {eps=1e-06} : f32[B, S, 8] loc("norm")
  %y = core.add(%x, %n) : f32[B, S, 8] loc("residual")
  return %y
}

func @main(%x: f32[B, S, 8]) -> (f32[B, S, 8]) {
  %h = call @layer(%x) {layer=0} : f32[B, S, 8]
  %y = call @layer(%h) {layer=1} : f32[B, S, 8]
  return %y
}
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Run in an empty folder: a failing pass leaves a reproducer where one is."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))


@pytest.fixture
def module() -> Module:
    return parse_module(TEXT, "test.moir")


def edit(module: Module, op: str, change) -> Module:
    """Return the module with `change` done to every op of a name in @layer."""
    layer = module.by_name["layer"]
    ops = tuple(change(o) if o.name == op else o for o in layer.ops)
    return module.with_functions({"layer": replace(layer, ops=ops)})


@pass_(reads="graph")
def other_epsilon(module, target, *, eps: float = 0.5, note: str | None = None):
    """Set another epsilon, which changes the numbers: this pass is wrong on purpose."""
    return edit(module, "nn.rms_norm", lambda op: replace(op, attrs=make_attrs({"eps": eps})))


@pass_(reads="graph", rounds=True)
def lossy_epsilon(module, target):
    """Do the same, but say that weights are rounded."""
    return other_epsilon(module, target)


@pass_()
def wrong_type(module, target):
    """Write a type that the op does not give."""
    wrong = TensorType.of("f32", 8)
    return edit(module, "nn.rms_norm", lambda op: replace(op, results=(Value("n", wrong),)))


@pass_(reads="graph", leaves="moe")
def forgets_stage(module, target):
    """Say that the stage changes, and leave it."""
    return replace(module)


@pass_()
def renames_input(module, target):
    """Change the program's signature."""
    main = module.main
    (param,) = main.params
    ops = tuple(
        replace(op, operands=tuple(replace(v, name="z") if v == param else v for v in op.operands)) for op in main.ops
    )
    return module.with_functions({"main": replace(main, params=(replace(param, name="z"),), ops=ops)})


@pass_()
def crashes(module, target, *, size: int = 1, fast: bool = False):
    """Fail in a way that nobody foresaw."""
    return {}[size]


WRONG = {p.name: p for p in (other_epsilon, lossy_epsilon, wrong_type, forgets_stage, renames_input, crashes)} | PASSES


def run(module, text, **options):
    return run_pipeline(module, parse_pipeline(text), table=WRONG, **options)


def failure(module, text, **options) -> MoecError:
    with pytest.raises(MoecError) as caught:
        run(module, text, **options)
    return caught.value


def again(error: MoecError) -> MoecError:
    """Do what the error's `rerun` line says, without the command line."""
    line = next(line.strip() for line in error.todo.splitlines() if "rerun: " in line)
    words = shlex.split(line.removeprefix("rerun: "))
    assert words[:2] == ["moec", "opt"] and words[3] == "-p" and words[-1] == "--check"
    return failure(parse_module(Path(words[2]).read_text("utf-8"), words[2]), words[4], check="--check" in words)


def test_wrong_numbers_are_caught_named_and_reproduced(module, tmp_path):
    error = failure(module, "cleanup, other-epsilon{eps=0.25}", check=True, dump=tmp_path)
    assert error.what.startswith("wrong numbers: %y differs by")
    assert error.what.endswith("found after pass other-epsilon")
    assert (error.where, error.model, error.exit_code) == ("%y in @layer", "residual", 1)
    assert f"rerun: moec opt {tmp_path}/02.before.moir -p 'other-epsilon{{eps=0.25}}' --check" in error.todo
    second = again(error)
    assert second.what.split(",")[0] == error.what.split(",")[0]


def test_without_a_dump_folder_the_reproducer_gets_its_own(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = failure(module, "other-epsilon", check=True)
    assert not list(tmp_path.iterdir())  # nothing where the user works
    file = Path(re.search(r"moec opt (\S*moec-reproducer-\w+/01\.before\.moir)", error.todo)[1])
    assert file.is_file() and file.is_relative_to(tempfile.gettempdir())
    assert "found after pass other-epsilon" in again(error).what


def test_numbers_are_compared_only_on_demand(module):
    assert run(module, "other-epsilon").module is not module
    assert failure(module, "lossy-epsilon", check=True).what.startswith("wrong numbers: %y differs by")


def test_a_wrong_type_is_shown_with_a_caret(module, tmp_path):
    error = failure(module, "cleanup, wrong-type", dump=tmp_path)
    assert re.fullmatch(rf"{tmp_path}/02\.wrong-type\.moir:\d+:\d+", error.where)
    assert "^" in error.excerpt and "found after pass wrong-type" in error.what
    assert failure(module, "wrong-type", dump=None).exit_code == 1


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("forgets-stage", "the module is at stage graph, the pass leaves moe"),
        ("renames-input", "the inputs of @main changed: %x f32[B, S, 8] became %z f32[B, S, 8]"),
        ("crashes", "a mistake of moec's own stopped it (KeyError: 1), in pass crashes"),
        ("lift-moe, raise-norm", "pass raise-norm reads stage graph, the module is at stage moe"),
    ],
)
def test_broken_contracts(module, text, what, tmp_path):
    error = failure(module, text, dump=tmp_path)
    assert what in error.what
    assert what in again(error).what


@pytest.mark.parametrize(
    ("text", "what", "todo"),
    [
        ("clean-up", "there is no pass clean-up", "did you mean cleanup?"),
        ("cleanup{x=1}", "pass cleanup has no option x", "its options: none"),
        ("crashes{size=big}", "option size of pass crashes is big, not an int", "size: int = 1; fast: bool = false"),
        ("crashes{size=1.5}", "option size of pass crashes is 1.5, not an int", "fast"),
        ("crashes{size=true}", "option size of pass crashes is true, not an int", "fast"),
        ("crashes{fast=1}", "option fast of pass crashes is 1, not a bool", "size"),
        ("other-epsilon{eps=[1]}", "option eps of pass other-epsilon is (1,), not a float", "eps: float = 0.5"),
    ],
)
def test_wrong_pipelines_fail_before_anything_runs(module, text, what, todo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = failure(module, f"crashes, {text}")
    assert (error.what, error.exit_code) == (what, 2)
    assert todo in error.todo
    assert not list(tmp_path.iterdir())


def test_options_are_converted_to_their_types():
    assert other_epsilon.convert({"eps": 1, "note": "none"}) == {"eps": 1.0, "note": None}
    assert isinstance(other_epsilon.convert({"eps": "3"})["eps"], float)
    assert crashes.convert({"size": "7", "fast": "true"}) == {"size": 7, "fast": True}
    assert other_epsilon.convert({"note": 4}) == {"note": "4"}


def test_spelling_parses_back():
    options = {"eps": 0.5, "note": "two words", "fast": True, "size": 3}
    call = PassCall("a-b", options)
    assert str(call) == 'a-b{eps=0.5, fast=true, note="two words", size=3}'
    assert parse_pipeline(str(call)) == (call,)


def test_dumps_are_numbered_and_only_of_passes_that_changed_something(module, tmp_path):
    done = run(module, "cleanup, lift-moe, cleanup", dump=tmp_path)
    result, timings = done.module, done.timings
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00.load.moir", "02.lift-moe.moir"]
    assert parse_module((tmp_path / "02.lift-moe.moir").read_text("utf-8"), "dump") == result
    assert [(t.name, t.changed) for t in timings] == [("cleanup", False), ("lift-moe", True), ("cleanup", False)]
    assert all(t.seconds >= 0 for t in timings)


@pytest.mark.parametrize(
    ("stop", "names"),
    [("graph", ["cleanup"]), ("moe", ["cleanup", "lift-moe", "cleanup"]), ("lift-moe", ["cleanup", "lift-moe"])],
)
def test_stop_after_a_stage_or_a_pass(module, stop, names):
    done = run(module, "cleanup, lift-moe, cleanup", stop_after=stop)
    assert [t.name for t in done.timings] == names


def test_stop_after_something_unknown(module):
    assert "cannot stop after nowhere" in failure(module, "cleanup", stop_after="nowhere").what


def test_kernel_stage_asks_the_target(module):
    @pass_(reads="graph", leaves="kernel")
    def lower(module, target):
        """Enter the stage kernel."""
        return replace(module, stage="kernel")

    cpu = TARGETS["cpu"]
    ops = replace(cpu.ops, supported=lambda op: f"no {op.name} here" if op.name == "nn.rms_norm" else None)
    without = replace(cpu, ops=ops)
    with pytest.raises(MoecError, match=r"no nn\.rms_norm here, found after pass lower"):
        run_pipeline(module, (PassCall("lower"),), table={"lower": lower}, target=without)


def test_notes_reach_the_caller():
    path = FILES / "raise_norm_refused.moir"
    notes = [str(note) for note in run(parse_module(path.read_text("utf-8"), str(path)), "raise-norm").notes]
    assert "note: power_into_rms_norm not applied at %y (norm): %n is also used outside the pattern" in notes


def test_check_sizes_differ_and_respect_ranges():
    text = "moec 1 stage graph\n" + "\n".join(
        f"dim {name} in {low}..{high}"
        for name, low, high in [("B", 1, 1), ("S", 1, 99), ("P", 0, 9), ("T", 64, 99), ("U", 1, 99)]
    )
    module = parse_module(text + "\nfunc @main(%x: f32[B]) -> (f32[B]) {\n  return %x\n}\n", "test")
    assert small_dims(module) == {"B": 1, "S": 5, "P": 3, "T": 64, "U": 7}


def test_difference_of_numbers():
    import torch

    a = torch.tensor([1.0, -4.0, float("inf")])
    assert not describe_difference(a, a.clone(), 1e-6)
    assert "differs by 0.25" in describe_difference(a, a + torch.tensor([1.0, 0, 0]), 1e-4)
    assert "infinite" in describe_difference(a, torch.tensor([1.0, float("nan"), float("inf")]), 1e-4)
    assert "1 of 2 integers" in describe_difference(torch.tensor([1, 2]), torch.tensor([1, 3]), 1e-4)
