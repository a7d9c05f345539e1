"""Keys and tensors of GGUF files that change what a model computes: honoured as transformers does, or refused by name."""

import json
import math

import gguf_files
import moec
import numpy as np
import pytest
import torch
from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType
from gguf_models import ARCHITECTURES, gguf_tensors, metadata
from moec.compiler.artifact.generation_files import find_end_tokens
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.gguf.config import gguf_config
from moec.compiler.weights.sources.gguf import open_gguf
from moec_command import invoke
from quantized_checkpoints import EXACT, difference
from tiny_models import random_model, save
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return, by family: the folder of a tiny checkpoint, and the metadata and tensors of the same as GGUF."""
    found = {}
    for family in ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe"):
        with torch.no_grad():
            model = random_model(FAMILIES[family], num_hidden_layers=2)
            tensors = gguf_tensors(model, family, lambda name: "f32")
        plain = save(model, tmp_path_factory.mktemp(family))
        found[family] = plain, metadata(model.config, ARCHITECTURES[family]), tensors
    return found


def variant(folder, models, family, keys=(), tensors=(), config=None):
    """Write a model's GGUF with other keys under its architecture and other tensors (None: without it)."""
    _, about, all_tensors = models[family]
    prefix = about["general.architecture"]
    given = {k if k.startswith(("general.", "tokenizer.")) else f"{prefix}.{k}": v for k, v in dict(keys).items()}
    about = {k: v for k, v in (about | given).items() if v is not None}
    kept = {k: v for k, v in (all_tensors | dict(tensors)).items() if v is not None}
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return gguf_files.write(folder / "m.gguf", about, kept)


def source_config(models, family, **changes):
    """Return the config.json of a checkpoint as a dict."""
    return json.loads((models[family][0] / "config.json").read_text()) | changes


def config_of(file):
    opened = open_gguf(file)
    with opened.checkpoint:
        return gguf_config(opened, file)


def with_config(models, family, folder, **changes):
    """Return a copy of a checkpoint folder with another config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(source_config(models, family, **changes)))
    (folder / "model.safetensors").symlink_to(models[family][0] / "model.safetensors")
    return folder


def factors(*numbers):
    """Return a tensor `rope_freqs.weight`."""
    return {"rope_freqs.weight": ("f32", (len(numbers),), np.array(numbers, "<f4").tobytes())}


def llama3(theta, size, factor, low, high, length):
    """Return what llama.cpp's converter writes for llama3 scaling (LlamaModel.generate_extra_tensors)."""
    found = []
    for frequency in (theta ** -(2 * i / size) for i in range(size // 2)):
        wave = 2 * math.pi / frequency
        if wave < length / high:
            found.append(1.0)
        elif wave > length / low:
            found.append(factor)
        else:
            smooth = (length / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
SCALED = {
    "yarn": (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn of another sharpness": (
        YARN | {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.attn_factor": 0.5},
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0,
            "beta_slow": 2.0, "attention_factor": 0.5 * (0.1 * math.log(4) + 1),
        },
    ),
    "yarn from the context's length": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128},
    ),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "a factor without a type is linear": ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "the key of old files": ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "no scaling": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_scaled_positions_are_as_in_transformers(name, models, tmp_path):
    keys, rope = SCALED[name]
    found = config_of(variant(tmp_path / "g", models, "mixtral", {"context_length": 128, **keys}))
    wanted = FAMILIES["mixtral"].config(
        max_position_embeddings=128, rope_parameters=rope | {"rope_theta": 1e6}, head_dim=16
    )
    assert found.rope_parameters["rope_type"] == rope["rope_type"]
    if rope["rope_type"] == "default":
        return
    compute = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    (made, scale), (expected, wanted_scale) = compute(found, "cpu"), compute(wanted, "cpu")
    torch.testing.assert_close(made, expected)
    assert scale == pytest.approx(wanted_scale)


@pytest.mark.parametrize("name", ["yarn of another sharpness", "the key of old files"])
def test_a_scaled_model_computes_what_transformers_does(name, models, tmp_path):
    keys, rope = SCALED[name]
    file = variant(tmp_path / "g", models, "qwen3_moe", keys)
    theta = source_config(models, "qwen3_moe")["rope_parameters"]["rope_theta"]
    plain = with_config(models, "qwen3_moe", tmp_path / "p", rope_parameters=rope | {"rope_theta": theta})
    artifact = moec.compile(file, out=tmp_path / "a", accuracy="exact")
    assert difference(artifact, plain) <= EXACT < difference(artifact, models["qwen3_moe"][0])


# factor, low_freq_factor, high_freq_factor, original length: with several, one and no frequency between the two
LLAMA3 = [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 200), (4.0, 1.0, 1.05, 100), (8.0, 0.5, 40.0, 3000)]


@pytest.mark.parametrize("told", LLAMA3)
def test_rope_freqs_of_llama3_scaling(told, models, tmp_path):
    factor, low, high, length = told
    rope = {
        "rope_type": "llama3", "rope_theta": 1e6, "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }  # fmt: skip
    stored = factors(*llama3(1e6, 16, *told))
    found = config_of(variant(tmp_path / "g", models, "mixtral", tensors=stored))
    wanted = FAMILIES["mixtral"].config(rope_parameters=rope, head_dim=16)
    compute = ROPE_INIT_FUNCTIONS["llama3"]
    torch.testing.assert_close(compute(found, "cpu")[0], compute(wanted, "cpu")[0], rtol=1e-5, atol=0)
    # the same beside a config.json that says so, and not beside one that does not
    agreeing = source_config(models, "mixtral", rope_parameters=rope)
    assert config_of(variant(tmp_path / "b", models, "mixtral", tensors=stored, config=agreeing))
    with pytest.raises(MoecError, match=r"rope_freqs\.weight and the rope_parameters of config"):
        config_of(variant(tmp_path / "c", models, "mixtral", tensors=stored, config=source_config(models, "mixtral")))


def test_a_model_with_rope_freqs_computes_what_transformers_does(models, tmp_path):
    told = (8.0, 1.0, 4.0, 64)
    rope = dict(
        zip(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), told, strict=True)
    )
    plain = with_config(
        models, "mixtral", tmp_path / "p", rope_parameters={"rope_type": "llama3", "rope_theta": 1e6, **rope}
    )
    file = variant(tmp_path / "g", models, "mixtral", tensors=factors(*llama3(1e6, 16, *told)))
    artifact = moec.compile(file, out=tmp_path / "a", accuracy="exact")
    assert difference(artifact, plain) <= EXACT < difference(artifact, models["mixtral"][0])


def test_rope_freqs_of_ones_and_of_one_number(models, tmp_path):
    ones = config_of(variant(tmp_path / "a", models, "qwen3_moe", tensors=factors(*[1.0] * 8)))
    assert ones.rope_parameters["rope_type"] == "default"
    equal = config_of(variant(tmp_path / "b", models, "mixtral", tensors=factors(*[8.0] * 8)))
    assert equal.rope_parameters | {"rope_theta": 0} == {"rope_type": "linear", "factor": 8.0, "rope_theta": 0}


FACTORS = {
    "holds no frequencies of llama3 scaling": [1.0, 3.0, 2.0, 4.0, 1.0, 1.0, 1.0, 8.0],
    r"has the shape \[4\]; heads of 16 channels have 8 pairs": [8.0] * 4,
    "has numbers that are not finite and above 0": [1.0] * 7 + [0.0],
}


@pytest.mark.parametrize("message", FACTORS)
def test_rope_freqs_that_mean_nothing_are_named(message, models, tmp_path):
    with pytest.raises(MoecError, match=f"rope_freqs.weight {message}"):
        config_of(variant(tmp_path / "g", models, "mixtral", tensors=factors(*FACTORS[message])))


def test_rope_freqs_beside_yarn_are_refused(models, tmp_path):
    with pytest.raises(MoecError, match=r"rope_freqs.weight stands beside rope.scaling.type 'yarn'"):
        config_of(variant(tmp_path / "g", models, "mixtral", YARN, factors(*llama3(1e6, 16, 8.0, 1.0, 4.0, 64))))


@pytest.mark.parametrize(("family", "normed"), [("qwen3_moe", False), ("olmoe", True), ("qwen2_moe", True)])
def test_expert_weights_norm_is_honoured(family, normed, models, tmp_path):
    assert source_config(models, family)["norm_topk_prob"] is not normed
    file = variant(tmp_path / "g", models, family, {"expert_weights_norm": normed})
    plain = with_config(models, family, tmp_path / "p", norm_topk_prob=normed)
    artifact = moec.compile(file, out=tmp_path / "a", accuracy="exact")
    assert difference(artifact, plain) <= EXACT < difference(artifact, models[family][0])


# a value that a key must not have -> what is said of it
REFUSED = {
    "expert_weights_scale": (2.5, "is 2.5, which models of this architecture do not compute"),
    "expert_gating_func": (2, "is 2, which"),
    "expert_group_count": (4, "is 4, which"),
    "leading_dense_block_count": (1, "is 1, which"),
    "attn_logit_softcapping": (30.0, "is 30.0, which"),
    "final_logit_softcapping": (15.0, "is 15.0, which"),
    "router_logit_softcapping": (15.0, "is 15.0, which"),
    "logit_scale": (0.25, "is 0.25, which"),
    "attention.scale": (0.1, "is .*, which"),
    "attention.causal": (False, "is False, which"),
    "attention.clamp_kqv": (8.0, "is 8.0, which"),
    "attention.sliding_window": (64, "is 64, which"),
    "attention.value_length": (8, "is 8, and heads have 16 channels"),
    "rope.dimension_count": (8, "is 8, and heads have 16 channels"),
    "rope.dimension_sections": ([2, 3, 3, 0], "is not understood"),
    "rope.scaling.type": ("longrope", "is 'longrope', which is not supported"),
    "rope.scaling.attn_factor": (1.19, "is .*: that is supported with yarn only"),
    "expert_shared_count": (1, "is 1: these models have 0 shared experts"),
    "expert_shared_feed_forward_length": (32, "is 32: these models have no shared experts"),
    "attention.temperature_scale": (0.1, "is not understood, and may change"),
    "swiglu_clamp_exp": ([1.0, 1.0], "is not understood, and may change"),
    "expert_used_count": (0, "is 0"),
    "expert_count": (9, r"is 9, but blk.0.ffn_gate_inp.weight has the shape \[8, 64\]"),
    "expert_feed_forward_length": (48, "is 48, but blk.0.ffn_up_exps.weight has the shape"),
    "embedding_length": (2147483647, "is 2147483647, but token_embd.weight has the shape"),
    "vocab_size": (100, "is 100, but token_embd.weight has the shape"),
    "attention.key_length": (2147483646, "|attention.head_count is 4 times 2147483646 channels of a head"),
    "attention.head_count": (0, "is 0; it has to be 1 or more"),
    "attention.head_count_kv": (0, "is 0; it has to be 1 or more"),
    "context_length": (0, "is 0; it has to be 1 or more"),
    "block_count": (0, "is 0; it has to be 1 or more"),
    "rope.freq_base": (0.0, "is 0.0; it has to be a finite number above 0"),
    "attention.layer_norm_rms_epsilon": (math.nan, "is nan; it has to be a finite number above 0"),
    "rope.scaling.factor": (math.inf, "is inf; it has to be"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_value_that_cannot_be_followed_is_refused_by_its_key(key, models, tmp_path):
    value, message = REFUSED[key]
    other = message.startswith("|")
    with pytest.raises(MoecError, match=message[1:] if other else rf"qwen3moe\.{key} {message}") as caught:
        config_of(variant(tmp_path / "g", models, "qwen3_moe", {key: value}))
    assert caught.value.exit_code == 2 and caught.value.todo


NEEDED = (
    "block_count", "context_length", "embedding_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon", "expert_count", "expert_used_count",
)  # fmt: skip


@pytest.mark.parametrize("key", NEEDED)
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_a_key_that_is_missing_is_named(family, key, models, tmp_path):
    with pytest.raises(MoecError, match=rf"the metadata has no {ARCHITECTURES[family]}\.{key}"):
        config_of(variant(tmp_path / "g", models, family, {key: None}))


def test_mixtral_always_scales_to_a_sum_of_one(models, tmp_path):
    with pytest.raises(MoecError, match=r"llama\.expert_weights_norm is false"):
        config_of(variant(tmp_path / "g", models, "mixtral", {"expert_weights_norm": False}))
    assert config_of(variant(tmp_path / "g", models, "mixtral", {"expert_weights_norm": True}))


WRONG_KINDS = {"a text": "4", "a list": ["a", "b"], "a truth value": True, "a number": 4.5}
TYPED = {
    "block_count": "an integer", "attention.head_count_kv": "an integer", "expert_used_count": "an integer",
    "rope.freq_base": "a number", "attention.layer_norm_rms_epsilon": "a number", "rope.scaling.type": "a text",
    "expert_weights_norm": "a truth value",
}  # fmt: skip


@pytest.mark.parametrize("key", TYPED)
def test_a_value_of_another_type_is_refused_by_its_key(key, models, tmp_path):
    for kind, value in WRONG_KINDS.items():
        if kind != TYPED[key]:
            with pytest.raises(MoecError, match=rf"qwen3moe\.{key} is {kind}, not {TYPED[key]}"):
                config_of(variant(tmp_path / "g", models, "qwen3_moe", {key: value}))


def test_one_number_for_every_block(models, tmp_path):
    found = config_of(variant(tmp_path / "g", models, "qwen3_moe", {"attention.head_count": [4, 4]}))
    assert found.num_attention_heads == 4
    with pytest.raises(MoecError, match=r"attention\.head_count differs from block to block"):
        config_of(variant(tmp_path / "g", models, "qwen3_moe", {"attention.head_count": [4, 2]}))
    with pytest.raises(MoecError, match=r"attention\.head_count is a list, not an integer"):
        config_of(variant(tmp_path / "g", models, "qwen3_moe", {"attention.head_count": [4] * 5000}))


def test_heads_of_keys_are_those_of_queries_where_nothing_is_said(models, tmp_path):
    with pytest.raises(MoecError, match=r"attention\.head_count_kv is 4 times 16 .*attn_k.weight has the shape \[32"):
        config_of(variant(tmp_path / "g", models, "qwen3_moe", {"attention.head_count_kv": None}))


BLOCKS = {
    1: r"qwen3moe.block_count is 1, but the file has 2 blocks, and in them blk\.1\.",
    2147483647: "qwen3moe.block_count is 2147483647, but the file has no tensors of block 2",
}


@pytest.mark.parametrize("count", BLOCKS)
def test_blocks_are_those_that_are_announced(count, models, tmp_path):
    with pytest.raises(MoecError, match=BLOCKS[count]):
        config_of(variant(tmp_path / "g", models, "qwen3_moe", {"block_count": count}))


def test_blocks_are_those_of_a_config_beside_the_file(models, tmp_path):
    config = source_config(models, "qwen3_moe", num_hidden_layers=1)
    with pytest.raises(MoecError, match="num_hidden_layers is 1, but the file has 2 blocks"):
        config_of(variant(tmp_path / "g", models, "qwen3_moe", {"block_count": None}, config=config))
    gone = dict.fromkeys(name for name in models["qwen3_moe"][2] if name.startswith("blk.0."))
    with pytest.raises(MoecError, match="the file has no tensors of block 0"):
        config_of(variant(tmp_path / "h", models, "qwen3_moe", tensors=gone))


CONTRADICTIONS = {
    "num_hidden_layers": (1, r"config.json has num_hidden_layers 1, but qwen3moe\.block_count in the file is 2"),
    "num_experts_per_tok": (3, "config.json has num_experts_per_tok 3, but qwen3moe.expert_used_count in the file is 2"),
    "rms_norm_eps": (1e-3, r"config.json has rms_norm_eps 0\.001, but"),
    "rope_parameters": (
        {"rope_type": "default", "rope_theta": 5e5}, r"config.json has rope_theta 500000\.0, but qwen3moe.rope.freq_base",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attribute", CONTRADICTIONS)
def test_a_config_beside_the_file_must_not_contradict_it(attribute, models, tmp_path):
    value, message = CONTRADICTIONS[attribute]
    config = source_config(models, "qwen3_moe", **{attribute: value})
    with pytest.raises(MoecError, match=message):
        config_of(variant(tmp_path / "g", models, "qwen3_moe", config=config))


def test_a_config_beside_the_file_decides_what_the_file_leaves_open(models, tmp_path):
    theta = source_config(models, "qwen3_moe")["rope_parameters"]["rope_theta"]
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": theta}
    config = source_config(models, "qwen3_moe", norm_topk_prob=False, rope_parameters=rope)
    found = config_of(variant(tmp_path / "g", models, "qwen3_moe", {"attention.unheard_of": 7}, config=config))
    assert found.norm_topk_prob is False and found.rope_parameters["rope_type"] == "yarn"
    assert config_of(variant(tmp_path / "g", models, "qwen3_moe", YARN, config=config))
    for keys, message in (
        ({"expert_weights_norm": True}, "has norm_topk_prob False"),
        (YARN | {"rope.scaling.factor": 2.0}, "'yarn' with a factor of 2"),
        ({"expert_weights_scale": 2.5}, "expert_weights_scale is 2.5"),
    ):
        with pytest.raises(MoecError, match=message):
            config_of(variant(tmp_path / "g", models, "qwen3_moe", keys, config=config))


def test_keys_as_the_gguf_package_writes_them(models, tmp_path):
    """Names and types come from the package here; integers of other widths and values that change nothing pass."""
    plain, _, tensors = models["mixtral"]
    config = source_config(models, "mixtral")
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint64("llama.context_length", config["max_position_embeddings"])
    writer.add_uint16("llama.block_count", 2)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv([config["num_key_value_heads"]] * 2)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(16)
    writer.add_rope_scaling_type(RopeScalingType.NONE)
    writer.add_rope_scaling_finetuned(False)
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(ExpertGatingFuncType.SOFTMAX)
    writer.add_final_logit_softcapping(0.0)
    writer.add_tensor_data_layout("Meta AI original pth")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_quantization_version(2)
    writer.add_type("model")
    writer.add_chat_template("{{ messages }}")
    for name, (_, shape, raw) in tensors.items():
        writer.add_tensor(name, np.frombuffer(raw, "<f4").reshape(shape))
    writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert difference(moec.compile(tmp_path / "m.gguf", out=tmp_path / "a", accuracy="exact"), plain) <= EXACT


GENERAL = {
    "general.architecture": (["qwen3moe"], r"architecture \('qwen3moe',\) are not understood"),
    "general.type": ("adapter", "general.type is 'adapter': this is no model"),
}


@pytest.mark.parametrize("key", GENERAL)
def test_files_that_are_no_model(key, models, tmp_path):
    value, message = GENERAL[key]
    with pytest.raises(MoecError, match=message):
        config_of(variant(tmp_path / "g", models, "qwen3_moe", {key: value}))


def test_the_command_ends_with_2_and_one_message(models, tmp_path):
    file = variant(tmp_path / "g", models, "qwen3_moe", {"attention.head_count_kv": 0})
    result = invoke("compile", file, "-o", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.startswith("error: qwen3moe.attention.head_count_kv is 0")
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


def test_end_tokens_of_the_metadata_end_what_is_generated(models, tmp_path):
    ends = {"eos": 5, "eot": 7, "eom": 5}
    keys = {f"tokenizer.ggml.{name}_token_id": number for name, number in ends.items()}
    moec.compile(variant(tmp_path / "m", models, "olmoe", keys), out=tmp_path / "a")
    assert find_end_tokens(tmp_path / "a").ids == (5, 7)


def test_end_tokens_beside_the_file_count_instead(models, tmp_path):
    file = variant(tmp_path / "m", models, "olmoe", {"tokenizer.ggml.eos_token_id": 5})
    (file.parent / "generation_config.json").write_text('{"eos_token_id": 9}', "utf-8")
    moec.compile(file, out=tmp_path / "a")
    assert find_end_tokens(tmp_path / "a").ids == (9,)


@pytest.mark.parametrize("number", [128, 0xFFFFFFFF, "2", True])
def test_an_end_token_that_is_no_token_is_named(models, tmp_path, number):
    file = variant(tmp_path / "m", models, "olmoe", {"tokenizer.ggml.eos_token_id": number})
    with pytest.raises(MoecError, match=r"tokenizer\.ggml\.eos_token_id is .*the tokens are 0 to 127"):
        moec.compile(file, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()
