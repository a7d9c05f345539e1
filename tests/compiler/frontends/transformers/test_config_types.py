"""Configs whose model_type transformers does not know, and folders with an adapter."""

import json
import shutil

import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.frontends.transformers.config_types import known_config
from moec.compiler.text.printer import print_module
from safetensors.torch import load_file, save_file
from tiny_models import random_model, save

# what config.json says -> the model_type that it means
TYPES = [
    ({"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}, "deepseek_v3"),
    ({"model_type": "kimi_k2"}, "deepseek_v3"),
    ({"model_type": "deepseek_ref", "architectures": ["DeepseekV4ForCausalLM"]}, "deepseek_v4"),
    ({"model_type": "my_finetune", "architectures": ["Other", "Qwen3MoeForCausalLM"]}, "qwen3_moe"),
    ({"model_type": "mine", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}, "qwen3_vl_moe"),
    ({"model_type": "mine", "architectures": ["Llama4ForCausalLM"]}, "llama4_text"),
    ({"model_type": "mine", "architectures": ["Unheard"]}, "mine"),
    ({"model_type": "mine", "architectures": "MixtralForCausalLM"}, "mine"),
    ({"model_type": "mixtral", "architectures": ["Qwen3MoeForCausalLM"]}, "mixtral"),
]


@pytest.mark.parametrize(("config", "meant"), TYPES)
def test_an_unknown_model_type_means_its_architecture(config, meant):
    assert known_config(config)["model_type"] == meant


def test_parts_of_a_config_have_types_too():
    raw = {
        "model_type": "kimi_k25",
        "text_config": {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]},
    }
    assert known_config(raw)["text_config"]["model_type"] == "deepseek_v3"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    return save(random_model(FAMILIES["deepseek_v3"], num_hidden_layers=2), tmp_path_factory.mktemp("deepseek"))


def test_kimi_k2_is_the_program_of_deepseek_v3(deepseek, tmp_path):
    folder = shutil.copytree(deepseek, tmp_path / "kimi")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    texts = [print_module(load(path).module).split("\n", 3)[-1] for path in (deepseek, folder)]
    assert texts[0].replace(str(deepseek), "") == texts[1].replace(str(folder), "")


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "target_modules": ["q_proj"]}


@pytest.mark.parametrize("beside", [True, False], ids=["beside the model", "alone"])
@pytest.mark.parametrize(
    "files", [("adapter_config.json",), ("adapter_model.safetensors",), ("adapter_config.json", "adapter_model.bin")]
)
def test_an_adapter_is_refused(deepseek, tmp_path, files, beside):
    folder = tmp_path / "in"
    folder.mkdir()
    if beside:
        shutil.copytree(deepseek, folder, dirs_exist_ok=True)
    for file in files:
        (folder / file).write_text(json.dumps(ADAPTER) if file.endswith("json") else "")
    with pytest.raises(MoecError, match="the folder holds an adapter") as caught:
        load(folder)
    assert "merge" in caught.value.todo and ("org/base" in caught.value.todo) == ("adapter_config.json" in files)


@pytest.mark.parametrize("leaf", ["q_a_proj.lora_A.default.weight", "o_proj.ia3_l"])
def test_the_tensors_of_an_adapter_are_not_left_out(deepseek, tmp_path, leaf):
    """A model that was saved with its adapter not merged; also where the layers' other tensors are all there."""
    tensors = load_file(deepseek / "model.safetensors")
    name = f"model.layers.1.self_attn.{leaf}"
    tensors[name] = tensors["model.layers.1.input_layernorm.weight"].clone()
    shutil.copy(deepseek / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MoecError, match="belongs to an adapter") as caught:
        load(tmp_path)
    assert name in caught.value.what


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": 1},
            r"num_hidden_layers 1 and .* but the checkpoint has model\.layers\.1\.\S+ and \d+ more tensors of 1 layer beyond",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, r"has no tensor for model\.layers\.2\."),
    ],
)
def test_layers_that_config_and_weights_count_differently(deepseek, tmp_path, change, message):
    folder = shutil.copytree(deepseek, tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(MoecError, match=message):
        load(folder)


def test_layers_that_draft_tokens_are_announced(deepseek, tmp_path):
    """DeepSeek-V3 has its drafting layer behind the others, GLM-4.5 too; one more than announced is an error."""
    tensors = load_file(deepseek / "model.safetensors")
    extra = {name.replace("layers.1.", "layers.2."): t for name, t in tensors.items() if "layers.1." in name}
    extra = {name: t.clone() for name, t in extra.items()}
    extra["model.layers.2.enorm.weight"] = torch.ones(64)
    config = json.loads((deepseek / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    load(tmp_path)
    beyond = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in extra.items()}
    save_file({**tensors, **extra, **beyond}, tmp_path / "model.safetensors")
    message = r"num_hidden_layers 2 and num_nextn_predict_layers 1, but the checkpoint has model\.layers\.3\."
    with pytest.raises(MoecError, match=message):
        load(tmp_path)
    del extra["model.layers.2.enorm.weight"]  # a layer like the others, which config.json does not count
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    with pytest.raises(MoecError, match=r"num_nextn_predict_layers 1, but the checkpoint has model\.layers\.2\."):
        load(tmp_path)
