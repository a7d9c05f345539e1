"""Checkpoints of which a part is stored otherwise than the rest: numbers as if all were plain floats."""

import json
import re
import shutil

import checkpoint_formats as formats
import moec
import numpy as np
import pytest
import torch
import transformers
from moec.compiler.check.interpret import interpret
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.frontends.skeleton import build_skeleton, read_config
from moec.compiler.frontends.stored.quantization_config import read_quantization
from moec.compiler.frontends.stored.stored import decode_checkpoint
from moec.compiler.frontends.transformers.names import map_parameters
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.kept_codes import exact_formats, pack_codes, take_apart
from moec.compiler.weights.sources.checkpoint import open_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import padded_batch, random_model, save

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
CT4 = formats.ct_config("pack-quantized", type="int", num_bits=4, group_size=32)
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a function: family -> its saved folder, made once."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = save(random_model(FAMILIES[family]), tmp_path_factory.mktemp(family))
        return made[family]

    return get


# --- plain floats of several types ---------------------------------------------------------------------------------

# name -> (family, what is stored in which float where it is not bf16, functions of layers)
FLOATS = {
    "scores and sinks in f32": ("gpt_oss", {r"layers\.1\..*(sinks|router)": torch.float32, "lm_head": torch.float16}, 3),
    "one expert's gate in f32, the last layer's norms in f16": (
        "mixtral", {r"layers\.0\.block_sparse_moe\.experts\.2\.w1": torch.float32, r"layers\.2\..*norm": torch.float16}, 3,
    ),
    "dense layers in f32, a correction in f64": (
        "deepseek_v3", {r"layers\.0\.": torch.float32, r"layers\.2\..*e_score_correction_bias": torch.float64}, 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_floats_of_several_types(name, plain, tmp_path):
    family, kinds, functions = FLOATS[name]
    source = plain(family)
    stored = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        dtype = next((kind for pattern, kind in kinds.items() if re.search(pattern, key)), torch.bfloat16)
        stored[key] = tensor.to(dtype)
    assert len({t.dtype for t in stored.values()}) > 1
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {**json.loads((source / "config.json").read_text()), "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    loaded = load(tmp_path)
    assert sum(f.name.startswith("layer") for f in loaded.module.functions) <= functions
    ids, mask, positions = padded_batch(128, 7)
    states = [
        torch.zeros([{"B": 3, "P": 0}.get(str(n), n) if n.is_Symbol else int(n) for n in p.type.shape])
        for p in loaded.module.main.params
        if p.type.state
    ]
    logits = interpret(
        loaded.module, [ids, mask, positions, *states], lambda recipe: evaluate_recipe(recipe, loaded.weights)
    )[0]
    with torch.no_grad():
        wanted = model.eval()(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    assert float((logits - wanted)[real].abs().max() / wanted[real].abs().max()) < 1e-5


def test_an_integer_among_floats_is_named(plain, tmp_path):
    tensors = load_file(plain("mixtral") / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name] = (tensors[name] * 50).to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((plain("mixtral") / "config.json").read_text())
    with pytest.raises(MoecError) as caught:
        load(tmp_path)
    assert name in str(caught.value)


# --- quantized: one expert, one matrix or one layer otherwise than its siblings --------------------------------------


def quantized(write, otherwise, where):
    """Return a function that quantizes linears as `write` does, and those that `where` matches as `otherwise` does."""

    def choose(name, weight):
        if name.endswith(("lm_head", "embed_tokens", ".gate", "norm")):
            return None
        return (otherwise if re.search(where, name) else write)(weight)

    return choose


def nothing(weight):
    return None


def bf16(weight):
    rounded = torch.from_numpy(weight).bfloat16()
    return {"weight": rounded}, rounded.float().numpy()


def ct_two_widths(bits=8, group=32):
    """Return a config of compressed-tensors in which expert 1 has codes of another width or group."""
    second = {"targets": [r"re:.*experts\.1\..*"], "weights": {"type": "int", "num_bits": bits, "group_size": group}}
    groups = {"group_1": second, **CT4["config_groups"]}
    return {**CT4, "config_groups": groups}


# name -> (quantization_config, how most weights are written, how some are, which, the format that holds both exactly)
MIXED = {
    "gptq, an expert in bf16": (GPTQ, formats.gptq, bf16, r"layers\.1\..*experts\.3\.", None),
    "gptq, an expert in f32, all layers": (GPTQ, formats.gptq, nothing, r"experts\.0\.", None),
    "gptq, an expert in 8 bits": (
        {**GPTQ, "dynamic": {r"+:.*experts\.2\..*": {"bits": 8}}}, formats.gptq, lambda w: formats.gptq(w, bits=8),
        r"experts\.2\.", "uint8_g32",
    ),
    "gptq, an expert in groups of 16": (
        {**GPTQ, "dynamic": {r"+:.*experts\.2\..*": {"group_size": 16}}}, formats.gptq,
        lambda w: formats.gptq(w, group=16), r"experts\.2\.", "uint4_g16",
    ),
    "awq, the last layer's experts in bf16": (AWQ, formats.awq, bf16, r"layers\.2\..*experts", "uint4_g32"),
    "ct, an expert in 8 bits": (
        ct_two_widths(), formats.ct_packed, lambda w: formats.ct_packed(w, bits=8), r"experts\.1\.", "int8_g32",
    ),
    "ct, the up of an expert in groups of 16": (
        ct_two_widths(4, 16), formats.ct_packed, lambda w: formats.ct_packed(w, group=16), r"experts\.1\.", "int4_g16",
    ),
    "fp8, an expert in bf16": (
        FP8, lambda w: formats.fp8(w, (16, 16), "weight_scale_inv"), bf16, r"layers\.1\..*experts\.3\.", None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MIXED)
def mixed(request, plain, tmp_path_factory):
    """Return (the name of the case, the quantized folder, the numbers that its codes stand for)."""
    config, write, otherwise, where, _ = MIXED[request.param]
    folder = tmp_path_factory.mktemp("mixed")
    meant = shutil.copytree(plain("mixtral"), folder / "meant")
    formats.quantize_folder(folder / "quantized", meant, config, quantized(write, otherwise, where))
    return request.param, folder / "quantized", load_file(meant / "model.safetensors")


def recipes_of(folder, checkpoint):
    config = read_config(folder)
    quantization = read_quantization(config, folder)
    model = build_skeleton(config).model
    wanted = list(model.state_dict())
    return map_parameters(
        model, wanted, decode_checkpoint(checkpoint, quantization).of_layers(wanted), checkpoint.lacks
    )


def test_experts_stored_otherwise_mean_their_numbers(mixed):
    """Bit by bit what the codes were written for, stacked by hand; where one format holds all of them, no codes change."""
    name, folder, meant = mixed
    exact = MIXED[name][-1]
    with open_checkpoint(folder) as checkpoint:
        recipes = recipes_of(folder, checkpoint)
        for layer in range(3):
            block = f"model.layers.{layer}.block_sparse_moe.experts"
            gate, up, down = (
                torch.stack([meant[f"{block}.{expert}.{matrix}.weight"] for expert in range(4)])
                for matrix in ("w1", "w3", "w2")
            )
            for parameter, wanted in (("gate_up_proj", torch.cat([gate, up], 1)), ("down_proj", down)):
                recipe = recipes[f"model.layers.{layer}.mlp.experts.{parameter}"]
                assert torch.equal(evaluate_recipe(recipe, checkpoint).float(), wanted)
                if exact and not (name.startswith("awq") and layer == 2):
                    codes = take_apart(recipe)
                    format = next(exact_formats(codes))
                    assert format.name == exact
                    assert torch.equal(evaluate_recipe(pack_codes(codes, format), checkpoint), wanted)


def test_codes_that_no_format_holds_are_near_and_said(plain, tmp_path):
    """One expert of a layer in bf16: its op goes to 8 bits, which the figures say; the other layers keep their codes."""
    config, write, otherwise, where, _ = MIXED["gptq, an expert in bf16"]
    meant = shutil.copytree(plain("mixtral"), tmp_path / "meant")
    folder, _ = formats.quantize_folder(tmp_path / "quantized", meant, config, quantized(write, otherwise, where))
    artifact = moec.compile(folder, out=tmp_path / "a", accuracy="exact")
    kept = artifact.manifest["figures"]["kept"]
    assert kept["layer_0"] == {"exact": ["uint4_g32"]}
    assert kept["layer_1"] == {"exact": ["uint4_g32"], "near": ["int8_g32"]}
    model = transformers.AutoModelForCausalLM.from_pretrained(meant, dtype=torch.float32).eval()
    ids, mask, positions = padded_batch(128, 9)
    found, _ = artifact.session(spinning=False, accuracy="exact").step(ids.numpy(), mask.numpy(), positions.numpy())
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, position_ids=positions).logits
    difference = (torch.from_numpy(found) - wanted)[mask.bool()].abs() / wanted[mask.bool()].abs().max()
    assert float(difference.median()) < 0.01 and np.isfinite(found).all()


# --- quantized experts under other names -----------------------------------------------------------------------------

LINEAR = (
    (r"block_sparse_moe", "mlp"), (r"(experts\.\d+)\.w1", r"\1.gate_proj"), (r"(experts\.\d+)\.w3", r"\1.up_proj"),
    (r"(experts\.\d+)\.w2", r"\1.down_proj"),
)  # fmt: skip
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def each_as_one(tensors):
    """Put the rows of an expert's gate and up into one matrix: every part of both lies along the rows."""
    out = {}
    for name, tensor in tensors.items():
        if ".w1." in name:
            axis = 1 if name.endswith("qweight") or name.endswith(("qzeros", ".scales")) else 0
            both = tensor, tensors[name.replace(".w1.", ".w3.")]
            whole = both[0] if name.endswith("g_idx") or tensor.dim() == 0 else torch.cat(both, axis)
            out[name.replace(".w1.", ".gate_up_proj.").replace("block_sparse_moe", "mlp")] = whole
        elif ".w3." not in name:
            out[name.replace(".w2.", ".down_proj.").replace("block_sparse_moe.experts", "mlp.experts")] = tensor
    return out


def stacked(tensors):
    """Stack the parts of the experts: `experts.gate_up_proj`, `experts.gate_up_proj_scale_inv` and the like."""
    own, out = {}, {}
    for name, tensor in each_as_one(tensors).items():
        found = re.fullmatch(r"(.*experts)\.(\d+)\.(gate_up_proj|down_proj)\.weight(\w*)", name)
        if found:
            own.setdefault(f"{found[1]}.{found[3]}{found[4]}", []).append((int(found[2]), tensor))
        else:
            out[name] = tensor
    return out | {name: torch.stack([t for _, t in sorted(parts, key=lambda p: p[0])]) for name, parts in own.items()}


def renamed(tensors):
    out = {}
    for name, tensor in tensors.items():
        for pattern, text in LINEAR:
            name = re.sub(pattern, text, name)
        out[f"language_model.{name}"] = tensor
    return out


RENAMED = {
    "gptq as linear layers": (GPTQ, formats.gptq, renamed),
    "awq as linear layers": (AWQ, formats.awq, renamed),
    "ct as linear layers": (CT4, formats.ct_packed, renamed),
    "nvfp4 as linear layers": (NVFP4, formats.nvfp4, renamed),
    "gptq, gate and up as one": (GPTQ, formats.gptq, each_as_one),
    "fp8, gate and up as one": (FP8, lambda w: formats.fp8(w, (16, 16), "weight_scale_inv"), each_as_one),
    "fp8 stacked": (FP8, lambda w: formats.fp8(w, (16, 16), "weight_scale_inv"), stacked),
    "mxfp4 stacked": (formats.ct_config("mxfp4-pack-quantized", type="float", num_bits=4), formats.mxfp4, stacked),
}


@pytest.mark.parametrize("name", RENAMED)
def test_quantized_experts_under_other_names(name, plain, tmp_path):
    config, write, change = RENAMED[name]
    meant = shutil.copytree(plain("mixtral"), tmp_path / "meant")
    folder, _ = formats.quantize_folder(tmp_path / "quantized", meant, config, quantized(write, nothing, "nothing"))
    before = load_file(folder / "model.safetensors")
    after = {key: t.contiguous().clone() for key, t in change(before).items()}
    assert before.keys() != after.keys()
    save_file(after, folder / "model.safetensors")
    numbers = load_file(meant / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        recipes = recipes_of(folder, checkpoint)
        block = "model.layers.1.block_sparse_moe.experts"
        gate, up, down = (
            torch.stack([numbers[f"{block}.{e}.{m}.weight"] for e in range(4)]) for m in ("w1", "w3", "w2")
        )
        for parameter, wanted in (("gate_up_proj", torch.cat([gate, up], 1)), ("down_proj", down)):
            assert torch.equal(
                evaluate_recipe(recipes[f"model.layers.1.mlp.experts.{parameter}"], checkpoint).float(), wanted
            )
        for recipe in recipes.values():
            evaluate_recipe(recipe, checkpoint)
