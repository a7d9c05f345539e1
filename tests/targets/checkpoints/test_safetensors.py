"""Checkpoints that target safetensors writes: read by transformers, by the format's own library, and by moec again."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from moec.compiler import driver
from moec.compiler.errors import MoecError
from moec.compiler.formats.packing import unpack_bits
from moec.compiler.formats.table import format_of
from moec.compiler.frontends.families import FAMILIES
from moec.targets.checkpoints.layouts import GPTQ, with_form
from moec.targets.checkpoints.patterns import module_patterns
from places import ROOT
from safetensors.torch import load_file
from tiny_models import padded_batch, random_model, save

NAMED = "experts=int4_g32,attention=int4_g16,shared=int4_g16,dense=int4_g32,head=int4_g32,embedding=f32"

TINY = ROOT / "examples" / "tiny-moe"


def logits_of(artifact):
    ids, mask, positions = (t.numpy() for t in padded_batch(128, 9))
    found, _ = artifact.session(spinning=False, accuracy="exact").step(ids, mask, positions)
    return found[mask > 0]


def transformers_logits(folder):
    """Return what transformers computes with a checkpoint whose weights it decodes."""
    decoded = transformers.CompressedTensorsConfig(dequantize=True)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=decoded, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    ids, mask, positions = padded_batch(128, 9)
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions).logits.numpy()[mask.numpy() > 0]


def exported(tmp_path, family, spec, **options):
    plain = save(random_model(FAMILIES[family]), tmp_path / "plain")
    return plain, driver.compile(plain, "safetensors", tmp_path / "out", quantize=spec, **options).folder


FAMILIES_HERE = [
    "qwen3_moe", *(pytest.param(f, marks=pytest.mark.long) for f in ("mixtral", "deepseek_v3")),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_transformers_and_moec_read_the_same_numbers(tmp_path, family):
    plain, out = exported(tmp_path, family, NAMED)
    again = driver.compile(out, "cpu", tmp_path / "again", kv="f32")
    if family == "deepseek_v3":  # absorbed heads are cut out of kv_b_proj, whose codes then are near and not the same
        again = driver.compile(out, "cpu", tmp_path / "again", quantize="experts=f32,attention=f32,shared=f32,dense=f32,head=f32,embedding=f32", kv="f32")  # fmt: skip
    else:
        wanted = logits_of(driver.compile(plain, "cpu", tmp_path / "cpu", quantize=NAMED, kv="f32"))
        assert np.array_equal(logits_of(again), wanted)
    found = transformers_logits(out)
    assert np.abs(found - logits_of(again)).max() < 1e-4 * np.abs(found).max()


def test_what_is_not_quantized_is_as_it_was(tmp_path):
    plain, out = exported(tmp_path, "mixtral", "experts=int4_g32,attention=f32,head=f32,embedding=f32")
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, out))
    kept = [name for name in before if ".experts." not in name]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    packed = {name.rpartition(".")[0] for name in after if name.endswith("weight_packed")}
    assert packed == {name.removesuffix(".weight") for name in before if ".experts." in name}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == sorted(config["ignore"]) and "re:^lm_head$" in config["ignore"]
    assert not (out / "program.moir").exists()


def test_mxfp4_codes_are_those_of_the_library(tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    plain, out = exported(tmp_path, "qwen3_moe", "experts=mxfp4,attention=f32,head=f32,embedding=f32")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    module = "model.layers.0.mlp.experts.3.down_proj"
    tensors = {n.removeprefix(f"{module}."): t for n, t in load_file(out / "model.safetensors").items() if module in n}
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    decoded = compressor.decompress(tensors, QuantizationScheme(**group))["weight"].float()
    format = format_of("mxfp4")
    weight = load_file(plain / "model.safetensors")[f"{module}.weight"]
    assert torch.equal(decoded, format.decode(format.encode(weight), weight.shape[1]))


@pytest.mark.parametrize("name", ["int4_g32", "uint4_g32", "int8_g32", "uint2_g64"])
def test_gptq_is_read_by_its_definition(name):
    format, generator = format_of(name), torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=generator)
    parts = format.encode(weight)
    stored = {leaf: t.numpy() for leaf, t in GPTQ.fill(parts, format, 32, 128).items()}
    assert {leaf: t.shape for leaf, t in stored.items()} == {
        n: s for n, (_, s) in GPTQ.tensors(format, 32, 128).items()
    }
    bits, each = format.bits, 32 // format.bits
    shifts = np.arange(each) * bits
    codes = ((stored["qweight"].view(np.uint32)[:, None, :] >> shifts[:, None]) & ((1 << bits) - 1)).reshape(128, 32)
    zeros = ((stored["qzeros"].view(np.uint32)[..., None] >> shifts) & ((1 << bits) - 1)).reshape(-1, 32)
    groups = stored["g_idx"]
    numbers = (codes - ((zeros + 1.0) % (1 << bits))[groups]) * stored["scales"].astype(np.float32)[groups]
    wanted = format.decode(parts, 128).numpy()
    assert np.abs(numbers.T - wanted).max() < 1e-3 * np.abs(wanted).max()  # scales are f16 there
    signed = unpack_bits(parts["codes"], bits, 128).numpy()
    assert np.array_equal(codes.T, signed)


@pytest.mark.long
def test_a_gptq_checkpoint_is_read_again(tmp_path):
    plain, out = exported(tmp_path, "qwen3_moe", NAMED, options={"layout": "gptq"})
    wanted = logits_of(driver.compile(plain, "cpu", tmp_path / "cpu", quantize=NAMED))
    again = driver.compile(out, "cpu", tmp_path / "again")
    assert again.manifest["figures"]["kept"]["layer"] == {"exact": ["int4_g16", "int4_g32"]}
    assert np.abs(logits_of(again) - wanted).max() < 2e-3 * np.abs(wanted).max()


def test_smaller_groups_and_zero_points_hold_the_same_codes():
    format, form = format_of("int4_g128"), format_of("uint4_g32")
    parts = format.encode(torch.randn(8, 256, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(form.decode(with_form(parts, format, form, 256), 256), format.decode(parts, 256))


def test_patterns_match_what_they_stand_for():
    import re

    modules = {f"m.{layer}.experts.{e}.up": layer > 1 for layer in range(12) for e in range(3)} | {"m.1.gate": None}
    modules |= {f"h.{layer}.up.{e}": e == layer for layer in range(2) for e in range(2)}
    found = module_patterns(modules)
    assert sum(map(len, found.values())) < len(modules)
    for key, patterns in found.items():
        expressions = [re.compile(p.removeprefix("re:")) for p in patterns]
        assert {n for n in modules if any(e.match(n) for e in expressions)} == {
            n for n, k in modules.items() if k == key
        }


@pytest.mark.parametrize(
    ("family", "spec", "options", "what"),
    [
        ("mixtral", "experts=grid4_g32", {}, "compressed-tensors has no layout for grid4_g32"),
        ("mixtral", "experts=uint4_g32", {}, "without zero points only"),
        ("mixtral", "int4", {"layout": "awq"}, "there is no layout awq"),
        ("mixtral", "int4", {"layer": "awq"}, "has no option layer"),
        ("gpt_oss", "experts=int4_g32,head=f32,embedding=f32", {}, "cannot go back into a checkpoint"),
    ],
)
def test_what_has_no_place_is_refused(tmp_path, family, spec, options, what):
    with pytest.raises(MoecError, match=what):
        exported(tmp_path, family, spec, options=options)
    assert not (tmp_path / "out").exists()


def test_it_does_not_run_by_itself(tmp_path):
    from moec.targets import load_artifact

    with pytest.raises(MoecError, match="does not run by itself"):
        load_artifact("safetensors", tmp_path)


def divergence(wanted, found):
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.long
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_what_is_lost_is_what_the_artifact_loses(tmp_path, method):
    """A tied head, and norms and rows that AWQ scales: transformers' divergence is that of the artifact on the CPU."""
    spec = f"int4,symmetric=true,embedding=f32,method={method}"
    text = tmp_path / "text.txt"
    text.write_text((TINY / "heldout.txt").read_text("utf-8")[:4000], "utf-8")
    given = {"quantize": spec, **({"calibration": text} if method != "rtn" else {})}
    out = driver.compile(TINY, "safetensors", tmp_path / "out", **given).folder
    cpu = driver.compile(TINY, "cpu", tmp_path / "cpu", **given)
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(TINY)(text.read_text("utf-8")).input_ids[:256]])
    decoded = transformers.CompressedTensorsConfig(dequantize=True)

    def measured(folder, **options):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        with torch.no_grad():
            return model(ids).logits.log_softmax(-1)

    wanted, found = measured(TINY), measured(out, quantization_config=decoded)
    tokens = ids.numpy()
    logits, _ = cpu.session(spinning=False, accuracy="exact").step(tokens, np.ones_like(tokens), np.arange(256)[None])
    own = divergence(wanted, torch.from_numpy(logits.copy()).log_softmax(-1))
    assert math.isclose(divergence(wanted, found), own, rel_tol=0.05)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
