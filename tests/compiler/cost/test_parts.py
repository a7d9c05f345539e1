"""Parts of a model: which modules of the source are experts, attention, recurrent layers and the head, read off the ops."""

import pytest
from moec.compiler.cost.parts import model_parts
from moec.compiler.frontends.load import load
from moec.compiler.rewrite.pipeline import run_pipeline
from moec.passes import PASSES
from moec.targets.target import FUSED
from places import CONFIGS


@pytest.mark.parametrize(
    "config, wanted",
    [
        ("OLMoE-1B-7B-0924", {
            "mlp.gate": "experts", "mlp.experts": "experts", "self_attn.q_proj": "attention", "self_attn": "attention",
            "lm_head": "head", "model.embed_tokens": "rest", "input_layernorm": "rest", "mlp_norm": "rest",
        }),
        ("Qwen3-Next-80B-A3B-Thinking", {
            "mlp.shared_expert.up_proj": "experts", "mlp.gate": "experts", "linear_attn.in_proj_qkvz": "recurrent",
            "self_attn.q_proj": "attention", "lm_head": "head",
        }),
        ("gpt-oss-20b", {"mlp.router": "experts", "self_attn.o_proj": "attention", "lm_head": "head"}),
    ],
)  # fmt: skip
def test_modules_of_a_published_model(config, wanted):
    module = run_pipeline(load(CONFIGS / config).module, FUSED, table=PASSES).module
    parts = model_parts(module)
    assert {name: parts.part_of([name]) for name in wanted} == wanted
    assert parts.part_of([]) == "rest"
