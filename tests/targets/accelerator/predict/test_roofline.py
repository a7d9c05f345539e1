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
from moec.targets.accelerator.kernels.experts import Experts
from moec.targets.accelerator.predict.assumed import ASSUMED, MEANING
from moec.targets.accelerator.predict.experts_touched import distinct_experts
from moec.targets.accelerator.predict.work import WorkTable, call_counts, module_work, stored_bits, weight_bytes
from moec.targets.accelerator.select.exchange import exchange_entries
from moec.targets.accelerator.select.predicted import assumption_lines
from moec.targets.accelerator.select.step import predict_step
from moec.targets.accelerator.tile.packing import Packing
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
  %order, %tiles = acc.sort(%ids) {experts=16} : i64[2*B*S], i64[5, 3, 2*B*S]
  %h = acc.grouped_up(%t, %ids, %order, %tiles, %up, _) {act=gated(silu)} : f32[2*B*S, 512]
  %e = acc.grouped_down(%h, %ids, %order, %tiles, %gates, %down, _, _, _) : f32[B*S, 1024]
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
def table(layers: Module) -> WorkTable:
    return WorkTable(layers, tuple(module_work(layers)))


def at(module: Module, chip: str = "nvidia-h200", **step):
    return predict_step(module, find_profile(chip, {}), **step)


def the(found: WorkTable, op: str, number: int = 0):
    """Return one op's work, the `number`-th of its kind."""
    return [work for work in found.works if work.op == op][number]


# --- amounts -------------------------------------------------------------------------------------------------------


def test_weights_count_as_stored(table):
    assert (
        the(table, "acc.linear").weights == 64 * 1024 * sympy.Rational(4 * 128 + 32, 128) / 8
    )  # codes, a scale for 128
    assert the(table, "acc.linear", 1).weights == 2 * 1024 * 64  # the checkpoint has bf16, though the program types f32
    assert the(table, "acc.linear", 2).weights == 4 * 16 * 1024
    table = the(table, "nn.embedding")
    assert table.flops == 0
    assert float(table.weights.subs({B: 1, S: 1})) == pytest.approx(2 * 1024)  # one row


def test_experts_are_read_where_a_token_chose_them(table):
    touched = 16 * (1 - sympy.Rational(14, 16) ** (B * S))
    up, down = the(table, "acc.grouped_up"), the(table, "acc.grouped_down")
    assert sympy.simplify(up.weights - touched * 1024 * 1024 * 2) == 0
    assert sympy.simplify(down.weights - touched * 1024 * 512 * sympy.Rational(17, 32)) == 0  # 4 bits, 8 for 32 codes
    # x, ids, order and a tile for each pair at most come in, the activation goes out; the pairs are B S times 2
    assert sympy.expand(up.activations - (2 * 1024 + 2 * 8 + 2 * 8 + 3 * 2 * 8 + 2 * 2 * 512) * B * S) == 0
    assert sympy.expand(up.flops - 2 * B * S * (2 * 1024 * 1024 + 4 * 512)) == 0


def test_experts_on_several_devices_see_the_tokens_of_all(layers, table):
    spread = WorkTable(layers, tuple(module_work(layers, devices=4)))
    up = the(spread, "acc.grouped_up")
    assert float(up.weights.subs({B: 1, S: 1})) == pytest.approx(16 * (1 - (14 / 16) ** 4) / 4 * 1024 * 1024 * 2)
    assert (up.flops, up.activations) == (the(table, "acc.grouped_up").flops, the(table, "acc.grouped_up").activations)
    experts = 4 * 16 * (1024 * 1024 * 2 + 1024 * 512 * 17 // 32)
    assert weight_bytes(layers) - weight_bytes(layers, 4) == experts * 3 // 4


def test_a_cache_is_appended_to_and_read_in_its_window(table):
    append, attention = the(table, "nn.cache_append"), the(table, "nn.attention")
    assert sympy.expand(append.states - 2 * 64 * B * S) == 0  # what was there stays where it is
    assert sympy.expand(append.activations - 2 * 64 * B * S) == 0
    # keys are values: read once, and of them only what the window shows
    for new, past, slots in ((1, 100, 101), (1, 4000, 256), (512, 4000, 512 + 255)):
        assert attention.states.subs({B: 3, S: new, P: past}) == pytest.approx(min(2 * slots, past + new) * 3 * 64 * 2)


def test_formulas_of_a_module_are_those_of_its_ops(layers, table):
    assert call_counts(layers) == {"main": 1, "layer": 4}
    sizes = {B: 2, S: 3, P: 50}
    step = at(layers, batch=2, new=3, past=50)
    for name, formula in table.bytes.items():
        assert float(formula.subs(sizes)) == pytest.approx(getattr(step.total, name))
    for unit, formula in table.flops.items():
        assert float(formula.subs(sizes)) == pytest.approx(step.total.flops[unit])
    assert {w.op for w in table.works if w.unit == "bf16"} == {
        "acc.linear", "nn.attention", "acc.grouped_up", "acc.grouped_down"
    }  # fmt: skip
    assert not any(work.op == "core.reshape" for work in table.works)


def whole_experts(text: str) -> str:
    """Return the program with its experts in one op."""
    text = text.replace("%order, %tiles = acc.sort(%ids) {experts=16} : i64[2*B*S], i64[5, 3, 2*B*S]\n", "")
    text = text.replace(
        "%h = acc.grouped_up(%t, %ids, %order, %tiles, %up, _) {act=gated(silu)} : f32[2*B*S, 512]\n", ""
    )
    text = text.replace("acc.grouped_down(%h, %ids, %order, %tiles, %gates, %down, _, _, _)",
                        "moe.experts(%t, %ids, %gates, %up, %down, _, _)")  # fmt: skip
    return text.replace('bf16[16, 1024, 1024] = tensor("up", bf16[16, 1024, 1024])',
                        'f32[16, 1024, 1024] = cast(tensor("up", bf16[16, 1024, 1024]), to=f32)')  # fmt: skip


def test_a_module_of_stage_moe_reads_the_same_weights(layers):
    text = whole_experts(LAYERS).replace("stage kernel", "stage moe").replace("acc.linear", "core.linear")
    sizes = {B: 4, S: 1, P: 9}
    weights = [
        sum(float((w.weights * w.calls).subs(sizes)) for w in module_work(m)) for m in (layers, parse_module(text))
    ]
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


def test_time_is_that_of_the_kernels_and_of_what_the_framework_computes(layers):
    step = at(layers, batch=2, new=1, past=1000)
    floor = ASSUMED["launch"] + 2 * ASSUMED["latency"]
    rows = {(row.function, row.op): row for row in step.grouped("function", "op")}
    up = rows["layer", "acc.grouped_up"]
    assert up.weights / 4.8e12 < up.parts["memory"] < up.time
    assert up.kernels == 4
    assert rows["layer", "acc.sort"].kernels == rows["layer", "acc.sort"].time == 0  # four pairs need no sorting
    cast = rows["main", "core.cast"]
    assert cast.time == pytest.approx(floor + cast.parts["cache"])  # activations of 2 tokens stay in the cache
    assert cast.bound == "launch"
    assert step.time == pytest.approx(sum(row.time for row in step.rows))
    assert step.tokens_per_second == pytest.approx(2 / step.time)
    assert step.bandwidth_share == pytest.approx(step.total.device_bytes / 4.8e12 / step.time)


def test_prefill_is_not_faster_than_the_matrix_unit(layers):
    rows = {row.op: row for row in at(layers, batch=8, new=8192).grouped("op")}
    for op in ("acc.grouped_up", "acc.grouped_down"):
        assert rows[op].time > rows[op].flops["bf16"] / 989.4e12
    assert rows["core.cast"].bound == "memory"  # 268 MB are no longer in a cache of 60 MB
    assert rows["core.cast"].device_bytes == rows["core.cast"].bytes


def test_experts_on_several_devices_take_less(layers):
    one, four = at(layers, batch=16), at(layers, batch=16, devices=4)
    op = {row.op: row.time for row in one.rows}, {row.op: row.time for row in four.rows}
    assert op[1]["acc.grouped_up"] < op[0]["acc.grouped_up"]
    assert op[1]["acc.linear"] == op[0]["acc.linear"]
    with pytest.raises(MoecError, match="16 experts on 3 devices"):
        at(layers, devices=3)


def test_every_assumption_has_a_meaning():
    assert set(ASSUMED) == set(MEANING)


def test_a_figure_that_is_unknown_is_named(layers):
    with pytest.raises(MoecError, match=r"memory\.gm\.bandwidth of cambricon-mlu590 is unknown"):
        at(layers, "cambricon-mlu590")
    with pytest.raises(MoecError, match=r"unit\.bf16\.peak of cambricon-mlu590"):
        predict_step(layers, find_profile("cambricon-mlu590", {"memory.gm.bandwidth": "2.0TB/s"}))
    given = {"memory.gm.bandwidth": "2.0TB/s", "unit.bf16.peak": "300TFLOPS", "launch": "10us", "cores": "64"}
    profile = find_profile("cambricon-mlu590", given)
    cast = next(row for row in predict_step(layers, profile).rows if row.op == "core.cast")
    assert cast.parts["launch"] == pytest.approx(10e-6 + 2 * ASSUMED["latency"])
    assert any(line.startswith("vector_share =") for line in assumption_lines(profile, 1))
    assert not any(line.startswith("launch =") for line in assumption_lines(profile, 1))
    assert not any(line.startswith("vector_share") for line in assumption_lines(find_profile("nvidia-h200", {}), 1))


@pytest.mark.parametrize("chip", ["nvidia-gb200", "nvidia-gb10", "amd-mi355x", "cambricon-mlu370"])
def test_what_is_no_product_takes_time_on_every_chip(layers, chip):
    """Where the peak of the vector units is unknown it is assumed: softmax is never free."""
    rows = {row.op: row for row in at(layers, chip, batch=8, new=1024).rows}
    assert rows["nn.attention"].parts["vector"] > 0
    assert rows["moe.route"].parts["vector"] > 0


def test_the_assumed_vector_peak_is_no_more_than_that_of_any_known_chip():
    for name, profile in shipped_profiles().items():
        if profile.vector_peak and profile.unit("bf16"):
            assert profile.vector_peak.value >= ASSUMED["vector_share"] * profile.need("unit.bf16.peak"), name


def test_a_link_of_unknown_latency_has_one(layers):
    e = Experts(16, 2, 1024, 512, Packing("bf16", 1, 1), Packing("bf16", 1, 1))
    unknown, known = (
        exchange_entries(e, find_profile("nvidia-h200", figures), (1,))[0]["steps"][0]["dispatch"]
        for figures in ({}, {"link.nvlink.latency": "5us"})
    )
    moved = unknown["bytes"] / 450e9
    assert unknown["time"] == pytest.approx(moved + ASSUMED["link_latency"])
    assert known["time"] == pytest.approx(moved + 5e-6)


def test_an_op_that_no_kernel_computes_is_named():
    with pytest.raises(MoecError, match=r"no kernel computes moe\.experts"):
        at(parse_module(whole_experts(LAYERS)))


def test_sizes_outside_the_program_are_an_error(layers):
    with pytest.raises(MoecError, match=r"B = 65 is outside the program's 1\.\.64"):
        at(layers, batch=65)
    with pytest.raises(MoecError, match="devices = 0"):
        at(layers, devices=0)


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


# --- the command ---------------------------------------------------------------------------------------------------


def test_inspect_predicts_a_step():
    command = ("inspect", CONFIGS / "DeepSeek-V4-Flash", "--target", "nvidia-b200", "--batch", 16, "--context", 8192)
    start = time.process_time()
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
    assert time.process_time() - start < 30
    assert (found["target"], found["batch"], found["past"], found["devices"]) == ("nvidia-b200", 16, 8192, 2)
    assert sum(f["time"] for f in found["functions"]) == pytest.approx(found["time"])
    assert sum(op["share"] for f in found["functions"] for op in f["ops"]) == pytest.approx(1)
    assert found["memory"]["fits"]
    assert set(found["formulas"]["bytes"]) == {"weights", "activations", "states"}


def test_inspect_predicts_one_token_which_needs_no_sorting():
    """The kernels of the experts find the tokens of so few choices by themselves: acc.sort has none."""
    command = ("inspect", CONFIGS / "OLMoE-1B-7B-0924", "--target", "nvidia-h200", "--context", 16, "--json")
    shown = invoke(*command)
    assert shown.exit_code == 0, shown.stderr
    ops = {op["op"]: op for f in json.loads(shown.stdout)["predicted"]["functions"] for op in f["ops"]}
    assert (ops["acc.sort"]["kernels"], ops["acc.sort"]["time"]) == (0, 0)
    assert ops["acc.grouped_up"]["time"] > 0


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
