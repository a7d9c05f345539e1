"""Two pools, one that reads prompts and one that decodes: their figures against sums by hand, and what cannot be divided."""

import json

import jsonschema
import pytest
from moec.compiler.cli.plan import plan_lines
from moec.compiler.errors import MoecError
from moec.targets.serving.degrees import Degrees
from moec.targets.serving.demand import prefill_demand
from moec.targets.serving.plan import Request, make_plan
from moec.targets.serving.storage import choose_storage
from moec.targets.serving.timing import fitted_constants, prefill_seconds
from moec.targets.systems.graph import link_graph, pool_transfer
from moec.targets.systems.read import find_system
from places import ROOT
from workload_for_tests import GROUPS, LAYERS, WIDTH, small_workload

MODEL = small_workload()
SCHEMA = json.loads((ROOT / "targets/serving/plan.schema.json").read_text())


def plan(on="hgx-h200", **asked):
    return make_plan(MODEL, Request(on=on, engine="vllm", **asked))


def test_those_who_decode_read_no_prompts():
    both, apart = plan(batch=64, input=8192), plan(batch=64, input=8192, prefill=2)
    assert both["prefill"] is None
    assert both["parts_ms"]["prompts"] > 0
    assert apart["parts_ms"]["prompts"] == 0
    assert apart["prefill"]["devices"] + apart["system"]["devices"] == 8
    assert any(line.startswith("prompts      on 2 more devices (tp ") for line in plan_lines(apart))
    assert not any(line.startswith("prompts") for line in plan_lines(both))
    jsonschema.validate(both, SCHEMA)
    jsonschema.validate(apart, SCHEMA)


def test_a_cache_goes_over_the_links_between_the_pools():
    found = plan(batch=8, input=4096, prefill=4)["prefill"]
    size = LAYERS * 2 * GROUPS * WIDTH * 2 * 4096
    assert found["cache_bytes"] == size
    # through one switch: each device that holds a part of the cache sends it by its own port
    port = find_system("hgx-h200").fabrics[0]
    parts = found["degrees"]["tp"] * found["degrees"]["pp"]
    seconds = size / parts / port.bandwidth.value + port.latency.value
    assert found["transfer_ms"] == pytest.approx(1e3 * seconds)
    assert found["transfers_per_s"] == pytest.approx(4 * port.bandwidth.value / size)


@pytest.mark.parametrize(("senders", "devices"), [(1, 4), (3, 4), (2, 8), (6, 8)])
def test_the_busiest_link_between_pools_equals_the_sum_on_each(senders, devices):
    system = find_system(f"nvidia-h200:{devices}")
    found = pool_transfer(system, senders)
    graph, others = link_graph(system), devices - senders
    loads = dict.fromkeys(graph.edges, 0.0)
    for i in range(senders):
        target = senders + i * others // senders
        (switch,) = set(graph.successors(i)) & set(graph.predecessors(target))
        loads[i, switch] += 1
        loads[switch, target] += 1
    assert found.seconds == pytest.approx(max(n / graph.edges[link]["bandwidth"] for link, n in loads.items()))


def test_a_pool_reads_as_many_prompts_as_its_ranks_do_in_a_step():
    found = plan(batch=16, input=2048, prefill=2)["prefill"]
    system, storage, constants = find_system("hgx-h200:2"), choose_storage(MODEL, None, "bf16"), fitted_constants()
    way = found["degrees"]
    degrees = Degrees(way["tp"], way["attention_dp"], way["ep"], way["pp"])
    step = prefill_demand(MODEL, system, degrees, storage, 2048, alone=False)
    seconds = prefill_seconds(step, constants.shared, constants.engine("vllm"))
    assert found["prompts_per_s"] == pytest.approx(found["instances"] * degrees.dp * degrees.pp / seconds)


def test_a_slow_pool_of_prompts_bounds_the_requests():
    few, many = (plan(batch=512, input=16384, output=16, prefill=n) for n in (1, 6))
    assert few["prefill"]["bound"] == "prefill"
    assert few["prefill"]["requests_per_s"] == pytest.approx(few["prefill"]["prompts_per_s"])
    assert many["prefill"]["requests_per_s"] > 2 * few["prefill"]["requests_per_s"]
    # all requests are somewhere: they wait for their first token, or are being answered
    for found in (few, many):
        predicted, load = found["predicted"], found["load"]
        each = (predicted["ttft_ms"] + load["output"] * predicted["tpot_ms"]) / 1e3
        assert found["prefill"]["requests_per_s"] * each == pytest.approx(load["requests"], rel=0.1)
        rate = found["prefill"]["requests_per_s"] * load["output"] / 8
        assert predicted["tokens_per_s_per_device"] == pytest.approx(rate)


def test_long_answers_are_bounded_by_those_who_decode():
    found = plan(batch=64, input=256, output=4096, prefill=2)
    assert found["prefill"]["bound"] == "decode"
    assert found["prefill"]["requests_per_s"] < found["prefill"]["prompts_per_s"] / 2


def test_the_search_finds_the_best_of_all_divisions():
    asked = {"batch": 256, "input": 8192, "output": 256}
    rates = {n: plan(prefill=n, **asked)["prefill"]["requests_per_s"] for n in range(1, 8)}
    found = plan(prefill="auto", **asked)["prefill"]
    assert found["requests_per_s"] == pytest.approx(max(rates.values()))
    assert found["devices"] == max(rates, key=lambda n: rates[n])


@pytest.mark.parametrize(
    ("asked", "said", "todo"),
    [
        ({"prefill": 8}, "8 of 8 devices cannot read prompts while the others decode", "1 to 7, or auto"),
        ({"on": "nvidia-h200:1", "prefill": "auto"}, "a system of one device has no two pools", ""),
        ({"prefill": 2, "tp": 8}, "take 8 devices", "--tp"),
        ({"prefill": 2, "tpot": 1e-6}, "no division into two pools keeps to the limits", "--prefill 2"),
        ({"prefill": 7, "batch": 100_000, "input": 32768}, "have no room for 100000 requests", "smaller --prefill"),
    ],
)
def test_what_cannot_be_divided(asked, said, todo):
    with pytest.raises(MoecError, match=said) as error:
        plan(**asked)
    assert todo in error.value.todo


def test_pools_that_no_link_joins_are_refused(tmp_path):
    file = tmp_path / "apart.toml"
    file.write_text('device = "nvidia-h200"\ndevices = 2\n')
    with pytest.raises(MoecError, match="no fabric joins all 2 devices"):
        plan(str(file), prefill=1)
