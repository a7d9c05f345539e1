"""MoE blocks that stay in plain ops are named in the artifact, with the reason and the cost, and they compute right."""

import json

import moec
import numpy as np
import onnxruntime
import pytest
from moec.compiler.check.interpret import interpret, random_inputs
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.rewrite.fusion_report import entry_line, fusion_report
from moec.compiler.text.parser import parse_module
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.source import RandomSource
from moec.passes import PASSES
from moec.targets.cpu.lower.module import lower_module
from moec.targets.cpu.onnx.emit import MODEL, emit_model
from moec_command import invoke
from places import FILES
from tiny_models import random_model, save

REFUSED = FILES / "fuse_dispatch_refused.moir"
RELU = {
    "function": "layer",
    "place": "mlp.experts",
    "reason": "MoE gated_relu weights was not tried on ONNX Runtime",
    # two chosen experts: two rows of 64 float32; 64 x 64 and 64 x 32 weights
    "cost": "a Loop over the chosen experts: 512 bytes of token copies a token, "
    "24576 bytes of weights copied for each chosen expert",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relu")
    return save(random_model(FAMILIES["olmoe"], hidden_act="relu"), folder)


def test_the_artifact_and_both_commands_name_the_block(checkpoint, tmp_path):
    made = invoke("compile", checkpoint, "-o", tmp_path / "made")
    assert made.exit_code == 0, made.stderr
    assert f"{entry_line(RELU)}\n" in made.stderr
    assert json.loads((tmp_path / "made" / "moec.json").read_text())["unfused"] == [RELU]
    assert moec.Artifact.open(tmp_path / "made").report["unfused"] == [RELU]
    shown = invoke("inspect", tmp_path / "made")
    assert entry_line(RELU) in shown.stdout
    told = invoke("inspect", tmp_path / "made", "--json")
    assert json.loads(told.stdout)["unfused"] == [RELU]


def test_a_program_whose_blocks_are_fused_names_none(tmp_path):
    artifact = moec.compile(random_model(FAMILIES["olmoe"]), out=tmp_path / "made")
    assert artifact.manifest["unfused"] == []


def test_spelled_out_blocks_are_named_and_right(tmp_path):
    """The reason is that of the rule that came nearest; the cost counts copies of tokens and weights."""
    module = parse_module(REFUSED.read_text("utf-8"), str(REFUSED))
    fused, notes = PASSES["fuse-dispatch"].run(module)
    lowered, more = lower_module(fused)
    found = fusion_report(lowered, (*notes, *more))
    assert [entry["place"] for entry in found] == [f"mlp{i}" for i in range(5)]
    assert found[0]["reason"] == "only %bg has a bias of the two (%g0, %u0)"
    assert found[2]["reason"].startswith("the halves are clamped to")
    assert found[4]["reason"] == "between the experts' linears no rule knows core.mul, core.tanh"
    # two rows of 8 float32; two 6 x 8 weights and one 8 x 6
    cost = "64 bytes of token copies a token, 3 Loops over 4 experts, 576 bytes of weights copied for each expert"
    assert {entry["cost"] for entry in found} == {cost}
    source = RandomSource(1)
    emit_model(lowered, source, tmp_path)
    inputs = random_inputs(module, "main", {"T": 7})
    feeds = {p.name: x.numpy() for p, x in zip(module.main.params, inputs, strict=True)}
    want = interpret(module, inputs, lambda recipe: evaluate_recipe(recipe, source))
    runner = onnxruntime.InferenceSession(tmp_path / MODEL, providers=["CPUExecutionProvider"])
    for got, expected in zip(runner.run(None, feeds), want, strict=True):
        assert np.abs(got - expected.numpy()).max() <= 1e-5 * expected.abs().max()


def test_without_a_note_the_reason_is_not_made_up():
    module = parse_module(REFUSED.read_text("utf-8"), str(REFUSED))
    assert {entry["reason"] for entry in fusion_report(module)} == {"no pass of this run said why"}
