"""`--quantize keep`: artifacts that hold the codes of their checkpoint, and what is said where none can."""

import json
import re

import checkpoint_formats as formats
import moec
import numpy as np
import pytest
import torch
from moec.compiler.driver import compile_source
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.ir.recipes import Step
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.steps.table import step
from moec_command import invoke
from quantized_checkpoints import AWQ, CASES, CT4, EXACT, GPTQ, checkpoint, difference, quantized
from tiny_models import random_model, save


@pytest.mark.parametrize("name", CASES)
def test_kept_codes_equal_the_dequantized_model(name, tmp_path):
    config, write, family, expected = CASES[name]
    folder, plain = checkpoint(tmp_path, family, config, quantized(write))
    artifact = moec.compile(folder, out=tmp_path / "a", accuracy="exact")
    kept = artifact.manifest["figures"]["kept"]["layer"]
    assert set(kept) == {"exact"} and all(format.startswith(expected) for format in kept["exact"]), kept
    assert not artifact.manifest["lossy"]
    assert set(artifact.manifest["precision"]["layer"]) == {"f32", *kept["exact"]}
    assert difference(artifact, plain) <= EXACT


@pytest.mark.parametrize("name", ["gptq", "ct int4", "nvfp4"])
def test_the_codes_are_those_of_the_checkpoint(name, tmp_path):
    """Not one number is computed anew: what the parts stand for are the checkpoint's numbers, bit by bit."""
    config, write, family, _ = CASES[name]
    folder, _ = checkpoint(tmp_path, family, config, quantized(write))
    weights = load(folder).weights
    before, after = (moec.compile(folder, stop_after="moe", quantize=q) for q in ("f32", None))
    consts = {c.value.name: c.recipe for c in before.by_name["layer"].consts}
    seen = 0
    for const in after.by_name["layer"].consts:
        if isinstance(const.recipe, Step) and const.recipe.name == "packed":
            bound = [_in_layer(after, recipe) for recipe in (consts[const.value.name], const.recipe)]
            assert torch.equal(*(evaluate_recipe(recipe, weights) for recipe in bound))
            seen += 1
    assert seen == 4  # q, k and v in one, o, up, down


def _in_layer(module, recipe):
    from moec.compiler.ir.recipes import bind_recipe

    return bind_recipe(recipe, module.by_name["layer"].weights, {"layer": "1"})


def test_without_keep_the_numbers_are_f32(tmp_path):
    folder, plain = checkpoint(tmp_path, "mixtral", GPTQ, quantized(formats.gptq))
    artifact = moec.compile(folder, out=tmp_path / "a", quantize="f32")
    assert "kept" not in artifact.manifest["figures"] and artifact.manifest["precision"]["layer"] == ["f32"]
    assert difference(artifact, plain) <= EXACT


@pytest.mark.parametrize(
    ("name", "config", "write", "reason"),
    [
        ("fp8", {"quant_method": "fp8", "weight_block_size": [32, 32]},
         lambda w: formats.fp8(w, (32, 32), "weight_scale_inv"), "its codes are f8e4m3; .* stored as int8_g32"),
        ("act-order", {**GPTQ, "desc_act": True}, lambda w: formats.gptq(w, act_order=True),
         "each of its columns has a scale of its own .*; stored as int8_g"),
    ],
)  # fmt: skip
def test_what_no_format_holds_is_stored_near_it(name, config, write, reason, tmp_path):
    folder, plain = checkpoint(tmp_path, "mixtral", config, quantized(write))
    done = compile_source(folder, out=tmp_path / "a", accuracy="exact")
    artifact, notes = done.artifact, done.notes
    assert any(re.search(reason, str(note)) for note in notes), notes
    assert set(artifact.manifest["figures"]["kept"]["layer"]) == {"near"} and artifact.manifest["lossy"]
    assert EXACT < difference(artifact, plain, of=torch.median) < 0.01


def test_experts_of_one_op_share_a_format(tmp_path):
    """Up in 4 bits and down in 8 become 8 bits, both exact; with FP8 down, down alone is near."""

    def mixed(name, weight):
        if name.endswith("w2"):
            return formats.ct_packed(weight, bits=8)
        return formats.ct_packed(weight) if name.endswith(("w1", "w3")) else None

    config = {
        **CT4,
        "config_groups": {f"g{b}": {"weights": {"type": "int", "num_bits": b, "group_size": 32}} for b in (4, 8)},
    }
    folder, plain = checkpoint(tmp_path, "mixtral", config, mixed)
    artifact = moec.compile(folder, out=tmp_path / "a", accuracy="exact")
    assert artifact.manifest["figures"]["kept"]["layer"] == {"exact": ["int8_g32"]}
    assert difference(artifact, plain) <= EXACT


def test_layers_stored_in_other_ways_are_other_functions(tmp_path):
    def second_plain(name, weight):
        return None if ".layers.1." in name else quantized(formats.gptq)(name, weight)

    folder, plain = checkpoint(tmp_path, "mixtral", GPTQ, second_plain)
    artifact = moec.compile(folder, out=tmp_path / "a", accuracy="exact")
    assert artifact.manifest["figures"]["kept"] == {"layer_0": {"exact": ["uint4_g32"]}}
    assert difference(artifact, plain) <= EXACT


def test_other_weights_can_be_quantized_beside(tmp_path):
    def experts_only(name, weight):
        return formats.ct_packed(weight) if ".experts." in name else None

    folder, plain = checkpoint(tmp_path, "mixtral", CT4, experts_only)
    artifact = moec.compile(folder, out=tmp_path / "a", accuracy="exact", quantize="keep,attention=int8_g32")
    assert artifact.manifest["precision"]["layer"] == ["f32", "int4_g32", "int8_g32"]
    assert EXACT < difference(artifact, plain, of=torch.median) < 0.01


def test_gpt_oss_in_mxfp4(tmp_path):
    model = random_model(FAMILIES["gpt_oss"])
    plain = save(model, tmp_path / "plain")
    from safetensors.torch import load_file, save_file

    stored, meant = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            leaves, made = formats.mxfp4(tensor.transpose(1, 2).numpy(), "_blocks", "_scales")
            leaves["_blocks"] = leaves["_blocks"].unflatten(-1, (-1, 16))
            stored |= {f"{name}{leaf}": t.contiguous() for leaf, t in leaves.items()}
            meant[name] = torch.from_numpy(made).transpose(1, 2).contiguous()
        else:
            stored[name] = meant[name] = tensor
    folder = tmp_path / "quantized"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    artifact = moec.compile(folder, out=tmp_path / "a", accuracy="exact")
    kept = artifact.manifest["figures"]["kept"]
    assert all(formats["exact"] == ["int8_g16"] or formats["exact"] == ["int8_g32"] for formats in kept.values()), kept
    assert difference(artifact, plain) <= EXACT
    (folder / "model.safetensors").unlink()
    printed = moec.compile(folder, stop_after="moe")
    from moec.compiler.cost.count import module_costs

    assert module_costs(printed).total.parameters == sum(t.numel() for t in meant.values())


def test_the_command_says_what_was_kept(tmp_path):
    folder, _ = checkpoint(tmp_path, "mixtral", AWQ, quantized(formats.awq))
    done = invoke("compile", folder, "-o", tmp_path / "a", "--quantize", "keep", "--why")
    assert done.exit_code == 0, done.output
    assert "codes of the checkpoint kept in @layer: uint4_g32\n" in done.stderr
    assert "keep the codes of the checkpoint, uint4 in groups of 32, as uint4_g32" in done.stderr


def test_experts_interleave_as_codes():
    """Rows of gate and up in turn, for codes, scales and zero points alike."""
    from moec.compiler.ir.recipes import Tensor
    from moec.compiler.ir.types import TensorType
    from moec.compiler.weights.sources.source import ModuleSource
    from moec.targets.cpu.lower.quantized import interleaved_recipe

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "q": torch.randint(0, 16, (2, 6, 32), generator=generator).to(torch.uint8),
        "s": torch.rand(2, 6, 2, generator=generator),
        "z": torch.randint(0, 16, (2, 6, 2), generator=generator).to(torch.uint8),
    }
    types = {"q": "u8", "s": "f32", "z": "u8"}
    leaves = [Tensor(n, TensorType.of(types[n], *t.shape)) for n, t in tensors.items()]
    packed = step("packed", *leaves, to="uint4_g16")
    whole, turned = (evaluate_recipe(r, ModuleSource(tensors)) for r in (packed, interleaved_recipe(packed)))
    assert torch.equal(turned, torch.stack([whole[:, :3], whole[:, 3:]], 2).flatten(1, 2))
    assert np.abs(whole.numpy()).max() > 0
