"""A config.json whose values no model can be made with: refused by key before anything is built; legal ones are not."""

import json
import re

import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.frontends import skeleton
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.frontends.skeleton import build_skeleton, decoder_config, read_config
from moec.compiler.frontends.transformers.config_checks import check_config, check_sizes
from moec.compiler.frontends.transformers.config_names import check_read
from moec_command import invoke
from places import CONFIGS
from tiny_models import INSTALLED, random_model

NAN, INF = float("nan"), float("inf")

# family -> values, each of which is to be refused; a key with dots lies in a part of the config
BAD = {
    "qwen3_moe": [
        ("rope_theta", 0), ("rope_theta", -1), ("rope_theta", NAN), ("rope_theta", INF), ("rms_norm_eps", INF),
        ("rms_norm_eps", -1e-6), ("rms_norm_eps", NAN), ("num_experts_per_tok", 0), ("num_experts_per_tok", -2),
        ("num_experts_per_tok", 9), ("num_experts_per_tok", 2.5), ("head_dim", 0), ("head_dim", -16), ("head_dim", 17),
        ("num_key_value_heads", 0), ("num_key_value_heads", 3), ("num_key_value_heads", 8), ("vocab_size", 0),
        ("vocab_size", 10**30), ("hidden_size", "64"), ("hidden_size", True), ("num_hidden_layers", 0),
        ("num_hidden_layers", 20_000), ("num_hidden_layers", -1), ("max_position_embeddings", -5),
        ("max_position_embeddings", 0), ("sliding_window", -4), ("pad_token_id", 128), ("pad_token_id", 10**9),
        ("moe_intermediate_size", 0), ("moe_intermediate_size", -32), ("num_local_experts", 10**9),
        ("initializer_range", NAN), ("layer_types", ["full_attention"]),
    ],
    "deepseek_v3": [
        ("head_dim", "16"), ("n_shared_experts", True), ("moe_intermediate_size", 32.5), ("n_group", 1),
        ("n_group", 3), ("n_group", 0), ("topk_group", 5), ("topk_group", 0), ("num_experts_per_tok", 5),
        ("n_routed_experts", -1), ("kv_lora_rank", 0), ("qk_rope_head_dim", 7), ("num_attention_heads", 0),
    ],
    "mixtral": [("num_local_experts", 1), ("intermediate_size", -1), ("num_attention_heads", 0), ("hidden_size", 2**40)],
    "glm_moe_dsa": [("index_topk", 0), ("index_n_heads", -1), ("indexer_types", ["full"])],
    "llama4_text": [("attention_chunk_size", -8), ("num_experts_per_tok", 5), ("vocab_size", -128)],
    "qwen3_next": [("linear_conv_kernel_dim", 0), ("linear_num_value_heads", -4)],
    "granitemoehybrid": [("mamba_chunk_size", 0), ("mamba_d_state", -1)],
    "granitemoe": [("logits_scaling", 0), ("embedding_multiplier", NAN)],
    "dbrx": [("ffn_config.moe_top_k", 5), ("attn_config.kv_n_heads", 3), ("attn_config.rope_theta", -1)],
    "qwen3_vl_moe": [("text_config.vocab_size", 0), ("text_config.rms_norm_eps", INF), ("text_config.num_hidden_layers", 30_000),
                     ("text_config.num_experts_per_tok", 9)],
    "kimi_k25": [("text_config.rope_theta", 0), ("text_config.n_group", 3)],
    "deepseek_v4": [("num_experts_per_tok", 9), ("rms_norm_eps", NAN), ("hidden_size", 0)],
}  # fmt: skip
ROPES = [
    ({"type": "linear", "factor": 0}, "factor"), ({"rope_type": "linear", "factor": -2.0}, "factor"),
    ({"rope_type": "linear"}, "factor"), ({"rope_type": "yarn", "factor": INF}, "factor"),
    ({"rope_type": "yarn", "factor": NAN}, "factor"), ({"rope_type": "yarn", "factor": "4"}, "factor"),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
    ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 0}, "beta_fast"),
    ({"rope_type": "yarn", "factor": 4.0, "attention_factor": -1.0}, "attention_factor"),
    ({"rope_type": "llama3", "factor": 4.0}, "low_freq_factor"),
    ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 7 + [0], "long_factor": [1.0] * 8}, "short_factor"),
    ({"rope_type": "default", "rope_theta": []}, "rope_theta"), ({"rope_type": "default", "rope_theta": None}, "rope_theta"),
    ({"rope_type": None}, "rope_type"), (5, "rope_scaling"), ({"rope_type": "twisted", "factor": 4.0}, "twisted"),
    ({"rope_type": "default", "partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ({"full_attention": {"rope_type": "linear", "factor": 0}}, "full_attention.factor"),
]  # fmt: skip


def write(folder, family, key=None, value=None, text=None):
    """Write the tiny config of a family with one value changed, or a text; return the folder."""
    folder.mkdir()
    config = FAMILIES[family].config().to_dict()
    if key is not None:
        *path, last = key.split(".")
        part = config
        for name in path:
            part = part[name]
        if last in ("rope_theta", "rope_scaling"):
            part.pop("rope_parameters", None)
        if last == "num_hidden_layers":
            part.pop("layer_types", None)
        part[last] = value
    (folder / "config.json").write_text(json.dumps(config) if text is None else text)
    return folder


def refusal(folder):
    """Return the one error that inspect ends with."""
    result = invoke("inspect", folder)
    assert result.exit_code == 2, result.output + str(result.exception)
    text = result.stderr
    assert text.count("error:") == 1 and "Error" not in text and "Traceback" not in text, text
    return text.replace(str(folder), "")


@pytest.fixture
def no_models(monkeypatch):
    """Let a test fail that builds a model."""

    def fail(*args, **options):
        raise AssertionError("a model was built")

    monkeypatch.setattr(skeleton, "make_model", fail)


@pytest.mark.parametrize(("family", "key", "value"), [(f, k, v) for f, all_ in BAD.items() for k, v in all_],
                         ids=lambda v: str(v)[:30])  # fmt: skip
def test_a_value_is_refused_by_its_key(tmp_path, no_models, family, key, value):
    text = refusal(write(tmp_path / "m", family, key, value))
    assert key.rpartition(".")[2] in text


@pytest.mark.parametrize(("rope", "named"), ROPES, ids=str)
@pytest.mark.parametrize(("family", "prefix"), [("qwen3_moe", ""), ("qwen3_vl_moe", "text_config.")])
def test_rope_scaling_is_refused_by_key(tmp_path, family, prefix, rope, named):
    assert named in refusal(write(tmp_path / "m", family, f"{prefix}rope_scaling", rope))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"model_type": "llama", "vocab_size": 1' + "0" * 5000 + "}", "digits"),
        ('{"model_type": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
        ('{"model_type": "llama", "hidden_size": Infinity}', "hidden_size"),
        ('{"model_type": "llama", "rms_norm_eps": 1e999}', "rms_norm_eps"),
        ('{"model_type": "llama", "rms_norm_eps": NaN}', "rms_norm_eps"),
        ('{"model_type": "llama", "rope_theta": -Infinity}', "rope_theta"),
        ('{"model_type": 5}', "model_type"),
        ('["model_type"]', "object"),
        ('{"model_type": "llama",}', "line 1"),
        ("\ud800", "UTF-8"),
        ('{"model_type": "llama", "num_experts": 4, "num_experts": 8}', "'num_experts' stands in it twice"),
        ('{"model_type": "llama", "dtype": "float7"}', "dtype is 'float7'"),
        ('{"model_type": "llama", "torch_dtype": 16}', "torch_dtype is 16"),
        ('{"model_type": "llama", "quantization_config": "none"}', "quantization_config is 'none'"),
        ('{"model_type": "llama", "quantization_config": [1]}', "quantization_config is [1]"),
    ],
)
def test_what_json_cannot_mean(tmp_path, no_models, text, named):
    folder = write(tmp_path / "m", "llama", text="")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert named in refusal(folder)


# --- what is legal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", INSTALLED)
def test_the_configs_of_all_families_are_accepted(family):
    config = FAMILIES[family].config()
    check_config(json.loads(json.dumps(config.to_dict())), "")
    check_sizes(decoder_config(config).to_dict(), "")


@pytest.mark.parametrize("folder", sorted(CONFIGS.iterdir()), ids=lambda p: p.name)
def test_published_configs_are_accepted(folder):
    check_config(json.loads((folder / "config.json").read_text()), "")


@pytest.mark.parametrize(
    "values",
    [
        {"num_experts": 0, "num_experts_per_tok": 0},
        {"num_experts": [64, 64], "moe_intermediate_size": [1536, 512], "num_experts_per_tok": 6},
        {"n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 12},
        {"n_routed_experts": 6, "n_group": 4, "topk_method": "greedy", "num_experts_per_tok": 2},
        {"time_step_limit": [0.0, INF], "swiglu_limit": INF, "rms_norm_eps": 0, "rms_norm_eps_moe_gate": None},
        {"shared_intermediate_size": 0, "qk_rope_head_dim": 0, "qk_nope_head_dim": 64, "head_dim": 0},
        {"sliding_window": 0, "use_sliding_window": False, "pad_token_id": -1, "vocab_size": 10},
        {"layer_rope_theta": [10000.0, 0], "rope_scaling": None, "rope_theta": None, "num_key_value_heads": None},
        {"vision_config": {"hidden_size": 0, "rope_theta": -1}, "quantization_config": {"group_size": -1}},
        {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24], "mscale": 0, "factor": None}},
    ],
)
def test_unusual_values_that_mean_something(values):
    check_config(values, "")
    check_sizes(values, "")


def test_a_head_size_that_nothing_says():
    with pytest.raises(MoecError, match="num_attention_heads is 4: it does not divide hidden_size 66"):
        check_sizes({"num_attention_heads": 4, "hidden_size": 66, "head_dim": None}, "config.json")
    check_sizes({"num_attention_heads": 4, "hidden_size": 66, "head_dim": 16}, "")


@pytest.mark.parametrize(
    ("family", "key", "other", "value"),
    [
        ("mixtral", "num_experts_per_tok", "num_experts_per_token", 1),
        ("qwen3_moe", "num_experts_per_tok", "moe_topk", 1),
        ("deepseek_v3", "routed_scaling_factor", "router_scaling_factor", 1.25),
        ("olmoe", "rms_norm_eps", "layer_norm_eps", 0.5),
        ("qwen3_moe", "rope_parameters", "rotary_emb_base", 77.0),
        ("qwen3_vl_moe", "text_config.num_experts_per_tok", "text_config.top_k", 1),
    ],
)
def test_a_number_under_a_name_that_the_model_does_not_read(tmp_path, family, key, other, value):
    """Under its own name or a class's default under the other it is legal, and both names together are too."""
    folder = write(tmp_path / "m", family)
    config = json.loads((folder / "config.json").read_text())
    scope = config["text_config"] if "." in key else config
    own, other = key.rpartition(".")[2], other.rpartition(".")[2]
    scope[other] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert read_config(folder) is not None
    del scope[own]
    (folder / "config.json").write_text(json.dumps(config))
    text = refusal(folder)
    assert f"{other} {value}" in text and ("rope_theta" if own == "rope_parameters" else own) in text


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "ernie4_5_moe"])
def test_experts_of_which_nothing_says_how_many_are_chosen(tmp_path, family):
    folder = write(tmp_path / "m", family)
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_experts_per_tok", "moe_k"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert re.search(r"does not say (num_experts_per_tok|moe_k): \d+ would be a guess", refusal(folder))


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [("deepseek_v2", "norm_topk_prob", True), ("deepseek_v2", "scoring_func", "sigmoid"), ("deepseek_v3", "scoring_func", "softmax")],
)  # fmt: skip
def test_a_rule_of_routing_that_the_code_does_not_follow(tmp_path, family, key, value):
    """DeepSeek's own code follows it, or refuses it, and transformers' does not look: numbers would be others'."""
    text = refusal(write(tmp_path / "m", family, key, value))
    assert f"{key} is {value!r}, which the code of {family} in transformers does not read" in text


def test_rules_of_routing_that_the_code_follows(tmp_path):
    for family in INSTALLED:
        config = FAMILIES[family].config()
        kinds = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid", "minimax_m2": "sigmoid", "dots1": "noaux_tc"}
        raw = {**config.to_dict(), **({"scoring_func": kinds[family]} if family in kinds else {})}
        if family != "deepseek_v4":
            check_read(raw, build_skeleton(config).model, "")


@pytest.mark.parametrize(
    "text",
    ['"dtype": "auto"', '"torch_dtype": "torch.bfloat16"', '"hidden_act": "silu", "hidden_act": "silu"'],
)
def test_spellings_that_mean_the_same(tmp_path, text):
    folder = write(tmp_path / "m", "mixtral")
    whole = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(whole[:-1].replace('"dtype": null,', "") + f", {text}}}")
    assert read_config(folder).hidden_act == "silu"


# --- what model code raises --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "key", "value", "named"),
    [
        ("deepseek_v3", "n_group", 8, ["modeling_deepseek_v3.py:", ".topk(2, dim=-1)", "topk_group 2"]),
        ("qwen3_moe", "hidden_act", "nothing", ["hidden_act is 'nothing'", "modeling_qwen3_moe.py:"]),
        ("granitemoehybrid", "mamba_n_groups", 3, ["its code stops at modeling_granitemoehybrid.py:", ".view("]),
    ],
)
def test_where_model_code_stops_is_shown(tmp_path, family, key, value, named):
    folder = write(tmp_path / "m", family, key, value)
    result = invoke("inspect", folder)
    assert result.exit_code == 2, result.output
    for text in named:
        assert text in result.stderr, result.stderr


class Stops(torch.nn.Module):
    """An MLP that raises what it is given, or reads what is not there."""

    def __init__(self, how, config):
        super().__init__()
        self.how, self.config = how, config

    def forward(self, x):
        """Raise."""
        match self.how:
            case "attribute":
                return x * self.config.clamp_width
            case "key":
                return x * self.config.rope_parameters["turns"]
            case "numbers":
                return x * x.sum().item()
            case "size":
                return x.view(-1, self.config.hidden_size - 1)
        raise AssertionError(self.how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("attribute", "its code reads clamp_width, which the config does not have"),
        ("key", "its code looks for 'turns', which the config does not have"),
        ("numbers", "does not run on shapes alone"),
        ("size", "sizes in its config do not fit each other"),
    ],
)
def test_an_exception_of_model_code_is_not_the_message(how, said):
    model = random_model(FAMILIES["llama"])
    model.model.layers[1].mlp = Stops(how, model.config)
    with pytest.raises(MoecError) as caught:
        load(model)
    text = str(caught.value)
    assert said in text and (how == "key" or str(caught.value.__cause__) not in text)
    assert ("shapes alone" in text) == (how == "numbers")
