"""Latent attention on the cached latent: which families get it, what it costs, and what its weights are stored in."""

from __future__ import annotations

import checkpoint_formats as formats
import moec
import onnx
import pytest
import torch
from moec.compiler.cost.count import op_flops
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.ir.dims import evaluate
from moec.compiler.ir.pipelines import parse_pipeline, print_pipeline
from moec.compiler.rewrite.pipeline import run_pipeline
from moec.compiler.rewrite.roles import weight_roles
from moec.compiler.weights.steps.quantized import method_of
from moec.passes import PASSES
from moec.targets import TARGETS
from moec.targets.target import FUSED
from places import CONFIGS
from quantized_checkpoints import CT4, checkpoint, quantized
from tiny_models import padded_batch, random_model, save

LATENT = [name for name, family in FAMILIES.items() if family.state.startswith("latent kv")]
ALWAYS = ("deepseek_v3", "kimi_linear")
# groups of 32 divide the rows of every weight
WIDE = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
INTO_MOE = print_pipeline(FUSED)


def of_stage_moe(source, pipeline=INTO_MOE):
    """Return the module of a checkpoint folder as the passes leave it for the lowering."""
    return run_pipeline(load(source).module, parse_pipeline(pipeline), table=PASSES).module


def attentions(module):
    return [(f, op) for f in module.functions for op in f.ops if op.name == "nn.attention"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.long, id=n) for n in LATENT])
def test_every_family_with_a_latent_cache_attends_to_it(name, tmp_path):
    FAMILIES[name].config().save_pretrained(tmp_path)
    module = of_stage_moe(tmp_path)
    found = attentions(module)
    assert found
    for function, op in found:
        _, keys, values = op.inputs[:3]
        assert values.type.state and values.type.shape[1] == keys.type.shape[1] == 1
        # nothing multiplies all the cached tokens by a weight
        assert not [o for o in function.ops if o.name == "core.linear" and o.inputs[0].type.state]


# --- what it costs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepseek_v3():
    """Return DeepSeek-V3 from its config.json with keys and values made of the latent, and with the latent itself."""
    folder = CONFIGS / "DeepSeek-V3"
    expanded = of_stage_moe(folder, INTO_MOE.replace("absorb-mla,", ""))
    return expanded, run_pipeline(expanded, parse_pipeline("absorb-mla,cleanup"), table=PASSES).module


def attention_flops(module, new, past):
    """Return the FLOPs of a layer's attention behind its caches, with what keys, values and queries go through there."""
    function = module.by_name["layer_1"]
    ops = [op for op in function.ops if op.name in ("nn.attention", "nn.block_linear")]
    ops += [op for op in function.ops if op.name == "core.linear" and op.inputs[0].type.state]
    return sum(evaluate(op_flops(op), {"B": 1, "S": new, "P": past}) for op in ops)


def test_a_cached_token_costs_what_the_formula_says(deepseek_v3):
    heads, latent, rope, nope, value = 128, 512, 64, 128, 128
    softmax = 5 * heads
    expanded, absorbed = (attention_flops(m, 1, 5000) - attention_flops(m, 1, 4999) for m in deepseek_v3)
    assert expanded == 2 * heads * latent * (nope + value) + 2 * heads * (nope + rope + value) + softmax
    assert absorbed == 2 * heads * (2 * latent + rope) + softmax
    assert expanded > 119 * absorbed
    # the up-projections are paid for once a new token
    projections = 2 * heads * latent * (nope + value)
    assert attention_flops(deepseek_v3[1], 1, 0) == projections + absorbed


@pytest.mark.parametrize(
    ("new", "past", "cheaper"), [(1, 1, True), (160, 4096, True), (180, 4096, False), (512, 0, False)]
)
def test_steps_of_up_to_170_tokens_are_cheaper(deepseek_v3, new, past, cheaper):
    """R (N + V) products less for each past token, 2 R - N - V more for each pair: 170 = 512 * 256 / (1024 - 256)."""
    expanded, absorbed = (attention_flops(m, new, past) for m in deepseek_v3)
    assert (absorbed < expanded) == cheaper
    assert absorbed - expanded == 2 * 128 * ((2 * 512 - 256) * new * (past + new) - 512 * 256 * past)


# --- what its weights are stored in --------------------------------------------------------------------------------


def test_absorbed_weights_are_attention_weights(tmp_path):
    FAMILIES["deepseek_v3"].config().save_pretrained(tmp_path)
    module = of_stage_moe(tmp_path)
    roles = weight_roles(module)
    for function, _ in attentions(module):
        named = {function.ops[i].operands[k].name: role for (i, k), role in roles[function.name].items()}
        assert {named[n] for n in ("w_uk", "w_uv", "self_attn_o_proj", "self_attn_q_b_proj")} == {"attention"}


def test_quantized_weights_of_heads_lie_in_the_file_once(tmp_path):
    model = random_model(FAMILIES["deepseek_v3"], **WIDE)
    folder = save(model, tmp_path / "checkpoint")
    whole = moec.compile(folder, out=tmp_path / "f32")
    stored = moec.compile(folder, out=tmp_path / "int8", quantize="int8,group=32")
    graph = onnx.load(tmp_path / "int8" / "model.onnx", load_external_data=False).graph
    places = [
        {e.key: e.value for e in tensor.external_data}
        for tensor in graph.initializer
        if "layer.0/w_uk.codes" in tensor.name
    ]
    spans = sorted((int(p["offset"]), int(p["length"])) for p in places)
    assert [length for _, length in spans] == [64 * 32] * 4  # for each of four heads its [64, 32] codes of a byte
    assert [start - spans[0][0] for start, _ in spans] == [i * 64 * 32 for i in range(4)]
    assert stored.manifest["precision"]["layer_0"] == ["f32", "int8_g32"]
    ids, mask, positions = padded_batch(128, 9)
    first, second = (
        torch.from_numpy(a.session(spinning=False).step(ids.numpy(), mask.numpy(), positions.numpy())[0])[mask.bool()]
        for a in (whole, stored)
    )
    assert 0 < (first - second).abs().median() < 0.02 * first.abs().max()


def test_keep_holds_the_codes_of_w_uv_and_says_that_those_of_w_uk_are_near(tmp_path):
    """W_UK is read along the heads' numbers, and the checkpoint's scales are shared along the latent's."""
    folder, _ = checkpoint(tmp_path, "deepseek_v3", CT4, quantized(formats.ct_packed), **WIDE)
    artifact = moec.compile(folder, out=tmp_path / "artifact", quantize="keep")
    assert artifact.manifest["figures"]["kept"]["layer_0"] == {"exact": ["int4_g32"], "near": ["int8_g32"]}
    passes = parse_pipeline(f"{INTO_MOE},keep-codes")
    run = run_pipeline(load(folder).module, passes, table=PASSES, target=TARGETS["cpu"])
    stored = {c.value.name: c.value.type.dtype for c in run.module.by_name["layer_0"].consts}
    assert (stored["w_uk"], stored["w_uv"]) == ("int8_g32", "int4_g32")
    assert any("%w_uk: " in note.reason and "near and not the same" in note.reason for note in run.notes), run.notes


def test_weights_of_heads_are_rounded_to_nearest_whatever_the_method(tmp_path):
    FAMILIES["deepseek_v3"].config(**WIDE).save_pretrained(tmp_path)
    passes = parse_pipeline(f"{INTO_MOE},quantize{{method=gptq,group=32}}")
    run = run_pipeline(load(tmp_path).module, passes, table=PASSES, target=TARGETS["cpu"])
    methods = {
        c.value.name: method_of(c.recipe) for c in run.module.by_name["layer_0"].consts if "_g32" in c.value.type.dtype
    }
    assert {n for n, method in methods.items() if method == "rtn"} == {"w_uk", "w_uv"}
    assert len(methods) > 2
    for name in ("w_uk", "w_uv"):
        assert any(f"%{name}: its blocks have inputs of their own" in note.reason for note in run.notes), run.notes
