"""Codes without scales, and what of a checkpoint a program does not read: left out, or an error that names the tensor."""

import json

import checkpoint_formats as formats
import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from safetensors.torch import load_file, save_file
from tiny_models import random_model, save

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return the tensors of a tiny Qwen3 MoE in FP8 blocks, and its config."""
    folder = tmp_path_factory.mktemp("fp8")
    plain = save(random_model(FAMILIES["qwen3_moe"], **SIZES), folder / "plain")
    write = lambda owner, w: formats.fp8(w, (32, 32), "weight_scale_inv") if owner.endswith("_proj") else None  # noqa: E731
    quantized, _ = formats.quantize_folder(folder / "quantized", plain, FP8, write)
    return load_file(quantized / "model.safetensors"), json.loads((quantized / "config.json").read_text())


def loaded(folder, tensors, config):
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return load(folder)


def refused(folder, tensors, config, *names):
    with pytest.raises(MoecError) as caught:
        loaded(folder, tensors, config)
    assert caught.value.exit_code == 2 and all(name in str(caught.value) for name in names), str(caught.value)


def without(tensors, *ends):
    return {name: t for name, t in tensors.items() if not name.endswith(ends)}


def test_what_is_left_out_and_says_nothing_about_weights(source, tmp_path):
    """A tower, blocks that draft tokens, scales of activations and caches, biases of zeros, tables of angles."""
    tensors, config = source
    attention = "model.layers.0.self_attn"
    more = {
        "visual.blocks.0.mlp.fc1.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "visual.blocks.0.mlp.fc1.weight_scale_inv": torch.ones(1, 1),
        "visual.layer_scale.scale": torch.ones(4),
        "mtp.fc.weight": torch.ones(4, 4),
        f"{attention}.q_proj.input_scale": torch.ones(1),
        f"{attention}.k_scale": torch.ones(1),
        f"{attention}.q_proj.bias": torch.zeros(64),
        f"{attention}.rotary_emb.inv_freq": torch.ones(8),
    }
    assert loaded(tmp_path, {**tensors, **more}, config).weights is not None


@pytest.mark.parametrize(
    ("ends", "name"),
    [
        ((f"{DOWN}_scale_inv",), f"{DOWN}_scale_inv"),
        (("layers.0.self_attn.o_proj.weight_scale_inv",), "layers.0.self_attn.o_proj.weight_scale_inv"),
        (tuple(f"layers.1.mlp.experts.{i}.up_proj.weight_scale_inv" for i in range(4)), "layers.1.mlp.experts.0.up_proj.weight"),
        (("_scale_inv",), "model.layers.0.self_attn.q_proj.weight_scale_inv"),
        ((DOWN,), DOWN),
    ],
)  # fmt: skip
def test_codes_without_scales_and_scales_without_codes(ends, name, source, tmp_path):
    tensors, config = source
    refused(tmp_path, without(tensors, *ends), config, name)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.bool]
)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.2.up_proj.weight", "model.norm.weight"])
def test_integers_are_no_weights_without_a_config_either(name, dtype, source, tmp_path):
    tensors, config = source
    plain = {n: t.float() for n, t in without(tensors, "_scale_inv").items()}
    plain[name] = plain[name].sign().to(dtype)
    refused(tmp_path, plain, {k: v for k, v in config.items() if k != "quantization_config"}, name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mlp.experts.0.up_proj.weight_scale_2", ()),
        ("model.layers.0.self_attn.q_proj.pre_quant_scale", (64,)),
        ("model.layers.0.mlp.experts.gate_up_proj_scale_inv", (4, 2, 2)),
        ("model.layers.1.self_attn.extra.scale", (1,)),
        ("model.embed_scale", (1,)),
        ("visual.blocks.0.fc1.weight_scale_inv", (1, 1)),
        ("visual.blocks.0.experts.down_proj_scale_inv", (1, 1)),
        ("model.layers.0.self_attn.q_proj.bias", (64,)),
        ("model.layers.0.self_attn.q_norm2.weight", (16,)),
        ("model.layers.1.mlp.shared_expert.up_proj.weight", (32, 64)),
    ],
)
def test_tensors_that_something_should_read(name, shape, source, tmp_path):
    tensors, config = source
    refused(tmp_path, {**tensors, name: torch.ones(shape)}, config, name)


def test_scales_beside_floats(source, tmp_path):
    tensors, config = source
    floats = {**tensors, DOWN: tensors[DOWN].float()}
    refused(tmp_path, floats, config, f"{DOWN} is f32", f"plain numbers, and {DOWN}_scale_inv stands beside it")
    del (config := dict(config))["quantization_config"]
    refused(tmp_path, tensors, config, "has scales, but config.json has no quantization_config")
    every = {name: t.float() if t.dtype == torch.float8_e4m3fn else t for name, t in tensors.items()}
    refused(tmp_path, every, config, "plain numbers", "_scale_inv stands beside it")
