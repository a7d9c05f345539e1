"""Shards of a plan: what each device's file holds, and dispatch, compute and combine over them against the source model."""

import json

import numpy as np
import pytest
import torch
from moec.compiler import driver
from moec.compiler.errors import MoecError
from moec.compiler.text.printer import print_module
from moec.targets.ranks.layout import read_layout
from moec.targets.serving.experts import place_by_load, place_in_order
from places import TINY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

EXPERTS, LAYERS = 16, 4
IDS = np.random.default_rng(0).integers(0, 2048, (3, 7))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program of tiny-moe at stage moe, so that each test does not trace it."""
    path = tmp_path_factory.mktemp("program") / "tiny.moir"
    path.write_text(print_module(driver.compile(TINY, stop_after="moe")))
    return path


def plan_file(folder, program, physical=None, **degrees):
    """Write the plan of tiny-moe on eight H200 with degrees, and maybe with a map of experts; return its path."""
    given = {"tp": 1, "attention_dp": 8, "ep": 8, "pp": 1, **degrees}
    weights = given.pop("weights", None)
    found = driver.plan(program, on="nvidia-h200:8", input=64, output=64, weights=weights, **given)
    if physical:
        found["experts"] |= {"physical_to_logical": physical, "copies": len(physical[0]) - EXPERTS}
    path = folder / "plan.json"
    path.write_text(json.dumps(found))
    return path


@pytest.fixture(scope="module")
def source():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def logits_of(session, ids):
    """Return logits of a prompt and, behind it, of two tokens one by one."""
    mask = np.ones((len(ids), ids.shape[1]), np.int64)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    first, states = session.step(ids[:, :-2], mask[:, :-2], positions[:, :-2])
    found = [first]
    for i in (ids.shape[1] - 2, ids.shape[1] - 1):
        step, states = session.step(ids[:, i : i + 1], mask[:, : i + 1], positions[:, i : i + 1], states)
        found.append(step)
    return np.concatenate(found, 1)


@pytest.fixture(scope="module")
def expected(source):
    with torch.no_grad():
        return source(torch.from_numpy(IDS)).logits.numpy()


def copies_of_hot():
    """Return a map with eight copies, made for loads in which a few experts are hot."""
    loads = [[1.0 + 40 * (e in (layer, layer + 7)) for e in range(EXPERTS)] for layer in range(LAYERS)]
    return [list(row) for row in place_by_load(loads, 8, 8).slots]


@pytest.mark.parametrize(
    "degrees, physical",
    [
        ({}, None),
        ({}, copies_of_hot()),
        pytest.param({"attention_dp": 2, "tp": 4}, None, marks=pytest.mark.long),
        ({"attention_dp": 2, "tp": 2, "ep": 2, "pp": 2}, None),
    ],
    ids=["ep", "copies", "tp", "stages"],
)
def test_shards_compute_what_the_source_does(degrees, physical, expected, program, tmp_path):
    path = plan_file(tmp_path, program, physical, **degrees)
    artifact = driver.compile(program, weights=TINY, out=tmp_path / "shards", plan=path)
    session = artifact.session()
    assert np.abs(logits_of(session, IDS) - expected).max() < 1e-4 * np.abs(expected).max()
    # each choice of each token was computed once
    assert sum(session.traffic.computed.values()) == LAYERS * 2 * IDS.size
    layout = read_layout(path)
    assert set(session.traffic.computed) == set(range(layout.ep))


def test_a_device_holds_its_experts_and_no_others(program, tmp_path):
    physical = copies_of_hot()
    artifact = driver.compile(
        program, weights=TINY, out=tmp_path / "shards", plan=plan_file(tmp_path, program, physical)
    )
    checkpoint = load_file(TINY / "model.safetensors")
    plan = json.loads((artifact.folder / "plan.json").read_text())
    assert plan["experts"]["physical_to_logical"] == physical
    for rank in plan["ranks"]:
        assert rank["bytes"] == sum((artifact.folder / name).stat().st_size for name in rank["files"])
        own = load_file(artifact.folder / "weights" / f"rank-{rank['rank']}.safetensors")
        for layer in range(LAYERS):
            slots = physical[layer][3 * rank["rank"] : 3 * rank["rank"] + 3]
            down = own[f"layer.{layer}.experts_down_proj"]
            assert down.dtype == torch.bfloat16
            names = [f"model.layers.{layer}.mlp.experts.{e}.down_proj.weight" for e in slots]
            assert torch.equal(down, torch.stack([checkpoint[name] for name in names]))


@pytest.mark.long
@pytest.mark.parametrize("weights", ["experts=nvfp4,attention=fp8", "experts=int8"])
def test_shards_in_formats_of_the_plan(weights, program, tmp_path):
    path = plan_file(tmp_path, program, weights=weights, attention_dp=4, tp=2, ep=8)
    shards = driver.compile(program, weights=TINY, out=tmp_path / "shards", plan=path)
    again = driver.compile(
        program,
        weights=TINY,
        out=tmp_path / "whole",
        plan=plan_file(tmp_path, program, weights=weights, attention_dp=1, ep=1),
    )
    assert shards.lossy
    one, other = (logits_of(a.session(), IDS) for a in (shards, again))
    assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()
    stored = load_file(tmp_path / "shards" / "weights" / "rank-5.safetensors")
    assert stored["layer.2.experts_down_proj.codes"].dtype == torch.uint8


def test_plans_that_do_not_belong(program, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("{}")
    with pytest.raises(MoecError, match="is no plan of moec: degrees is missing"):
        driver.compile(program, weights=TINY, out=tmp_path / "out", plan=path)
    with pytest.raises(MoecError, match="target ranks needs a plan"):
        driver.compile(program, "ranks", weights=TINY, out=tmp_path / "out")
    physical = [[0] * EXPERTS] * LAYERS
    with pytest.raises(MoecError, match="do not hold the experts 0 to 15"):
        driver.compile(program, weights=TINY, out=tmp_path / "out", plan=plan_file(tmp_path, program, physical))
    with pytest.raises(MoecError, match="places the experts of 3 layers, the model has 4"):
        driver.compile(
            program, weights=TINY, out=tmp_path / "out", plan=plan_file(tmp_path, program, copies_of_hot()[:3])
        )
    assert not (tmp_path / "out").exists()


def test_copies_even_out_the_loads():
    rng = np.random.default_rng(1)
    loads = (rng.pareto(1.2, (LAYERS, 64)) + 0.1).tolist()
    plain = place_in_order(LAYERS, 64, 8).imbalance(loads)
    balanced = place_by_load(loads, 8).imbalance(loads)
    copied = [place_by_load(loads, 8, copies) for copies in (8, 16, 32)]
    assert plain > balanced > copied[0].imbalance(loads) >= copied[-1].imbalance(loads) >= 1
    for placed in copied:
        for layer, row in enumerate(placed.slots):
            assert set(row) == set(range(64))
            assert sum(placed.rank_loads(layer, loads[layer])) == pytest.approx(sum(loads[layer]))
            own = [placed.of_rank(layer, r) for r in range(8)]
            assert all(len(set(held)) == len(held) for held in own)  # no copy beside another one
