"""Plans of a workload written by hand: bytes as computed here, refusals with what works instead, and choices that follow."""

import json
from itertools import pairwise

import pytest
from moec.compiler.errors import MoecError
from moec.targets.serving.degrees import Degrees, possible_degrees, why_impossible
from moec.targets.serving.memory import WORKSPACE, device_memory, largest_context
from moec.targets.serving.plan import Request, make_plan
from moec.targets.serving.storage import choose_storage
from moec.targets.systems.read import find_system
from workload_for_tests import (
    CHOSEN,
    EXPERTS,
    GROUPS,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    VOCABULARY,
    WIDTH,
    small_workload,
)

MODEL = small_workload()
ATTENTION = LAYERS * HIDDEN * WIDTH * (2 * HEADS + 2 * GROUPS)
ROUTER = LAYERS * EXPERTS * HIDDEN
EXPERT = 3 * HIDDEN * INNER
ENDS = 2 * VOCABULARY * HIDDEN


def box(tmp_path, memory, devices=1, more=""):
    """Return the file of a system with so many bytes of memory."""
    file = tmp_path / "box.toml"
    fabric = '[fabric.wire]\nbandwidth = "50GB/s"\n' if devices > 1 else ""
    file.write_text(
        f'devices = {devices}\n{fabric}{more}\n[device]\nmemory = {memory}\nbandwidth = "1TB/s"\npeak.bf16 = "100TFLOPS"\n'
    )
    return str(file)


def plan(on, **asked):
    return make_plan(MODEL, Request(on=on, engine="vllm", **asked))


def test_counts_of_the_workload():
    assert MODEL.parameters == ATTENTION + ROUTER + LAYERS * EXPERTS * EXPERT + ENDS
    assert MODEL.active == ATTENTION + ROUTER + LAYERS * CHOSEN * EXPERT + ENDS // 2
    assert (MODEL.blocks, MODEL.expert_blocks) == (LAYERS, LAYERS)


@pytest.mark.parametrize(
    ("degrees", "weights", "expected"),
    [
        (Degrees(), None, 2 * (ATTENTION + ROUTER + LAYERS * EXPERTS * EXPERT + ENDS)),
        (Degrees(tp=4), None, (2 * (ATTENTION + ROUTER + LAYERS * EXPERTS * EXPERT + ENDS)) // 4),
        # attention is copied four times, experts are divided
        (Degrees(dp=4, ep=4), None, 2 * (ATTENTION + ROUTER + ENDS) + 2 * LAYERS * EXPERTS * EXPERT // 4),
        (Degrees(pp=2), None, (ATTENTION + ROUTER + LAYERS * EXPERTS * EXPERT) + 2 * ENDS),
        # nvfp4: 4 bits and 8 for 16 of them; attention stays bf16
        (Degrees(), "fp4", 2 * (ATTENTION + ROUTER + ENDS) + LAYERS * EXPERTS * EXPERT * 9 // 16),
        (Degrees(), "experts=mxfp4", 2 * (ATTENTION + ROUTER + ENDS) + LAYERS * EXPERTS * EXPERT * 17 // 32),
    ],
)
def test_bytes_of_weights(degrees, weights, expected):
    storage = choose_storage(MODEL, weights, "bf16")
    found = device_memory(MODEL, find_system("hgx-h200"), degrees, storage, 1, 1000)
    assert found.weights == expected


@pytest.mark.parametrize(("tp", "cache", "size"), [(1, "bf16", 2), (2, "bf16", 2), (8, "bf16", 2), (1, "fp8", 1)])
def test_bytes_of_caches(tp, cache, size):
    storage = choose_storage(MODEL, None, cache)
    found = device_memory(MODEL, find_system("hgx-h200"), Degrees(tp=tp), storage, 5, 3000)
    # four groups of heads divide over four devices at most
    assert found.cache == 5 * (LAYERS * 2 * GROUPS * WIDTH * 3000 * size // min(tp, GROUPS))


def test_requests_are_of_all_ages():
    storage = choose_storage(MODEL, None, "bf16")
    found = device_memory(MODEL, find_system("hgx-h200"), Degrees(), storage, 5, 3000, 1000)
    # one is at its end, the others are half through their answers
    assert found.cache == LAYERS * 2 * GROUPS * WIDTH * 2 * (3000 + 4 * 2500)


def test_memory_to_the_byte(tmp_path):
    storage = choose_storage(MODEL, None, "bf16")
    needed = device_memory(MODEL, find_system("hgx-h200"), Degrees(), storage, 3, 2048, 1024).needed
    fits = plan(box(tmp_path, needed), batch=3)
    assert fits["fits"]
    assert fits["memory"]["needed"] == fits["memory"]["capacity"] == needed
    assert fits["largest"]["batch"] == 3
    (tmp_path / "less").mkdir()
    with pytest.raises(MoecError, match="the cache of 3 requests of 2,048 tokens does not fit") as error:
        plan(box(tmp_path / "less", needed - 1), batch=3)
    assert "--batch 2" in error.value.todo
    assert plan(box(tmp_path / "less", needed - 1), batch=2)["fits"]


def test_largest_context_fits_and_one_token_more_does_not(tmp_path):
    system = find_system(box(tmp_path, 3_000_000_000))
    storage = choose_storage(MODEL, None, "bf16")
    found = largest_context(MODEL, system, Degrees(), storage, 4)
    assert 0 < found < MODEL.context
    assert device_memory(MODEL, system, Degrees(), storage, 4, found).free >= 0
    assert device_memory(MODEL, system, Degrees(), storage, 4, found + 1).free < 0


def test_one_degree_that_cannot_be_is_named():
    with pytest.raises(MoecError, match=f"{EXPERTS} experts do not divide over 5 expert-parallel ranks"):
        plan("nvidia-h200:5", ep=5)
    assert plan("hgx-h200", ep=8)["degrees"]["ep"] == 8  # also for one request


@pytest.mark.parametrize(
    ("asked", "said", "todo"),
    [
        ({"tp": 8, "attention_dp": 1, "ep": 3, "pp": 1}, "3 expert-parallel ranks do not divide", "--tp"),
        ({"tp": 3, "attention_dp": 1, "ep": 1, "pp": 1}, "512 inner rows do not divide over 3", "--tp"),
        ({"tp": 16, "attention_dp": 1, "ep": 16, "pp": 1}, "take 16 devices", "--tp 8"),
        ({"tp": 1, "attention_dp": 1, "ep": 1, "pp": 9}, "do not make 9 pipeline stages", "--pp"),
    ],
)
def test_impossible_degrees_are_refused_with_those_that_work(asked, said, todo):
    with pytest.raises(MoecError, match=said) as error:
        plan("hgx-h200", **asked)
    assert todo in error.value.todo
    options = dict(part.split() for part in error.value.todo.split("--")[1:])
    nearest = Degrees(*(int(options[name]) for name in ("tp", "attention-dp", "ep", "pp")))
    assert why_impossible(nearest, MODEL, find_system("hgx-h200")) is None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"engine": "none"}, "no measured times of 'none'"),
        ({"engine": "vllm", "weights": "fp5"}, "no format fp5"),
        ({"engine": "vllm", "weights": "heads=fp8"}, "'heads' is no role"),
        ({"engine": "vllm", "cache": "int4"}, "cannot be stored as int4"),
        ({"engine": "vllm", "input": 70000}, "the model takes 65,536 tokens"),
        ({"engine": "vllm", "batch": 0}, "--batch must be at least 1"),
        ({"engine": "vllm", "drafts": 9}, "9 drafts"),
        ({"engine": "vllm", "tpot": 1e-6}, "no plan keeps to the limits"),
    ],
)
def test_what_cannot_be_answered(asked, said):
    with pytest.raises(MoecError, match=said):
        make_plan(MODEL, Request(on="hgx-h200", **asked))


def test_a_system_whose_devices_are_not_joined_is_refused(tmp_path):
    file = tmp_path / "apart.toml"
    file.write_text('device = "nvidia-h200"\ndevices = 2\n')
    with pytest.raises(MoecError, match="no fabric joins all 2 devices"):
        plan(str(file))


def test_requests_beyond_the_cache_wait_where_that_is_asked(tmp_path):
    on = box(tmp_path, 2_900_000_000)
    room = plan(on, batch=1)["largest"]["batch"]
    full, beyond = plan(on, batch=room), plan(on, batch=4 * room, queue=True)
    assert beyond["load"]["running"] == room
    assert not beyond["fits"]
    rates = [p["predicted"]["tokens_per_s_per_device"] for p in (full, beyond)]
    assert rates[1] == pytest.approx(rates[0])  # throughput is flat
    assert beyond["predicted"]["ttft_ms"] > 100 * full["predicted"]["ttft_ms"]  # and the first token takes long


def test_chosen_degrees_are_the_fastest_for_the_same_requests():
    found = plan("hgx-h200", batch=64)
    ways = list(possible_degrees(MODEL, find_system("hgx-h200"), {}))
    assert len(set(ways)) == len(ways) > 8
    times = {}
    for way in ways:
        ranks = way.dp * (8 // way.devices)
        own = plan("hgx-h200", tp=way.tp, attention_dp=way.dp, ep=way.ep, pp=way.pp, batch=64 // ranks)
        assert own["load"]["requests"] == 64
        times[way] = own["predicted"]["tpot_ms"]
    best = min(times, key=lambda way: times[way])
    assert found["degrees"] == best.entry()
    assert found["predicted"]["tpot_ms"] == pytest.approx(times[best])
    assert plan("hgx-h200", batch=64, tp=2)["degrees"]["tp"] == 2


def test_the_front_holds_what_nothing_beats_and_keeps_to_the_limits():
    found = plan("hgx-h200", batch=16, tpot=0.02, ttft=1.0)["pareto"]
    assert len(found) > 2
    assert all(a["tpot_ms"] < b["tpot_ms"] for a, b in pairwise(found))
    assert all(a["tokens_per_s_per_device"] < b["tokens_per_s_per_device"] for a, b in pairwise(found))
    assert all(row["tpot_ms"] <= 20 and row["ttft_ms"] <= 1000 for row in found)


def test_figures_of_a_plan_are_of_one_another():
    found = plan("hgx-h200", tp=8, attention_dp=1, ep=8, pp=1, batch=64)
    predicted = found["predicted"]
    assert predicted["tokens_per_s_per_device"] == pytest.approx(64 / (predicted["tpot_ms"] / 1e3) / 8)
    assert sum(found["parts_ms"].values()) == pytest.approx(predicted["tpot_ms"])
    for name in ("ttft_ms", "tpot_ms", "tokens_per_s_per_device"):
        low, high = predicted[f"{name}_interval"]
        assert 0 < low < high
    assert json.loads(json.dumps(found)) == found
    assert found["memory"]["workspace"] == WORKSPACE


def test_more_of_something_takes_longer():
    times = [
        plan("hgx-h200", tp=8, attention_dp=1, ep=8, pp=1, batch=b)["predicted"]["tpot_ms"] for b in (1, 8, 64, 512)
    ]
    assert times == sorted(times)
    stages = [plan("hgx-h200", tp=1, attention_dp=1, ep=1, pp=n)["predicted"]["tpot_ms"] for n in (1, 2, 4)]
    assert stages == sorted(stages)  # one request goes through the stages one after the other
    lengths = [plan("nvidia-h200:1", batch=8, input=n)["predicted"]["tpot_ms"] for n in (512, 8192, 32768)]
    assert lengths == sorted(lengths)
    drafts = [plan("nvidia-h200:1", drafts=n)["predicted"]["tpot_ms"] for n in (0, 1, 3)]
    assert drafts == sorted(drafts, reverse=True)  # of one request, a step costs hardly more


def test_experts_that_do_not_fit_lie_in_host_memory_and_on_disk(tmp_path):
    host = '[host]\nmemory = "16GB"\nbandwidth = "80GB/s"\nlink = "20GB/s"\n'
    storage = choose_storage(MODEL, None, "bf16")
    rest = device_memory(MODEL, find_system("hgx-h200"), Degrees(), storage, 1, 2048, 1024).needed
    experts = 2 * LAYERS * EXPERTS * EXPERT
    half = plan(box(tmp_path, rest - experts // 2, more=host))
    assert half["fits"]
    assert half["offload"]["device"] == pytest.approx(0.5, abs=1e-3)
    assert half["offload"]["host"] == pytest.approx(0.5, abs=1e-3)
    (tmp_path / "disk").mkdir()
    small = host.replace("16GB", "200MB") + '[storage]\nbandwidth = "5GB/s"\n'
    disk = plan(box(tmp_path / "disk", rest - experts // 2, more=small))
    assert disk["offload"]["host"] == pytest.approx(200e6 * 0.9 / experts, rel=1e-3)
    assert disk["offload"]["disk"] > 0.25
    (tmp_path / "whole").mkdir()
    times = [p["predicted"]["tpot_ms"] for p in (plan(box(tmp_path / "whole", rest)), half, disk)]
    assert times == sorted(times)
