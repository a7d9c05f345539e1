"""The roofline of a module on a chip: amounts against closed formulas, times, floors, what is unknown, the command."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import sympy
from moec.compiler.errors import MoecError
from moec.compiler.ir.dims import dim
from moec.compiler.ir.module import Module
from moec.compiler.ops import OPS
from moec.compiler.text.parser import parse_module
from moec.targets import declare_kernel_ops
from moec.targets.accelerator.chip.profile import find_profile, shipped_profiles
from moec.targets.accelerator.predict.assumed import ASSUMED, MEANING
from moec.targets.accelerator.predict.experts_touched import distinct_experts
from moec.targets.accelerator.predict.roofline import Overlap, Roofline, module_roofline
from moec.targets.accelerator.predict.work import call_counts, module_work, stored_bits
from moec_command import invoke
from places import CONFIGS

declare_kernel_ops()

B, S, P = dim("B"), dim("S"), dim("P")

# width 1024, 16 experts of 512 of which 2 are chosen, 4 layers, one head of 64 over a window of 256
LAYERS = """moec 1 stage kernel
dim B in 1..64
dim S in 1..8192
dim P in 0..8192

func @layer(%x: f32[B, S, 1024], %k: state f32[B, 1, P, 64]) -> (f32[B, S, 1024], state f32[B, 1, P + S, 64]) weights "layers.{layer}." {
  const %q : int4_g128[64, 1024] = quantize(cast(tensor("q", bf16[64, 1024]), to=f32), to=int4_g128)
  const %o : f32[1024, 64] = cast(tensor("o", bf16[1024, 64]), to=f32)
  const %router : f32[16, 1024] = tensor("router", f32[16, 1024])
  const %up : bf16[16, 1024, 1024] = tensor("up", bf16[16, 1024, 1024])
  const %down : mxfp4[16, 1024, 512] = quantize(cast(tensor("down", bf16[16, 1024, 512]), to=f32), to=mxfp4)
  %rows = acc.linear(%x, %q, _) : f32[B, S, 64]
  %head = core.reshape(%rows) {shape=[B, 1, S, 64]} : f32[B, 1, S, 64]
  %k2 = nn.cache_append(%k, %head) {axis=2} : state f32[B, 1, P + S, 64]
  %y = nn.attention(%head, %k2, %k2, _, _) {scale=0.125, window=256} : f32[B, S, 1, 64]
  %z = core.reshape(%y) {shape=[B, S, 64]} : f32[B, S, 64]
  %a = acc.linear(%z, %o, _) : f32[B, S, 1024]
  %t = core.reshape(%a) {shape=[B*S, 1024]} : f32[B*S, 1024]
  %logits = acc.linear(%t, %router, _) : f32[B*S, 16]
  %gates, %ids = moe.route(%logits, _, _, _) {k=2} : f32[B*S, 2], i64[B*S, 2]
  %order, %offsets = acc.sort(%ids) {experts=16} : i64[2*B*S], i64[17]
  %h = acc.grouped_up(%t, %ids, %order, %offsets, %up, _) {act=gated(silu)} : f32[2*B*S, 512]
  %e = acc.grouped_down(%h, %ids, %order, %offsets, %gates, %down, _) : f32[B*S, 1024]
  %out = core.reshape(%e) {shape=[B, S, 1024]} : f32[B, S, 1024]
  return %out, %k2
}

func @main(%ids: i64[B, S], %k.{0..3}: state f32[B, 1, P, 64]) -> (f32[B, S, 1024], 4 * state f32[B, 1, P + S, 64]) {
  const %embed : bf16[32000, 1024] = tensor("embed", bf16[32000, 1024])
  %rows = nn.embedding(%ids, %embed) : bf16[B, S, 1024]
  %x.0 = core.cast(%rows) {to=f32} : f32[B, S, 1024]
  %x.{1..4}, %p.{0..3} = call @layer(%x.{0..3}, %k.{0..3}) {layer=0..3} : f32[B, S, 1024], state f32[B, 1, P + S, 64]
  return %x.4, %p.{0..3}
}
"""


@pytest.fixture(scope="module")
def layers() -> Module:
    return parse_module(LAYERS)


@pytest.fixture(scope="module")
def h200(layers: Module) -> Roofline:
    return module_roofline(layers, find_profile("nvidia-h200", {}))


def the(found: Roofline, op: str, number: int = 0):
    """Return one op's work, the `number`-th of its kind."""
    return [work for work in found.works if work.op == op][number]


# --- amounts -------------------------------------------------------------------------------------------------------


def test_weights_count_as_stored(h200):
    assert (
        the(h200, "acc.linear").weights == 64 * 1024 * sympy.Rational(4 * 128 + 32, 128) / 8
    )  # codes, a scale for 128
    assert the(h200, "acc.linear", 1).weights == 2 * 1024 * 64  # the checkpoint has bf16, though the program types f32
    assert the(h200, "acc.linear", 2).weights == 4 * 16 * 1024
    table = the(h200, "nn.embedding")
    assert table.flops == 0
    assert float(table.weights.subs({B: 1, S: 1})) == pytest.approx(2 * 1024)  # one row


def test_experts_are_read_where_a_token_chose_them(h200):
    touched = 16 * (1 - sympy.Rational(14, 16) ** (B * S))
    up, down = the(h200, "acc.grouped_up"), the(h200, "acc.grouped_down")
    assert sympy.simplify(up.weights - touched * 1024 * 1024 * 2) == 0
    assert sympy.simplify(down.weights - touched * 1024 * 512 * sympy.Rational(17, 32)) == 0  # 4 bits, 8 for 32 codes
    # x, ids, order and offsets come in, the activation goes out; the pairs are B S times 2
    assert sympy.expand(up.activations - (2 * 1024 + 2 * 8 + 2 * 8 + 2 * 2 * 512) * B * S - 8 * 17) == 0
    assert sympy.expand(up.flops - 2 * B * S * (2 * 1024 * 1024 + 4 * 512)) == 0


def test_experts_on_several_devices_see_the_tokens_of_all(layers, h200):
    spread = module_roofline(layers, h200.profile, devices=4)
    up = the(spread, "acc.grouped_up")
    assert float(up.weights.subs({B: 1, S: 1})) == pytest.approx(16 * (1 - (14 / 16) ** 4) / 4 * 1024 * 1024 * 2)
    assert (up.flops, up.activations) == (the(h200, "acc.grouped_up").flops, the(h200, "acc.grouped_up").activations)
    experts = 4 * 16 * (1024 * 1024 * 2 + 1024 * 512 * 17 // 32)
    assert h200.weights - spread.weights == experts * 3 // 4


def test_a_cache_is_appended_to_and_read_in_its_window(h200):
    append, attention = the(h200, "nn.cache_append"), the(h200, "nn.attention")
    assert sympy.expand(append.states - 2 * 64 * B * S) == 0  # what was there stays where it is
    assert sympy.expand(append.activations - 2 * 64 * B * S) == 0
    # keys are values: read once, and of them only what the window shows
    for new, past, slots in ((1, 100, 101), (1, 4000, 256), (512, 4000, 512 + 255)):
        assert attention.states.subs({B: 3, S: new, P: past}) == pytest.approx(min(2 * slots, past + new) * 3 * 64 * 2)


def test_formulas_of_a_module_are_those_of_its_ops(layers, h200):
    assert call_counts(layers) == {"main": 1, "layer": 4}
    at = {B: 2, S: 3, P: 50}
    step = h200.at(batch=2, new=3, past=50)
    for name, formula in h200.bytes.items():
        assert float(formula.subs(at)) == pytest.approx(getattr(step.total, name))
    for unit, formula in h200.flops.items():
        assert float(formula.subs(at)) == pytest.approx(step.total.flops[unit])
    assert step.total.kernels == sum(work.calls for work in h200.works)
    assert {w.op for w in h200.works if w.unit == "bf16"} == {
        "acc.linear", "nn.attention", "acc.grouped_up", "acc.grouped_down"
    }  # fmt: skip
    assert not any(work.op == "core.reshape" for work in h200.works)


def test_a_module_of_stage_moe_reads_the_same_weights(layers):
    text = LAYERS.replace("stage kernel", "stage moe").replace("acc.linear", "core.linear")
    text = text.replace("%order, %offsets = acc.sort(%ids) {experts=16} : i64[2*B*S], i64[17]\n", "")
    text = text.replace(
        "%h = acc.grouped_up(%t, %ids, %order, %offsets, %up, _) {act=gated(silu)} : f32[2*B*S, 512]\n", ""
    )
    text = text.replace("acc.grouped_down(%h, %ids, %order, %offsets, %gates, %down, _)",
                        "moe.experts(%t, %ids, %gates, %up, %down, _, _)")  # fmt: skip
    text = text.replace('bf16[16, 1024, 1024] = tensor("up", bf16[16, 1024, 1024])',
                        'f32[16, 1024, 1024] = cast(tensor("up", bf16[16, 1024, 1024]), to=f32)')  # fmt: skip
    at = {B: 4, S: 1, P: 9}
    weights = [sum(float((w.weights * w.calls).subs(at)) for w in module_work(m)) for m in (layers, parse_module(text))]
    assert weights[0] == pytest.approx(weights[1])


def test_a_part_of_a_tensor_counts_no_more_than_its_type():
    whole = 'tensor("o", bf16[1024, 64])'
    text = LAYERS.replace(whole, 'slice(tensor("o", bf16[4096, 64]), axis=0, start=0, stop=1024)')
    consts = {c.value.name: stored_bits(c) for c in parse_module(text).by_name["layer"].consts}
    assert (consts["o"], consts["router"], consts["up"]) == (32, 32, 16)


def test_costs_are_declared_of_operands_that_there_are():
    for definition in OPS.values():
        names = {o.name for o in definition.signature.operands}
        assert {*definition.rows, *definition.reads, *definition.appends} <= names, definition.name
        if definition.view:
            assert (len(names), len(definition.signature.results), definition.custom_flops) == (1, 1, 0)


# --- times ---------------------------------------------------------------------------------------------------------


def test_time_is_the_floor_and_the_longest_roof(h200):
    step = h200.at(batch=2, new=1, past=1000)
    floor = ASSUMED["launch"] + 2 * ASSUMED["latency"]
    rows = {(row.function, row.op): row for row in step.grouped("function", "op")}
    up = rows["layer", "acc.grouped_up"]
    reached = 4.8e12 * ASSUMED["memory_reached"]
    assert up.time == pytest.approx(4 * floor + up.weights / reached)  # activations of 2 tokens stay in the cache
    assert (up.device_bytes, up.bound) == (up.weights, "launch" if 4 * floor > up.weights / reached else "memory")
    sort = rows["layer", "acc.sort"]
    assert sort.bound == "launch"
    assert sort.time == pytest.approx(4 * floor, rel=0.01)
    assert step.time == pytest.approx(sum(row.time for row in step.rows))
    assert step.tokens_per_second == pytest.approx(2 / step.time)
    assert step.bandwidth_share == pytest.approx(step.total.device_bytes / 4.8e12 / step.time)


def test_prefill_is_bound_by_the_matrix_unit(h200):
    rows = {row.op: row for row in h200.at(batch=8, new=8192).grouped("op")}
    for op in ("acc.grouped_up", "acc.grouped_down"):
        assert rows[op].bound == "matrix"
        assert rows[op].parts["matrix"] == pytest.approx(
            rows[op].flops["bf16"] / (989.4e12 * ASSUMED["matrix_reached"])
        )
        assert rows[op].time == pytest.approx(rows[op].parts["matrix"] + rows[op].parts["launch"])
    assert rows["core.cast"].bound == "memory"  # 268 MB are no longer in a cache of 60 MB
    assert rows["core.cast"].device_bytes == rows["core.cast"].bytes


def test_what_overlaps_is_said(layers, h200):
    both = h200.at(batch=8, new=64)
    apart = module_roofline(layers, h200.profile, overlap=Overlap(levels=False)).at(batch=8, new=64)
    hidden = module_roofline(layers, h200.profile, overlap=Overlap(launches=True)).at(batch=8, new=64)
    assert hidden.time < both.time < apart.time
    assert apart.time == pytest.approx(sum(apart.total.parts.values()))
    assert any("follow each other" in line for line in Overlap(levels=False).lines())


def test_skewed_routing_reads_fewer_experts(layers, h200):
    skewed = module_roofline(layers, h200.profile, skew=1.2)
    assert skewed.at(batch=16).total.weights < h200.at(batch=16).total.weights
    assert any("Zipf, exponent 1.2" in line for line in skewed.assumptions())


def test_every_assumption_has_a_meaning():
    assert set(ASSUMED) == set(MEANING)


def test_a_figure_that_is_unknown_is_named(layers):
    with pytest.raises(MoecError, match=r"memory\.gm\.bandwidth of cambricon-mlu590 is unknown"):
        module_roofline(layers, shipped_profiles()["cambricon-mlu590"])
    with pytest.raises(MoecError, match=r"unit\.bf16\.peak of cambricon-mlu590"):
        module_roofline(layers, find_profile("cambricon-mlu590", {"memory.gm.bandwidth": "2.0TB/s"}))
    given = {"memory.gm.bandwidth": "2.0TB/s", "unit.bf16.peak": "300TFLOPS", "launch": "10us"}
    found = module_roofline(layers, find_profile("cambricon-mlu590", given))
    total = found.at().total
    assert total.parts["launch"] == pytest.approx(total.kernels * (10e-6 + 2 * ASSUMED["latency"]))
    assert any("vector_peak of cambricon-mlu590 is unknown" in line for line in found.assumptions())
    assert not any(line.startswith("launch =") for line in found.assumptions())


def test_every_other_chip_predicts(layers):
    for name, profile in shipped_profiles().items():
        if name != "cambricon-mlu590":
            step = module_roofline(layers, profile).at(batch=4, past=2000)
            assert 0 < step.bandwidth_share < 1, name


def test_sizes_outside_the_program_are_an_error(h200):
    with pytest.raises(MoecError, match=r"B = 65 is outside the program's 1\.\.64"):
        h200.at(batch=65)
    with pytest.raises(MoecError, match="devices = 0"):
        module_roofline(h200.module, h200.profile, devices=0)


# --- how many experts are touched ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "chosen", "tokens"), [(64, 8, 1), (64, 8, 16), (256, 8, 128), (384, 6, 64)])
def test_balanced_experts_against_draws(experts, chosen, tokens):
    random = np.random.default_rng(0)
    draws = [
        len(np.unique(random.random((tokens, experts)).argpartition(chosen, axis=1)[:, :chosen])) for _ in range(300)
    ]
    assert distinct_experts(experts, chosen, tokens) == pytest.approx(np.mean(draws), rel=0.01)
    symbolic = distinct_experts(experts, chosen, B * S)
    assert float(symbolic.subs({B: tokens, S: 1})) == pytest.approx(distinct_experts(experts, chosen, tokens))


@pytest.mark.parametrize("skew", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_skewed_experts_against_draws(skew, tokens):
    """A token draws k distinct experts in turn by their weights, as Gumbel noise on logits does.

    The formula gives each expert k times its share, cut off at 1. Drawing without replacement favours the rare ones a
    little more than that, so the formula is a lower estimate, here by 12 % at most.
    """
    experts, chosen, random = 64, 8, np.random.default_rng(1)
    logits = -skew * np.log(np.arange(1, experts + 1))
    draws = []
    for _ in range(200):
        noisy = logits + random.gumbel(size=(tokens, experts))
        draws.append(len(np.unique(noisy.argpartition(experts - chosen, axis=1)[:, -chosen:])))
    expected = distinct_experts(experts, chosen, tokens, skew)
    assert 0.88 * np.mean(draws) <= expected <= 1.01 * np.mean(draws)
    assert float(distinct_experts(experts, chosen, B, skew).subs(B, tokens)) == pytest.approx(expected)


# --- the command ---------------------------------------------------------------------------------------------------


def test_inspect_predicts_a_step():
    command = ("inspect", CONFIGS / "DeepSeek-V4-Flash", "--target", "nvidia-b200", "--batch", 16, "--context", 8192)
    start = time.perf_counter()
    shown = invoke(*command)
    assert shown.exit_code == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert "on nvidia-b200, predicted: 1 new token of 16 sequences behind 8,192 past tokens" in lines
    for words in (
        "acc.grouped_up",
        "predicted step time",
        "tokens/s",
        "assumed: launch = 3e-06",
        "routing is balanced",
    ):
        assert words in shown.stdout
    found = json.loads(invoke(*command, "--devices", 2, "-D", "memory.dram.bandwidth=4TB/s", "--json").stdout)[
        "predicted"
    ]
    assert time.perf_counter() - start < 60
    assert (found["target"], found["batch"], found["past"], found["devices"]) == ("nvidia-b200", 16, 8192, 2)
    assert sum(f["time"] for f in found["functions"]) == pytest.approx(found["time"])
    assert sum(op["share"] for f in found["functions"] for op in f["ops"]) == pytest.approx(1)
    assert found["memory"]["fits"]
    assert set(found["formulas"]["bytes"]) == {"weights", "activations", "states"}


def test_inspect_says_what_is_wrong(tmp_path):
    file = tmp_path / "program.moir"
    file.write_text(LAYERS, encoding="utf-8")
    for arguments, message in (
        (("--batch", 2), "--batch belongs to --target"),
        (("-D", "launch=1us"), "-D belongs to --target"),
        (("--target", "cpu"), "target cpu is not known by figures"),
        (("--target", "nvidia-b20"), "did you mean nvidia-b200"),
        (("--target", "cambricon-mlu590"), "memory.gm.bandwidth of cambricon-mlu590 is unknown"),
        (("--target", "nvidia-h200", "--batch", 65), "B = 65 is outside"),
    ):
        shown = invoke("inspect", file, *arguments)
        assert shown.exit_code == 2
        assert message in shown.stderr
    shown = invoke("inspect", file, "--target", "nvidia-h200", "--batch", 64, "--new", 128)
    assert shown.exit_code == 0, shown.stderr
    assert "128 new tokens of 64 sequences" in shown.stdout
