"""Experts of a layer in several ops: the same numbers, in the interpreter and on the cpu target."""

import moec
import numpy as np
import pytest
import torch
from moec.compiler.check.compare import compare_function
from moec.compiler.check.tiled import TiledInterpreter
from moec.compiler.driver import opt
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.ir.module import Module
from moec.compiler.ir.pipelines import print_pipeline
from moec.compiler.ops.verify import verify_module
from moec.compiler.quantize.calibrate import collect_inputs, main_inputs
from moec.compiler.rewrite.expert_groups import split_experts
from moec.compiler.text.parser import parse_module
from moec.targets.target import FUSED
from tiny_models import random_model, save

TO_MOE = print_pipeline(FUSED)
GROUPS = [((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 2, 5, 6, 7), (1,), (3, 4))]
IDS = torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(5))
NEGATIVE = """moec 1 stage moe
dim T in 1..64

func @main(%x: f32[T, 16], %ids: i64[T, 3], %gates: f32[T, 3]) -> (f32[T, 16]) {
  const %up : f32[8, 24, 16] = tensor("up", f32[8, 24, 16])
  const %down : f32[8, 16, 12] = tensor("down", f32[8, 16, 12])
  const %up_bias : f32[8, 24] = tensor("up_bias", f32[8, 24])
  %y = moe.experts(%x, %ids, %gates, %up, %down, %up_bias, _) {act=gated(silu)} : f32[T, 16]
  return %y
}
"""


@pytest.mark.parametrize("groups", GROUPS)
def test_the_sum_of_groups_is_the_whole(groups):
    """Also for gates below 0, and for tokens that have no expert in a group."""
    module = parse_module(NEGATIVE)
    function, ops = split_experts(module.main, module.main.ops[0], groups)
    assert [op.operands[3].type.sizes[0] for op in ops] == [len(g) for g in groups]
    split = Module(module.stage, module.dims, (function,), module.source)
    verify_module(split)
    compare_function(module, split, "main", {}, 1e-5)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = save(random_model(FAMILIES["qwen3_moe"]), tmp_path_factory.mktemp("groups"))
    loaded = load(folder)
    return folder, loaded, opt(loaded.module, TO_MOE)


@pytest.mark.parametrize(("groups", "count"), [(("0..3", "4..7"), 2), (("0,2,5..7", "1"), 3)])
def test_artifacts_agree(qwen, tmp_path, groups, count):
    """The same format in groups and in one: QMoE with fewer experts, some tokens with none."""
    folder, _, _ = qwen
    layers = " ".join(f"0..2.experts[{group}]=uint4_g16" for group in groups)
    logits = []
    for name, extra in (("whole", ""), ("groups", layers)):
        pipeline = (
            f'{TO_MOE},quantize{{experts=uint4_g16, attention=f32, embedding=f32, head=f32, layers="{extra}"}},lower'
        )
        artifact = moec.compile(folder, out=tmp_path / name, pipeline=pipeline)
        session = artifact.session(spinning=False)
        mask = np.ones_like(IDS.numpy())
        logits.append(session.step(IDS.numpy(), mask, np.arange(40)[None].repeat(3, 0), None)[0])
        nodes = (tmp_path / name / "program.moir").read_text("utf-8").count("= ort.qmoe(")
        assert nodes == (1 if name == "whole" else count)
    differences = np.abs(logits[0] - logits[1]).max(axis=-1) / np.abs(logits[0]).max()
    assert differences.max() < 2e-2  # a last bit can turn the rounding of an activation to int8
    assert (differences < 1e-5).mean() > 0.9


def test_calibration_sees_through_groups(qwen):
    """A group's experts get the tokens that chose them, not those that fill up its choices."""
    _, loaded, module = qwen
    policy = "method=gptq, attention=f32, head=f32, embedding=f32, experts=uint4_g16"
    whole = opt(module, f"quantize{{{policy}}}")
    split = opt(module, f'quantize{{{policy}, layers="1.experts[0,2,5]=int8_g16"}}')
    counts = [list(layer.tokens) for layer in collect_inputs(whole, loaded.weights, IDS).coverage]
    found = collect_inputs(split, loaded.weights, IDS).coverage
    assert list(found[0].tokens) == counts[0] and list(found[3].tokens) == counts[2]
    assert list(found[1].tokens) == [counts[1][e] for e in (0, 2, 5)]
    assert list(found[2].tokens) == [counts[1][e] for e in (1, 3, 4, 6, 7)]
    runner = TiledInterpreter(split, loaded.weights, tuple(IDS.shape))
    plain = TiledInterpreter(module, loaded.weights, tuple(IDS.shape))
    a, b = (r.run(r.module.main, main_inputs(r.module, IDS), {})[0] for r in (runner, plain))
    assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


def test_experts_that_are_not_there(qwen):
    _, _, module = qwen
    with pytest.raises(MoecError, match="there is no expert 8"):
        opt(module, 'quantize{attention=f32, experts=uint4_g16, layers="1.experts[7..8]=int8_g16"}')
