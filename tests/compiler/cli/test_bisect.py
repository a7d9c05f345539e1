"""`moec bisect` and `verify --layers` name the step, and the op, of each planted fault."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from moec.compiler import driver
from moec.compiler.artifact.stored_weights import weight_places
from moec.compiler.cli.bisect import _find_steps
from moec.compiler.frontends import load as loading
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.ir.notes import Rewritten
from moec.compiler.ir.pipelines import parse_pipeline, with_lowering
from moec.compiler.ir.recipes import rename_tensors
from moec.compiler.rewrite.declare import PassTable
from moec.compiler.runtime.artifact import Artifact
from moec.compiler.runtime.layers import LOSSY, TOLERANCE, compare_places
from moec.compiler.runtime.reference import open_reference
from moec.targets import TARGETS, declare_kernel_ops
from moec_command import invoke
from tiny_models import random_model, save

PASSES = tuple(dict.fromkeys(call.name for call in with_lowering(TARGETS["cpu"].pipeline)))
WEIGHTS = ("gate_up", "down_proj", "qkv", "o_proj", "lm_head", "mlp_gate")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Return a tiny model's folder and its artifact."""
    folder = tmp_path_factory.mktemp("bisect")
    model = save(random_model(FAMILIES["qwen3_moe"], vocab_size=64, max_position_embeddings=64), folder / "tiny")
    return model, driver.compile(model, out=folder / "art")


def lose_the_residual(module):
    """Return a module whose first layer adds something to itself where it added the residual."""
    name = next(f.name for f in module.functions if any(op.name == "core.add" for op in f.ops) and f.name != "main")
    function = module.by_name[name]
    last = max(k for k, op in enumerate(function.ops) if op.name == "core.add")
    op = function.ops[last]
    wrong = replace(op, operands=(op.operands[1], op.operands[1]))
    ops = (*function.ops[:last], wrong, *function.ops[last + 1 :])
    return module.with_functions({name: replace(function, ops=ops)})


def plant_in_pass(monkeypatch, name):
    """Let a pass lose the residual of a layer, whatever else it does."""
    right = driver.passes_for

    def passes_for(target):
        table = right(target)
        definition = table[name]

        def function(module, target=None, **options):
            done = definition.run(module, target, **options)
            return Rewritten(lose_the_residual(done.module), done.notes)

        wrong = replace(definition, function=function)
        return PassTable({**{n: table[n] for n in table}, name: wrong})

    monkeypatch.setattr(driver, "passes_for", passes_for)


def steps(artifact, source):
    return list(_find_steps(artifact, str(source)))


def test_every_step_of_a_right_artifact_passes(compiled):
    source, artifact = compiled
    found = steps(artifact, source)
    assert [(finding.step, finding.passed) for finding in found] == [
        ("import", True), ("passes", True), ("program", True), ("runtime", True),
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", PASSES)
def test_a_fault_in_a_pass(compiled, monkeypatch, name):
    source, artifact = compiled
    assert name in {call.name for call in parse_pipeline(artifact.manifest["pipeline"])}
    plant_in_pass(monkeypatch, name)
    last = steps(artifact, source)[-1]
    assert (last.step, last.passed) == ("passes", False)
    assert f"pass {name}" in last.detail and "wrong numbers" in last.detail
    assert "moec opt" in last.todo and name in last.todo


def read_another_tensor(monkeypatch, old, new):
    """Let the import read another tensor than the model has there."""
    right = loading.load

    def load(source, **options):
        found = right(source, **options)
        if found.module.stage != "graph":
            return found

        def renamed(function):
            consts = [
                replace(c, recipe=rename_tensors(c.recipe, lambda n: n.replace(old, new))) for c in function.consts
            ]
            return replace(function, consts=tuple(consts))

        module = found.module
        return replace(found, module=module.with_functions({f.name: renamed(f) for f in module.functions}))

    monkeypatch.setattr(loading, "load", load)


@pytest.mark.long
@pytest.mark.parametrize(
    "old, new, place",
    [
        ("v_proj", "k_proj", "self_attn.v_proj"),
        ("up_proj", "gate_proj", "mlp"),
        ("post_attention_layernorm", "input_layernorm", "post_attention_layernorm"),
        ("k_norm", "q_norm", "self_attn.k_norm"),
    ],
)
def test_a_fault_in_the_import(compiled, monkeypatch, old, new, place):
    source, artifact = compiled
    read_another_tensor(monkeypatch, old, new)
    last = steps(artifact, source)[-1]
    assert (last.step, last.passed) == ("import", False)
    assert f"first at model.layers.0.{place}" in last.detail


@pytest.mark.long
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_fault_in_a_stored_weight(compiled, tmp_path, weight):
    source, artifact = compiled
    copy = shutil.copytree(artifact.folder, tmp_path / "copy")
    name, place = next((n, p) for n, p in weight_places(copy).items() if weight in n and p.held is None)
    numbers = np.memmap(place.file, np.float32, "r+", place.offset, place.length // 4)
    numbers[:] = numbers[::-1].copy()
    numbers.flush()
    last = steps(Artifact.open(copy), source)[-1]
    assert (last.step, last.passed) == ("runtime", False), name


def test_layers_name_the_first_op_that_is_off(compiled):
    source, artifact = compiled
    declare_kernel_ops()
    loaded = loading.load(artifact.folder, weights=source)
    with open_reference(source) as reference:
        right = compare_places(loaded.module, loaded.need_weights(), reference, [[5, 6, 7, 8], [9, 3]])
        wrong = compare_places(
            lose_the_residual(loaded.module), loaded.need_weights(), reference, [[5, 6, 7, 8], [9, 3]]
        )
    assert max(place.difference for place in right) < TOLERANCE < LOSSY
    assert {"model.layers.0.self_attn.o_proj", "model.layers.1.mlp.experts", "lm_head"} <= {p.module for p in right}
    first = next(place for place in wrong if place.difference > TOLERANCE)
    assert first.module == "model.layers.1.input_layernorm"  # the first module that reads what the layer gives


def test_the_commands(compiled, monkeypatch):
    source, artifact = compiled
    done = invoke("bisect", artifact.folder, "--json")
    assert done.exit_code == 0, done.stderr
    assert [finding["step"] for finding in json.loads(done.stdout)] == ["import", "passes", "program", "runtime"]
    done = invoke("verify", artifact.folder, "--layers")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, f"every place is within 0.001 of {source}")
    assert invoke("verify", artifact.folder, "--layers", "--text-tokens", "9").exit_code == 2
    read_another_tensor(monkeypatch, "v_proj", "k_proj")
    done = invoke("bisect", artifact.folder)
    assert done.exit_code == 1
    assert done.stdout.startswith("FAIL  import: logits differ from transformers")
