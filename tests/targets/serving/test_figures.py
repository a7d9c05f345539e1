"""Figures of a plan beside its times: the schema of its JSON, bytes, FLOPs, joules and money of a token, loads of experts."""

import json

import jsonschema
import pytest
import torch
from moec.compiler import driver
from moec.compiler.errors import MoecError
from moec.compiler.frontends.load import load
from moec.compiler.runtime.routing import count_routing
from moec.targets.serving.plan import Request, make_plan
from moec.targets.serving.routing import routing_text
from places import ROOT, TINY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from workload_for_tests import CHOSEN, EXPERTS, HEADS, HIDDEN, INNER, LAYERS, VOCABULARY, WIDTH, small_workload

MODEL = small_workload()
EXPERT = 3 * HIDDEN * INNER
SCHEMA = json.loads((ROOT / "targets/serving/plan.schema.json").read_text())


def plan(on="hgx-h200", **asked):
    return make_plan(MODEL, Request(on=on, engine="vllm", **asked))


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"batch": 64, "tpot": 0.05, "price": 2.5, "drafts": 2, "weights": "experts=fp4,attention=fp8"},
        {"on": "rtx5090-pc", "weights": "fp4"},
        {"on": "apple-m2-ultra", "cache": "fp8"},
    ],
)
def test_plans_obey_the_schema(asked):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(plan(**asked), SCHEMA)
    with pytest.raises(jsonschema.ValidationError, match="was unexpected"):
        jsonschema.validate({**plan(**asked), "more": 1}, SCHEMA)


def test_what_one_token_takes():
    found = plan("nvidia-h200:1", batch=1, input=1000, output=2, price=3.6)
    own = LAYERS * (HIDDEN * WIDTH * (2 * HEADS + 8) + EXPERTS * HIDDEN + CHOSEN * EXPERT) + VOCABULARY * HIDDEN
    cache = LAYERS * 2 * 4 * WIDTH * 1001
    token = found["token"]
    assert token["bytes"] == pytest.approx(2 * (own + cache))
    assert token["flops"] == pytest.approx(2 * own + LAYERS * 4 * HEADS * WIDTH * 1001)
    assert token["weights_touched"] == pytest.approx(own / MODEL.parameters)
    rate = found["predicted"]["tokens_per_s_per_device"]
    assert token["joules"] == pytest.approx(700 / rate)
    assert found["cost"]["per_million_tokens"] == pytest.approx(1000 / rate)
    low, high = found["cost"]["per_million_tokens_interval"]
    assert low < found["cost"]["per_million_tokens"] < high
    many = plan("nvidia-h200:1", batch=256)["token"]
    assert many["weights_touched"] > 0.9 and many["bytes"] < token["bytes"] / 2


def routing_file(folder, counts):
    path = folder / "routing.json"
    path.write_text(routing_text("small", sum(counts[0]) // CHOSEN, counts))
    return str(path)


def test_copies_of_hot_experts_even_out_what_a_histogram_shows(tmp_path):
    skewed = [[1000 if e < 4 else 10 for e in range(EXPERTS)]] * LAYERS
    given = {"tp": 1, "attention_dp": 8, "ep": 8, "pp": 1, "batch": 64, "input": 512, "output": 512}
    even = plan(**given)
    file = routing_file(tmp_path, skewed)
    alone, copied = plan(**given, routing=file), plan(**given, routing=file, copies=8)
    # the four hot experts lie on one rank in the order of numbers, on four of eight when they are spread
    loads = 4 * 1000 + 28 * 10
    assert alone["experts"]["imbalance_in_order"] == pytest.approx(4000 * 8 / loads)
    assert alone["experts"]["imbalance"] == pytest.approx(1030 * 8 / loads)
    assert 1 <= copied["experts"]["imbalance"] < 1.4 < alone["experts"]["imbalance"]
    assert even["parts_ms"]["experts"] < copied["parts_ms"]["experts"] < alone["parts_ms"]["experts"]
    assert copied["memory"]["weights"] - alone["memory"]["weights"] == 2 * LAYERS * EXPERT  # one copy a device
    assert {len(row) for row in copied["experts"]["physical_to_logical"]} == {EXPERTS + 8}
    jsonschema.validate(copied, SCHEMA)


@pytest.mark.parametrize(
    ("asked", "said", "todo"),
    [
        ({"copies": 8}, "nothing says which are hot", "--routing"),
        ({"routing": True, "copies": 8}, "copies need to know the ranks", "--ep"),
        ({"routing": True, "copies": 3, "ep": 8}, "32 experts and 3 copies do not divide over 8", "--copies 8"),
    ],
)
def test_copies_that_cannot_be(asked, said, todo, tmp_path):
    if "routing" in asked:
        asked = {**asked, "routing": routing_file(tmp_path, [[1] * EXPERTS] * LAYERS)}
    with pytest.raises(MoecError, match=said) as error:
        plan(**asked)
    assert todo in error.value.todo


def test_a_histogram_of_another_model_is_refused(tmp_path):
    with pytest.raises(MoecError, match="of 3 layers with 32 experts, the model has 8 with 32"):
        plan(routing=routing_file(tmp_path, [[1] * EXPERTS] * 3))
    path = tmp_path / "other.json"
    path.write_text("[]")
    with pytest.raises(MoecError, match="not a JSON object"):
        plan(routing=str(path))


def test_a_tied_table_counts_once():
    held = sum(t.numel() for t in load_file(TINY / "model.safetensors").values())
    found = driver.import_workload(TINY)
    norms = held - found.parameters  # vectors that no product reads are not counted
    assert 0 <= norms < 0.001 * held


def test_recorded_routing_is_that_of_transformers():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    rows = [torch.randint(0, 2048, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 7)]
    expected = torch.zeros(4, 16, dtype=torch.int64)
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row]), output_router_logits=True).router_logits
        for layer, scores in enumerate(logits):
            expected[layer] += torch.bincount(scores.topk(2, -1).indices.flatten(), minlength=16)
    loaded = load(TINY)
    assert count_routing(driver.fused_module(loaded.module), loaded.need_weights(), rows) == expected.tolist()
