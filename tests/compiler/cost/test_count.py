"""Costs: parameters, bytes, FLOPs and states from the IR, against closed formulas."""

from __future__ import annotations

import json

import pytest
import transformers
from moec.compiler.cli import report as reports
from moec.compiler.cli.report import Opened, open_source, ranges_text
from moec.compiler.cost.count import Costs, module_costs
from moec.compiler.cost.report import bytes_text, count_text, flops_text
from moec.compiler.driver import opt
from moec.compiler.errors import MoecError
from moec.compiler.frontends.load import load
from moec.compiler.ir.dims import evaluate
from moec.compiler.ir.module import Module, Op
from moec.compiler.ir.pipelines import print_pipeline
from moec.compiler.ops import OPS
from moec.compiler.text.parser import parse_module
from moec.targets import TARGETS
from places import CONFIGS

# D = 8, I = 4, 4 experts of which 2 are chosen, 3 layers, 16 tokens, head and embedding are one tensor
TINY = """moec 1 stage moe
dim B in 1..8
dim S in 1..64
dim P in 0..64

func @layer(%x: f32[B, S, 8], %k: state f32[B, 1, P, 8]) -> (f32[B, S, 8], state f32[B, 1, P + S, 8]) weights "layers.{layer}." {
  const %router : f32[4, 8] = tensor("router", f32[4, 8])
  const %up : f32[4, 8, 8] = cast(concat(stack(tensor("e.{0..3}.gate", bf16[4, 8])), stack(tensor("e.{0..3}.up", bf16[4, 8])), axis=1), to=f32)
  const %down : f32[4, 8, 4] = cast(stack(tensor("e.{0..3}.down", bf16[8, 4])), to=f32)
  const %shared : f32[8, 8] = dequantize(tensor("shared", f8e4m3[8, 8]), tensor("shared.scale", f32[2, 2]), block=[4, 4])
  %flat = core.reshape(%x) {shape=[B*S, 8]} : f32[B*S, 8]
  %logits = core.linear(%flat, %router, _) : f32[B*S, 4]
  %gates, %ids = core.topk(%logits) {axis=1, k=2} : f32[B*S, 2], i64[B*S, 2]
  %y = moe.experts(%flat, %ids, %gates, %up, %down, _, _) {act=gated(silu)} : f32[B*S, 8]
  %z = core.linear(%y, %shared, _) : f32[B*S, 8]
  %h = core.reshape(%z) {shape=[B, S, 8]} : f32[B, S, 8]
  %new = core.reshape(%z) {shape=[B, 1, S, 8]} : f32[B, 1, S, 8]
  %k2 = nn.cache_append(%k, %new) {axis=2} : state f32[B, 1, P + S, 8]
  return %h, %k2
}

func @main(%ids: i64[B, S], %k.{0..2}: state f32[B, 1, P, 8]) -> (f32[B, S, 16], 3 * state f32[B, 1, P + S, 8]) {
  const %embed : f32[16, 8] = cast(tensor("embed", bf16[16, 8]), to=f32)
  const %head : f32[16, 8] = cast(tensor("HEAD", bf16[16, 8]), to=f32)
  %x.0 = nn.embedding(%ids, %embed) : f32[B, S, 8]
  %x.{1..3}, %p.{0..2} = call @layer(%x.{0..2}, %k.{0..2}) {layer=0..2} : f32[B, S, 8], state f32[B, 1, P + S, 8]
  %logits = core.linear(%x.3, %head, _) : f32[B, S, 16]
  return %logits, %p.{0..2}
}
"""


def inspect(source, **options):
    """Return the figures of a module, or of a source by its path."""
    return reports.inspect_source(
        Opened(source, {}, {}) if isinstance(source, Module) else open_source(source), **options
    )


def tiny(head: str = "head") -> Costs:
    return module_costs(parse_module(TINY.replace("HEAD", head)))


def test_parameters_of_a_program():
    costs = tiny()
    kinds = {kind.function.name: kind for kind in costs.kinds}
    layer, main = kinds["layer"], kinds["main"]
    experts, router, shared, table = 4 * 3 * 8 * 4, 4 * 8, 8 * 8, 16 * 8
    assert layer.cost.parameters == 3 * (experts + router + shared)
    assert layer.cost.expert_parameters == 3 * experts
    assert layer.cost.active_parameters == 3 * (experts // 2 + router + shared)
    assert (main.cost.parameters, main.cost.active_parameters) == (2 * table, 2 * table)
    assert main.cost.table_parameters == table
    assert costs.total.active_without_tables == layer.cost.active_parameters + table
    assert [(c.function, dict(c.bindings)) for c in costs.layers] == [
        ("main", {}), ("layer", {"layer": "0"}), ("layer", {"layer": "1"}), ("layer", {"layer": "2"}),
    ]  # fmt: skip
    assert all(c.cost.parameters * 3 == layer.cost.parameters for c in costs.layers[1:])


def test_bytes_of_a_program():
    total = tiny().total
    experts, router, table = 4 * 3 * 8 * 4, 4 * 8, 16 * 8
    assert total.stored_bytes == 3 * (2 * experts + 4 * router + 64 + 4 * 4) + 2 * 2 * table
    assert total.compiled_bytes == 3 * 4 * (experts + router + 64) + 2 * 4 * table
    # one token: 2 of 4 experts, the rest of the layers, one row of the embedding, the whole head
    assert total.stored_bytes_read == 3 * (2 * experts // 2 + 4 * router + 64 + 16) + 2 * 8 + 2 * table
    assert total.compiled_bytes_read == 3 * 4 * (experts // 2 + router + 64) + 4 * 8 + 4 * table


def test_a_tied_tensor_counts_once_and_is_computed_with():
    free, tied = tiny().total, tiny("embed").total
    assert free.parameters - tied.parameters == 16 * 8
    assert tied.table_parameters == 0
    assert tied.active_without_tables == free.active_without_tables
    assert free.stored_bytes - tied.stored_bytes == 2 * 16 * 8
    assert free.compiled_bytes - tied.compiled_bytes == 4 * 16 * 8


def test_flops_and_states_are_formulas():
    costs = tiny()
    experts = 2 * (2 * 8 * 8 + 2 * 8 * 4) + 4 * 2 * 4  # two matrices and the activation, two experts
    topk = 4  # one for every score
    token = 3 * (2 * 8 * 4 + topk + experts + 2 * 8 * 8) + 2 * 8 * 16
    assert costs.at(costs.total.flops, 0) == costs.at(costs.total.flops, 60) == token
    assert evaluate(costs.total.flops, costs.dims(new=10)) == 10 * token
    assert str(costs.total.state_bytes) == "96*B*P"
    assert costs.state_growth(costs.total.state_bytes_kept, 50) == (96, 0)
    assert costs.at(costs.total.state_bytes, 0) == 0
    assert costs.at(costs.total.state_bytes_read, 10) == 960


def test_experts_behind_another_form_are_still_experts():
    text = TINY.replace(
        "  %flat = core.reshape(%x)",
        "  %turned = core.transpose(%down) {perm=[0, 2, 1]} : f32[4, 4, 8]\n"
        "  %back = core.transpose(%turned) {perm=[0, 2, 1]} : f32[4, 8, 4]\n  %flat = core.reshape(%x)",
    ).replace("%up, %down, _, _)", "%up, %back, _, _)")
    assert module_costs(parse_module(text)).total.active_parameters == tiny().total.active_parameters


def test_an_op_that_is_not_declared_is_an_error():
    module = parse_module(TINY)
    function = module.by_name["layer"]
    strange = Op("chip.strange", function.ops[0].operands, function.ops[0].results)
    broken = Module(module.stage, module.dims, tuple(
        type(f)(f.name, f.params, f.consts, (strange, *f.ops[1:]), f.results, f.weights) if f is function else f
        for f in module.functions
    ))  # fmt: skip
    with pytest.raises(MoecError, match=r"unknown op chip\.strange"):
        module_costs(broken)


def test_every_op_with_experts_says_what_it_reads():
    """An op that takes [E, ...] weights and K choices a token must declare `rows`, or all experts count as active."""
    from moec.targets import TARGETS

    assert TARGETS
    for op in OPS.values():
        shapes = {o.name: [str(d) for d in o.dims] for o in op.signature.operands}
        if any("K" in dims for dims in shapes.values()):
            routed = {name for name, dims in shapes.items() if dims[:1] == ["E"]}
            assert routed <= set(op.rows), f"{op.name} lacks rows for {sorted(routed - set(op.rows))}"


# --- published models, from config.json alone ----------------------------------------------------------------------


def within(value: float, published: float, share: float = 0.01) -> bool:
    return abs(value - published) <= share * published


def test_olmoe():
    report, c = inspect(CONFIGS / "OLMoE-1B-7B-0924"), config("OLMoE-1B-7B-0924")
    d, inner, layers, vocabulary = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["vocab_size"]
    other = layers * (4 * d * d + 64 * d + 4 * d) + d + vocabulary * d  # attention, router, 4 norms; norm, head
    experts = layers * 64 * 3 * d * inner
    check(report["parameters"], experts, other, vocabulary * d, 8 / 64)
    assert within(report["parameters"]["total"], 6.92e9)
    assert within(report["parameters"]["active"], 1.28e9)
    assert report["bytes"]["checkpoint"] == 2 * report["parameters"]["total"]
    each = layers * 2 * d
    assert report["state"] == {
        "bytes_per_token": each * 4, "bf16_bytes_per_token": each * 2, "fixed_bytes": 0, "bytes": 4096 * each * 4,
        "held_bytes_per_token": each * 4, "held_bytes": 4096 * each * 4,
    }  # fmt: skip
    matrices = 2 * (other + experts / 8)
    attention = layers * 16 * 4097 * (4 * 128 + 5)
    assert within(report["per_token"]["flops"], matrices + attention)
    assert [(k["function"], k["calls"]) for k in report["kinds"]] == [("layer", 16), ("main", 1)]
    assert len(report["layers"]) == 17
    json.dumps(report, allow_nan=False)


def test_qwen3_235b():
    report, c = inspect(CONFIGS / "Qwen3-235B-A22B", context=0), config("Qwen3-235B-A22B")
    d, inner, layers, vocabulary = c["hidden_size"], c["moe_intermediate_size"], c["num_hidden_layers"], c["vocab_size"]
    other = layers * (2 * d * 64 * 128 + 2 * d * 4 * 128 + 128 * d + 2 * d + 2 * 128) + d + vocabulary * d
    check(report["parameters"], layers * 128 * 3 * d * inner, other, vocabulary * d, 8 / 128)
    assert within(report["parameters"]["total"], 235e9)
    assert within(report["parameters"]["active"], 22e9)
    assert report["state"]["bytes_per_token"] == layers * 2 * 4 * 128 * 4


def test_deepseek_v3():
    report, c = inspect(CONFIGS / "DeepSeek-V3", context=0), config("DeepSeek-V3")
    d, layers, vocabulary, heads = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"], c["num_attention_heads"]
    attention = d * 1536 + 1536 + 1536 * heads * 192 + d * 576 + 512 + 512 * heads * 256 + heads * 128 * d
    expert = 3 * d * c["moe_intermediate_size"]
    dense = 3 * (3 * d * c["intermediate_size"])
    other = layers * (attention + 2 * d) + dense + (layers - 3) * (expert + 256 * d + 256) + d + vocabulary * d
    check(report["parameters"], (layers - 3) * 256 * expert, other, vocabulary * d, 8 / 256)
    assert within(report["parameters"]["total"], 671e9)
    # published: 37 B, in the checkpoint's README 36.6 B with the output head and without the embedding
    assert within(report["parameters"]["active_without_embeddings"], 36.6e9)
    assert report["bytes"]["checkpoint"] < 1.01 * report["parameters"]["total"]  # FP8 with its scales
    assert [k["layers"] for k in report["kinds"]] == [[0, 1, 2], list(range(3, 61)), []]


def test_deepseek_v3_decodes_in_its_latent():
    """MLA is counted as it is run: queries taken to the latent, not 4096 cached tokens to keys and values of 128 heads."""
    report = inspect(CONFIGS / "DeepSeek-V3", context=4096)
    norms = (
        61 * (2 * 7168 + 1536 + 512) + 7168 + 58 * 256
    )  # and the bias of the router: nothing is multiplied with them
    matrices = 2 * (report["parameters"]["active_without_embeddings"] - norms)
    attention = 61 * 128 * 4097 * (2 * (512 + 64) + 2 * 512 + 5)  # scores and sums over the latent, a softmax
    assert within(report["per_token"]["flops"], matrices + attention, 0.003)
    assert within(report["per_token"]["flops"], 143e9)
    assert report["state"]["bf16_bytes_per_token"] == 61 * (512 + 64) * 2
    assert report["per_token"]["state_bytes_read"] == 4096 * 61 * (512 + 64) * 4


def test_layers_with_a_window_need_no_more_than_it(tmp_path):
    """gpt-oss-20b: 12 of 24 layers see 128 tokens; 8 heads of 64 numbers for keys and as many for values."""
    sizes = {"num_hidden_layers": 24, "num_local_experts": 32, "sliding_window": 128}
    transformers.GptOssConfig(**sizes).save_pretrained(tmp_path)
    report = inspect(tmp_path, context=4096)
    token = 2 * 8 * 64
    assert report["state"] == {
        "bytes_per_token": 12 * token * 4, "bf16_bytes_per_token": 12 * token * 2, "fixed_bytes": 12 * 127 * token * 4,
        "bytes": 12 * (4096 + 127) * token * 4,
        "held_bytes_per_token": 24 * token * 4, "held_bytes": 24 * 4096 * token * 4,
    }  # fmt: skip
    assert report["per_token"]["state_bytes_read"] == 12 * (4096 + 127) * token * 4
    windowed, whole = (k["state"] for k in report["kinds"] if k["function"] != "main")
    assert (windowed["bytes_per_token"], windowed["bytes"]) == (0, 12 * 127 * token * 4)
    assert (whole["bytes_per_token"], whole["fixed_bytes"]) == (12 * token * 4, 0)
    short = inspect(tmp_path, context=100)["state"]  # inside of the window every layer grows
    assert (short["bytes"], short["held_bytes"]) == (24 * 100 * token * 4,) * 2
    artifact = opt(load(tmp_path).module, print_pipeline(TARGETS["cpu"].pipeline))
    costs = module_costs(artifact)  # lowered for ONNX Runtime
    assert costs.at(costs.total.state_bytes_kept, 4096) == 12 * (4096 + 127) * token * 4


def test_nvfp4_experts_have_twice_as_many_scales(tmp_path):
    """DeepSeek-V4-Flash as ModelOpt stores it: a byte for 16 codes, and one f32 for each of three matrices."""
    stored = config("DeepSeek-V4-Flash")
    plain = inspect(CONFIGS / "DeepSeek-V4-Flash")
    stored["quantization_config"] |= {
        "moe_quant_algo": "NVFP4", "group_size": 16,
        "quantized_layers": {f"layers.{n}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for n in range(43)},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(stored))
    report = inspect(tmp_path)
    matrices = 43 * 256 * 3
    numbers = matrices * 4096 * 2048
    assert report["bytes"]["checkpoint"] == plain["bytes"]["checkpoint"] + numbers // 16 - numbers // 32 + 4 * matrices
    assert report["left_out"]["bytes"] == plain["left_out"]["bytes"]  # multi-token prediction stays as it was released
    assert within(report["bytes"]["checkpoint"] + report["left_out"]["bytes"], 168.27e9, 1e-4)
    assert report["parameters"] == plain["parameters"]
    assert plain["state"]["bytes_per_token"] == 4 * (21 * 160 + 20 * 4)  # entries of 4 and 128 tokens; no windows
    assert plain["kinds"][0]["layers"] == [0, 1] and plain["kinds"][0]["state"]["bytes_per_token"] == 0
    assert plain["kinds"][0]["state"]["fixed_bytes"] == 2 * 127 * 512 * 4


def config(name: str) -> dict:
    return json.loads((CONFIGS / name / "config.json").read_text("utf-8"))


def check(parameters: dict[str, int], experts: int, other: int, table: int, share: float) -> None:
    """Compare counts with closed formulas, exactly."""
    assert parameters == {
        "total": experts + other + table,
        "experts": experts,
        "embeddings": table,
        "active": int(experts * share) + other + table,
        "active_without_embeddings": int(experts * share) + other,
    }


# --- figures as text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count_text(512), "512"), (count_text(6_919_161_856), "6.919 B"), (bytes_text(27_676_647_680), "27.68 GB"),
        (bytes_text(999), "999 B"), (bytes_text(1000), "1 kB"), (flops_text(2_359_214_055), "2.359 GFLOP"),
        (count_text(1_572_997_000_000), "1.573 T"), (ranges_text([0, 1, 2, 5]), "0..2, 5"), (ranges_text([]), ""),
    ],
)  # fmt: skip
def test_text(text, expected):
    assert text == expected


def test_a_context_that_the_program_does_not_have():
    with pytest.raises(MoecError, match=r"outside the program's 0\.\.64"):
        inspect(parse_module(TINY), context=65)


def test_a_step_of_several_sequences_reads_the_experts_that_any_of_them_chose():
    """Weights of all experts but those that no token chooses, against random choices; states once a sequence."""
    import numpy as np

    costs = module_costs(parse_module(TINY))
    one, each = costs.step_bytes(1, 10)
    assert (one, each) == (costs.total.compiled_bytes_read, costs.at(costs.total.state_bytes_read, 10))
    generator = np.random.default_rng(0)
    drawn = [len({e for _ in range(3) for e in generator.permutation(4)[:2]}) for _ in range(4000)]
    expert = 3 * 4 * (8 * 8 + 8 * 4)  # in three layers, of float32
    weights, states = costs.step_bytes(3, 10)
    rows = 16 * (1 - (15 / 16) ** 3) * 8 * 4  # of the embedding
    assert states == 3 * each
    assert weights == pytest.approx(one + (np.mean(drawn) - 2) * expert + rows - 8 * 4, rel=0.01)
