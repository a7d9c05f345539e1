"""`moec verify` of quantized checkpoints: transformers' model with the numbers that the formats' libraries decode."""

import json
import re
import resource
from dataclasses import replace
from importlib.metadata import version

import checkpoint_formats as formats
import moec
import pytest
import torch
from deepseek_v4_checkpoint import official_config, write_official
from deepseek_v4_models import WIDE
from gguf_models import write_model
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.stored import stored
from moec.compiler.frontends.transformers.dequantized import dequantized_model
from moec.compiler.runtime.reference import open_reference
from moec.compiler.weights.ggml import BLOCKS
from moec.compiler.weights.steps.table import step
from moec_command import invoke
from quantized_checkpoints import CASES, checkpoint, quantized
from safetensors.torch import load_file, save_file
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
    "ct fp8": (
        formats.ct_config("float-quantized", type="float", num_bits=8, strategy="channel"),
        lambda w: formats.fp8(w, (1, 0)),
        "qwen2_moe",
    ),
}

TRANSFORMERS, COMPRESSED = (
    f"transformers {version('transformers')}",
    f"compressed-tensors {version('compressed-tensors')}",
)
# the libraries that decode a format; those that are not here have none on a CPU
LIBRARIES = {
    "awq": {COMPRESSED}, "ct int4": {COMPRESSED}, "ct int4 zeros": {COMPRESSED}, "ct int8 rows": {COMPRESSED},
    "nvfp4": {COMPRESSED}, "mxfp4": {COMPRESSED}, "fp8": {COMPRESSED}, "ct fp8": {COMPRESSED},
}  # fmt: skip

SHORT = {"ct int4 zeros"}  # 48 columns in groups of 32, which the library does not decode


def verified(artifact, *options):
    """Return what `moec verify` prints as JSON, and its exit code."""
    result = invoke("verify", artifact, "--json", *options)
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout), result.exit_code


@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_has_the_numbers_of_the_codes(name, tmp_path):
    config, write, family = FORMATS[name]
    folder, plain = checkpoint(tmp_path, family, config, quantized(write))
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).state_dict()
    found, decoding = dequantized_model(folder)
    assert set(decoding.libraries) == LIBRARIES.get(name, set())
    assert (decoding.own > 0) == (name not in LIBRARIES or name in SHORT)
    assert found.config._attn_implementation == "eager" and not found.training
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=0)


def test_gguf(tmp_path):
    file, plain = write_model(tmp_path, "mixtral", lambda name: "q4_0")
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).state_dict()
    for name, tensor in dequantized_model(file)[0].state_dict().items():
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
    out = tmp_path / "artifact"
    result = invoke("compile", folder, "-o", out, "--quantize", "f32", "--verify")
    assert result.exit_code == 0 and ("note: moec itself decoded" in result.stderr) == (name not in LIBRARIES)
    found = json.loads((out / "moec.json").read_text())["figures"]["measured"]
    assert found["passed"] and found["lossless"] and found["against"] == str(folder)
    assert (found["decoding"]["moec"] == 0) == (name in LIBRARIES)
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
    assert found["decoding"]["moec"] == 0 and set(found["decoding"]["libraries"]) <= {COMPRESSED, TRANSFORMERS}


def test_a_parameter_without_tensors_is_named(tmp_path):
    folder, _ = checkpoint(tmp_path, "mixtral", FP8, quantized(blocks))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MoecError, match=r"lacks 1 tensors, such as model\.layers\.1\.input_layernorm\.weight"):
        dequantized_model(folder)


# --- what the reference is for: a wrong decoding in moec ----------------------------------------------------------


def wrong_order(patch):
    """Let moec take AWQ's columns in the order in which they lie."""
    patch.setattr("moec.compiler.frontends.stored.layouts_gptq._AWQ_ORDER", tuple(range(8)))


def wrong_table(patch):
    """Let moec look up E2M1 codes in the table of another format."""
    other = lambda packed: step("decode", step("unpack", packed, bits=4, axis=1), of="iq4_nl")  # noqa: E731
    patch.setattr("moec.compiler.frontends.stored.layouts.unpack_e2m1", other)


def wrong_layout(patch, role, change):
    """Let a layout of moec read something else than what is stored."""
    beside, layout = stored._LAYOUTS[role]
    patch.setitem(stored._LAYOUTS, role, (beside, lambda parts, scheme: layout(*change(parts, scheme))))


def wrong_float(patch):
    """Let moec take E4M3 for E5M2."""

    def other(parts, scheme):
        codes = step("view", parts["weight"], to="f8e5m2")
        return replace(parts, parts={**parts.parts, "weight": codes}), replace(scheme, floats="f8e5m2")

    wrong_layout(patch, "weight", other)


def wrong_zero(patch):
    """Let moec take the zero points of GPTQ as they are stored, which are one too small."""
    wrong_layout(patch, "qweight", lambda parts, scheme: (parts, replace(scheme, zeros_less_one=False)))


PLANTED = {"awq": wrong_order, "mxfp4": wrong_table, "fp8": wrong_float, "gptq": wrong_zero}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_decoding_fails(name, tmp_path):
    """With the fault in moec only while it compiles, the logits differ; with it there still, the weights do too."""
    config, write, family = FORMATS[name]
    folder, _ = checkpoint(tmp_path, family, config, quantized(write), num_hidden_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        PLANTED[name](patch)
        moec.compile(folder, out=tmp_path / "artifact", quantize="f32")
        if name in LIBRARIES:
            result = invoke("verify", tmp_path / "artifact")
            assert result.exit_code == 1 and re.search(r"moec decodes model\.\S+ otherwise than", result.stderr)
    found, code = verified(tmp_path / "artifact", "--text-tokens", "50")
    assert code == 1 and not found["passed"] and (found["relative"] is None or found["relative"] > 0.01)
    decoding = found["decoding"]
    assert (decoding["moec"] == 0) == (name in LIBRARIES) and ("reason" in decoding) == (name not in LIBRARIES)


def test_a_wrong_decoding_of_gguf_fails(tmp_path):
    with torch.no_grad():
        file, _ = write_model(tmp_path, "olmoe", lambda name: "mxfp4", num_hidden_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "moec.compiler.frontends.gguf.model.BLOCKS", {**BLOCKS, "mxfp4": replace(BLOCKS["mxfp4"], element="iq4_nl")}
        )
        moec.compile(file, out=tmp_path / "artifact", quantize="f32")
    found, code = verified(tmp_path / "artifact", "--text-tokens", "50")
    assert code == 1 and found["decoding"] == {"libraries": {f"gguf {version('gguf')}": 10}, "moec": 0}


def test_a_head_that_the_checkpoint_holds_is_not_tied(tmp_path):
    """The config says tied, and the checkpoint has another head: as transformers loads it."""
    config, write, family = FORMATS["fp8"]
    plain = save(random_model(FAMILIES[family], num_hidden_layers=1), tmp_path / "plain")
    settings = json.loads((plain / "config.json").read_text()) | {"tie_word_embeddings": True}
    (plain / "config.json").write_text(json.dumps(settings))
    folder, plain = formats.quantize_folder(tmp_path / "quantized", plain, config, quantized(write))
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    found, _ = dequantized_model(folder)
    assert torch.equal(found.lm_head.weight, expected.lm_head.weight)
    assert not torch.equal(found.lm_head.weight, found.model.embed_tokens.weight)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    tied, _ = dequantized_model(folder)
    assert torch.equal(tied.lm_head.weight, found.model.embed_tokens.weight)


def test_an_artifact_that_cannot_be_written_to(tmp_path):
    folder = save(random_model(FAMILIES["olmoe"], num_hidden_layers=1), tmp_path / "plain")
    artifact = moec.compile(folder, out=tmp_path / "artifact")
    before = (artifact.folder / "moec.json").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        result = invoke("verify", artifact.folder, "--text-tokens", "50")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 0 and f"equal to {folder}" in result.stdout
    assert "note: the figures are not kept: moec.json" in result.stderr
    assert (artifact.folder / "moec.json").read_bytes() == before and len(list(artifact.folder.glob(".*"))) == 0
