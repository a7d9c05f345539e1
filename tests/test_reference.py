"""`moec verify` of quantized checkpoints: transformers' model with the numbers of the codes, without other packages."""

import json

import checkpoint_formats as formats
import moec
import pytest
import torch
from click.testing import CliRunner
from deepseek_v4_checkpoint import official_config, write_official
from moec.compiler.cli import main
from moec.compiler.errors import MoecError
from moec.compiler.frontends.dequantized import dequantized_model
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.reference import open_reference
from safetensors.torch import load_file, save_file
from test_deepseek_v4_checkpoints import WIDE
from test_gguf import write_model
from test_keep import CASES, checkpoint, quantized
from tiny_models import random_model, save
from transformers import AutoModelForCausalLM

# 64 and 96 are no multiples of these: blocks are cut at edges, as those of 128 are in released checkpoints
BLOCK = (40, 48)
FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}


def blocks(weight):
    return formats.fp8(weight, BLOCK, "weight_scale_inv")


FORMATS = {
    **{name: (config, write, family) for name, (config, write, family, _) in CASES.items()},
    "fp8": (FP8, blocks, "deepseek_v3"),
    "ct fp8": (formats.ct_config("float-quantized"), lambda w: formats.fp8(w, (1, 0)), "qwen2_moe"),
}


def verified(artifact, *options):
    """Return what `moec verify` prints as JSON, and its exit code."""
    result = CliRunner().invoke(main, ["verify", str(artifact), "--json", *map(str, options)])
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout), result.exit_code


@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_has_the_numbers_of_the_codes(name, tmp_path):
    config, write, family = FORMATS[name]
    folder, plain = checkpoint(tmp_path, family, config, quantized(write))
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).state_dict()
    found = dequantized_model(folder)
    assert found.config._attn_implementation == "eager" and not found.training
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=0)


def test_gguf(tmp_path):
    file, plain = write_model(tmp_path, "mixtral", lambda name: "q4_0")
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).state_dict()
    for name, tensor in dequantized_model(file).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=0)
    moec.compile(file, out=tmp_path / "artifact", accuracy="exact")
    found, code = verified(tmp_path / "artifact")
    assert code == 0 and found["relative"] < 1e-4


def test_an_unquantized_checkpoint_is_loaded_by_transformers(tmp_path):
    assert dequantized_model(save(random_model(FAMILIES["olmoe"]), tmp_path / "plain")) is None


@pytest.mark.parametrize("name", ["fp8", "gptq"])
def test_verify_of_a_quantized_folder(name, tmp_path):
    config, write, family = FORMATS[name]
    folder, plain = checkpoint(tmp_path, family, config, quantized(write))
    moec.compile(folder, out=tmp_path / "artifact", quantize="f32")
    found, code = verified(tmp_path / "artifact")
    assert code == 0 and found["lossless"] and found["against"] == str(folder)
    against, _ = verified(tmp_path / "artifact", "--against", plain)
    assert against["relative"] < 1e-4


@pytest.mark.parametrize("base", [False, True])
def test_verify_of_an_official_deepseek_v4(base, tmp_path):
    model = random_model(FAMILIES["deepseek_v4"], **WIDE)
    folder = write_official(model, tmp_path / "official", official_config(model, base=base), base=base)
    moec.compile(folder, out=tmp_path / "artifact", quantize="f32")
    with open_reference(folder) as reference:
        found = reference.model.state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    found, code = verified(tmp_path / "artifact")
    assert code == 0 and found["lossless"]


def test_a_parameter_without_tensors_is_named(tmp_path):
    folder, _ = checkpoint(tmp_path, "mixtral", FP8, quantized(blocks))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MoecError, match=r"lacks 1 tensors, such as model\.layers\.1\.input_layernorm\.weight"):
        dequantized_model(folder)
