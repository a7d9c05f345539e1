"""A quantized config alone: the tensors that it stands for are those that a checkpoint of that kind holds."""

import json

import checkpoint_formats as formats
import pytest
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.frontends.stored.unread import read_tensors
from tiny_models import random_model, save

SIZES = {"hidden_size": 64, "moe_intermediate_size": 96, "num_experts": 4, "num_hidden_layers": 2}
ROUTER = ".mlp.gate"
INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}


def mixed(owner, weight):
    if ".experts." in owner:
        return formats.nvfp4(weight)
    return formats.fp8(weight, shape=()) if "self_attn" in owner else None


def attention_of_layer_1_stays(write):
    return lambda owner, w: write(w) if owner.endswith("_proj") and ".1.self_attn" not in owner else None


# name -> (how a module is written, quantization_config)
CASES = {
    "pack-quantized": (
        attention_of_layer_1_stays(lambda w: formats.ct_packed(w, zeros=True)),
        {
            **formats.ct_config("pack-quantized", **INT4, symmetric=False),
            "ignore": ["lm_head", "re:.*mlp.gate$", "re:model.layers.1.self_attn.*"],
        },
    ),
    "float-quantized": (
        lambda owner, w: formats.fp8(w, (1, 0), shape=(w.shape[0], 1)) if owner.endswith("_proj") else None,
        {
            **formats.ct_config("float-quantized", type="float", num_bits=8, strategy="channel"),
            "ignore": ["lm_head", "model.layers.0.mlp.gate"],
        },
    ),
    "nvfp4": (
        attention_of_layer_1_stays(formats.nvfp4),
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "language_model.model.layers.1.self_attn*"]},
    ),
    "mixed": (
        mixed,
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {
                **{f"model.language_model.layers.{i}.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16} for i in range(2)},
                **{f"model.layers.{i}.self_attn.{p}_proj": {"quant_algo": "FP8"} for i in range(2) for p in "qkvo"},
            },
        },
    ),
    "gptq": (
        attention_of_layer_1_stays(lambda w: formats.gptq(w)),
        {
            "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False,
            "dynamic": {r"-:model\.layers\.1\.self_attn": {}},
        },
    ),
    "awq": (
        attention_of_layer_1_stays(formats.awq),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["model.layers.1.self_attn"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_config_alone_names_the_tensors_of_its_checkpoint(name, tmp_path):
    write, config = CASES[name]
    plain = save(random_model(FAMILIES["qwen3_moe"], **SIZES), tmp_path / "plain")
    folder, _ = formats.quantize_folder(tmp_path / "quantized", plain, config, write)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text((folder / "config.json").read_text())
    stored, expected = (
        {tensor: type_.sizes for tensor, type_ in read_tensors(load(path).module).items() if ".g_idx" not in tensor}
        for path in (folder, alone)
    )
    assert any(tensor.endswith(("qweight", "weight_packed", "weight_scale_2", "weight_scale")) for tensor in stored)
    assert expected == stored


def test_a_config_that_does_not_say_it(tmp_path):
    save(random_model(FAMILIES["qwen3_moe"], **SIZES), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(MoecError, match="group_size in quantization_config is missing") as caught:
        load(tmp_path)
    assert caught.value.exit_code == 2
