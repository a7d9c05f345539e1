"""Calibration: its numbers are transformers' own, for logits, for the inputs of weights and for what experts see."""

import moec
import pytest
import torch
from moec.compiler.check.tiled import TiledInterpreter
from moec.compiler.driver import opt
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.ir.module import walk_calls
from moec.compiler.ir.pipelines import print_pipeline
from moec.compiler.ir.recipes import bind_recipe
from moec.compiler.quantize.calibrate import CalibrationText, _Recorder, collect_inputs, main_inputs, windows_of
from moec.compiler.text.parser import parse_module
from moec.compiler.weights.calibrated import Calibrated
from moec.compiler.weights.sources.source import ModuleSource
from moec.compiler.weights.steps.quantized import weight_of
from moec.passes import PASSES
from moec.targets import open_target
from moec.targets.target import FUSED
from tiny_models import random_model, save

TO_MOE = print_pipeline(FUSED)
EVERY = 1 << 40  # rows: more than there are
IDS = torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def family(request, tmp_path_factory):
    """Return (transformers model, loaded source, its module at stage moe)."""
    model = random_model(FAMILIES[request.param])
    loaded = load(save(model, tmp_path_factory.mktemp(request.param)))
    return model, loaded, opt(loaded.module, TO_MOE)


def test_the_interpreter_gives_the_models_logits(family):
    model, loaded, module = family
    runner = TiledInterpreter(module, loaded.weights, tuple(IDS.shape))
    found = runner.run(module.main, main_inputs(module, IDS), {})[0]
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def quantized(module, **options):
    policy = {"attention": "uint4_g16", "experts": "uint4_g16", "embedding": "f32", **options}
    inside = ", ".join(f"{name}={value}" for name, value in policy.items())
    return opt(module, f"quantize{{method=gptq, shared=f32, dense=f32, {inside}}}")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    model = random_model(FAMILIES["qwen3_moe"])
    loaded = load(save(model, tmp_path_factory.mktemp("calibrated")))
    return model, loaded, quantized(opt(loaded.module, TO_MOE))


def find(calibration, *words):
    (key,) = [k for k in calibration.inputs if all(word in k for word in words)]
    return calibration.inputs[key]


def test_inputs_are_those_of_hooks(qwen):
    model, loaded, module = qwen
    seen = {}

    def hook(name):
        return lambda _, given: seen.__setitem__(name, given[0].detach().flatten(0, -2))

    layer = model.model.layers[1]
    hooks = [
        layer.self_attn.q_proj.register_forward_pre_hook(hook("q")),
        layer.self_attn.o_proj.register_forward_pre_hook(hook("o")),
        layer.mlp.register_forward_pre_hook(hook("mlp")),
        model.lm_head.register_forward_pre_hook(hook("head")),
    ]
    with torch.no_grad():
        model(input_ids=IDS)
    for h in hooks:
        h.remove()
    calibration = collect_inputs(module, loaded.weights, IDS)
    assert calibration.tokens == IDS.numel()
    weights = {
        "q": "1.layer:qkv_proj",
        "o": "1.layer:self_attn_o_proj",
        "mlp": "1.layer:experts_gate",
        "head": "main:lm_head",
    }
    for name, word in weights.items():
        rows = find(calibration, word).sample(None, EVERY)
        assert torch.allclose(rows, seen[name], rtol=1e-2, atol=1e-3), name
    experts = find(calibration, "layers.1.", "down_proj")
    up = layer.mlp.experts.gate_up_proj[3]
    with torch.no_grad():
        chosen = find(calibration, "layers.1.", "gate_up_proj").chosen[3]
        if chosen is not None:
            gate, linear = (seen["mlp"][chosen] @ up.T).chunk(2, dim=-1)
            assert torch.allclose(
                experts.sample(3, EVERY), torch.nn.functional.silu(gate) * linear, rtol=2e-2, atol=2e-3
            )


def test_coverage_counts_the_routers_choices(qwen):
    model, loaded, module = qwen
    with torch.no_grad():
        logits = model(input_ids=IDS, output_router_logits=True).router_logits
    calibration = collect_inputs(module, loaded.weights, IDS)
    wanted = [torch.bincount(layer.topk(2, dim=-1).indices.flatten(), minlength=8).tolist() for layer in logits]
    assert [list(layer.tokens) for layer in calibration.coverage] == wanted
    figures = calibration.to_dict()
    assert figures["experts"] == 24 and figures["tokens"] == 120
    assert figures["starved"] == sum(n < 32 for layer in wanted for n in layer)
    assert figures["least"] == min(map(min, wanted)) and figures["mean"] == 30.0


@pytest.mark.parametrize("starved", ["rtn", "force"])
def test_experts_that_saw_too_few_are_quantized_all_the_same(qwen, starved):
    _, loaded, _ = qwen
    module = quantized(opt(loaded.module, TO_MOE), starved=starved)
    few = IDS[:1]
    calibration = collect_inputs(module, loaded.weights, few)
    up = find(calibration, "layers.0.", "gate_up_proj")
    counts = calibration.coverage[0].tokens
    assert min(counts) < 32
    for count, chosen in zip(counts, up.chosen, strict=True):
        if count < 32:
            assert chosen is None if starved == "rtn" else len(chosen) == 40
    if starved == "force":
        down = find(calibration, "layers.0.", "down_proj")
        assert [len(c) for c in down.chosen] == [40 if count < 32 else count for count in counts]
    source = Calibrated(loaded.weights, calibration.inputs)
    runner = TiledInterpreter(module, source, tuple(few.shape), numbers=lambda recipe: recipe)
    assert torch.isfinite(runner.run(module.main, main_inputs(module, few), {})[0]).all()


@pytest.mark.parametrize("target", ["cpu", "nvidia-h100"])
def test_a_weight_keeps_its_name_through_the_lowering(qwen, target):
    """Whatever a target makes of a weight, in the order of its rows and in its parts."""
    _, loaded, module = qwen
    calibration = collect_inputs(module, loaded.weights, IDS)
    lowered = open_target(target, {}).lower(module, None).module
    names = {
        weight_of(bind_recipe(c.recipe, f.weights, bound)) for f, bound in walk_calls(lowered) for c in f.consts
    } - {""}  # fmt: skip
    assert names == set(calibration.inputs)
    assert len(names) == 3 * 4 + 1  # q, k and v in one, o, up, down; the head
    assert "model.layers.2.layer:experts_down_proj.uint4_g16" in names


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_lost_input_is_an_error(method, tmp_path, monkeypatch):
    """One weight whose inputs the calibration loses: never quantized all the same, and nothing is written."""
    seen = _Recorder.observe_inputs

    def forgetful(self, weight, rows, chosen=None):
        if "layers.1" not in weight_of(weight) or "down" not in weight_of(weight):
            seen(self, weight, rows, chosen)

    monkeypatch.setattr(_Recorder, "observe_inputs", forgetful)
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a model of eight experts. " * 60)
    with pytest.raises(MoecError, match=r"saw nothing that the weight model\.layers\.1\.layer:experts_down") as caught:
        moec.compile("examples/tiny-moe", out=tmp_path / "x", quantize=f"int4,method={method}", calibration=text)
    assert caught.value.exit_code == 2 and "down_proj" in caught.value.model
    assert not (tmp_path / "x").exists()


GROUPED = """moec 1 stage moe
dim B in 1..8
dim S in 1..64

func @main(%input_ids: i64[B, S]) -> (f32[2*B*S, 8]) {
  const %table : f32[128, 32] = tensor("table", f32[128, 32])
  const %router : f32[4, 32] = tensor("router", f32[4, 32])
  const %w : f32[4, 8, 32] = tensor("w", f32[4, 8, 32])
  %e = nn.embedding(%input_ids, %table) : f32[B, S, 32]
  %x = core.reshape(%e) {shape=[B*S, 32]} : f32[B*S, 32]
  %scores = core.linear(%x, %router, _) : f32[B*S, 4]
  %best, %ids = core.topk(%scores) {axis=1, k=2} : f32[B*S, 2], i64[B*S, 2]
  %rows, %offsets, %perm = moe.dispatch(%x, %ids) {experts=4} : f32[2*B*S, 32], i64[5], i64[2*B*S]
  %logits = moe.grouped_linear(%rows, %w, %offsets, _) : f32[2*B*S, 8]
  return %logits
}
"""


def test_experts_that_were_not_fused_are_calibrated_too():
    """A linear for each expert's rows: what each expert is given, worked out from the scores."""
    module = PASSES["quantize"](parse_module(GROUPED), method="gptq", experts="uint4_g16", embedding="f32", head="f32")
    generator = torch.Generator().manual_seed(2)
    state = {
        n: torch.randn(s, generator=generator)
        for n, s in (("table", (128, 32)), ("router", (4, 32)), ("w", (4, 8, 32)))
    }
    source = ModuleSource(state)
    calibration = collect_inputs(module, source, IDS)
    (found,) = calibration.inputs.values()
    x = state["table"][IDS.flatten()]
    chosen = (x @ state["router"].T).topk(2).indices
    for e in range(4):
        wanted = x[(chosen == e).any(1)]
        assert torch.allclose(found.sample(e, EVERY), wanted.bfloat16().float())
    runner = TiledInterpreter(module, Calibrated(source, calibration.inputs), tuple(IDS.shape), numbers=lambda r: r)
    assert torch.isfinite(runner.run(module.main, main_inputs(module, IDS), {})[0]).all()


def test_too_short_a_text(qwen):
    _, _, module = qwen
    with pytest.raises(MoecError, match="has 9 tokens, one batch has 512"):
        windows_of(CalibrationText((1,) * 9, "text", ""), module)
    with pytest.raises(MoecError, match="has 0 tokens"):
        windows_of(CalibrationText((), "text", ""), module)
    assert windows_of(CalibrationText((1,) * 1100, "text", ""), module).shape == (2, 512)


def test_compile_without_a_text_says_so(qwen, tmp_path):
    _, loaded, _ = qwen
    with pytest.raises(MoecError, match="there is no calibration text"):
        moec.compile(loaded.folder, out=tmp_path / "x", quantize="int4,method=gptq,group=16")
    assert not (tmp_path / "x").exists()
