"""DeepSeek-V4 checkpoints: official names with FP8 and FP4 codes, transformers' own, and what is refused."""

import json

import moec
import numpy as np
import pytest
import torch
from deepseek_v4_checkpoint import official_config, write_official
from deepseek_v4_models import WIDE, Interpreted, difference, tokens
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.text.printer import print_module
from moec.compiler.weights.sources.checkpoint import Checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import random_model, save, stepped


@pytest.fixture(scope="module", params=["official", "base"])
def written(request, tmp_path_factory):
    """Return (model with the numbers that the codes stand for, its checkpoint folder in the official dialect)."""
    base = request.param == "base"
    model = random_model(FAMILIES["deepseek_v4"], **WIDE)
    folder = tmp_path_factory.mktemp("v4") / request.param
    return model, write_official(model, folder, official_config(model, base=base), base=base)


def expected_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True).logits


def test_official_checkpoint(written):
    model, folder = written
    runner = Interpreted(load(folder))
    ids = tokens(2, 133)
    found, states = runner.step(ids[:, :130], 0, runner.start(2))
    more, _ = runner.step(ids[:, 130:], 130, states)
    assert difference(torch.cat([found, more], 1), expected_logits(model, ids)) < 1e-5


def test_parts_stored_otherwise_than_the_rest(tmp_path):
    """One expert, one projection and one norm as plain floats among codes: the numbers are the same, the storage is not."""
    model = random_model(FAMILIES["deepseek_v4"], **WIDE)
    folder = write_official(model, tmp_path / "mixed", official_config(model))
    tensors = load_file(folder / "model.safetensors")
    experts, state = model.model.layers[1].mlp.experts, model.state_dict()
    gate, up = experts.gate_up_proj.detach()[3].chunk(2)
    floats = {
        f"layers.1.ffn.experts.3.{w}": t for w, t in (("w1", gate), ("w3", up), ("w2", experts.down_proj.detach()[3]))
    }
    floats["layers.2.attn.wq_a"] = state["model.layers.2.self_attn.q_a_proj.weight"]
    for name, numbers in floats.items():
        del tensors[f"{name}.scale"]
        tensors[f"{name}.weight"] = numbers.to(torch.bfloat16).clone()
        assert torch.equal(tensors[f"{name}.weight"].float(), numbers)
    tensors["layers.3.attn_norm.weight"] = tensors["layers.3.attn_norm.weight"].float()
    save_file(tensors, folder / "model.safetensors")
    loaded, ids = load(folder), tokens(2, 20)
    runner = Interpreted(loaded)
    assert difference(runner.step(ids, 0, runner.start(2))[0], expected_logits(model, ids)) < 1e-5

    config = json.loads((folder / "config.json").read_text())
    fewer = {"num_hidden_layers": 3, "compress_ratios": [*config["compress_ratios"][:3], 0]}
    (folder / "config.json").write_text(json.dumps({**config, **fewer}))
    with pytest.raises(MoecError, match=r"announces num_hidden_layers 3 .*the checkpoint has layers\.3\.attn"):
        load(folder)


def test_nvfp4_experts_of_modelopt(tmp_path):
    """Groups of 16 with a scale E4M3 and one of the matrix; a config alone says the same."""
    model = random_model(FAMILIES["deepseek_v4"], **WIDE)
    config = official_config(model)
    config["quantization_config"] |= {"moe_quant_algo": "NVFP4", "quant_algo": "MIXED_PRECISION"}
    folder = write_official(model, tmp_path / "nvfp4", config, nvfp4=True)
    loaded, ids = load(folder), tokens(2, 20)
    runner = Interpreted(loaded)
    assert difference(runner.step(ids, 0, runner.start(2))[0], expected_logits(model, ids)) < 1e-5
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/config.json").write_text((folder / "config.json").read_text())
    alone = load(tmp_path / "alone").module
    assert print_module(alone).replace(str(tmp_path / "alone"), "").replace(", i8[", ", u8[") == print_module(
        loaded.module
    ).replace(str(folder), "").replace(", i8[", ", u8[")


def test_artifact_of_an_official_checkpoint(written, tmp_path):
    model, folder = written
    artifact = moec.compile(folder, out=tmp_path / "made", quantize="f32")  # its FP8 has no exact format here
    session, states = artifact.session(spinning=False), None
    ids, past, cache, worst = tokens(2, 300), 0, None, 0.0
    for part in (120, *[1] * 20, 110, *[1] * 50):  # across the window and the first two entries of 128 tokens
        step = ids[:, past : past + part].numpy()
        positions = np.tile(np.arange(past, past + part), (2, 1))
        logits, states = session.step(step, np.ones((2, past + part), np.int64), positions, states)
        expected, cache = stepped(model, cache, input_ids=ids[:, past : past + part])
        worst = max(worst, difference(torch.from_numpy(logits), expected))
        past += part
    assert worst < 1e-4


def test_names_of_every_dialect_give_the_same_program(tmp_path):
    model = random_model(FAMILIES["deepseek_v4"], **WIDE)
    saved = load(save(model, tmp_path / "saved"))
    live = load(model)
    ids = tokens(1, 20)
    logits = [Interpreted(loaded).step(ids, 0, Interpreted(loaded).start(1))[0] for loaded in (saved, live)]
    assert torch.equal(*logits)
    assert [len(f.ops) for f in saved.module.functions] == [len(f.ops) for f in live.module.functions]


def test_import_reads_no_weights(written, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "read", fail)
    assert "dequantize(" in print_module(load(written[1]).module)


def test_config_alone_gives_the_same_program(written, tmp_path):
    folder = written[1]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    texts = [print_module(load(f).module).replace(str(f), "") for f in (folder, tmp_path)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2"),
        ({"num_experts_per_tok": 3}, r"tid2eid is i64\[128, 2\], \[128, 3\] is wanted"),
        ({"sliding_window": 0}, "a window of 0"),
        ({"hidden_size": 128}, "is wanted"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            r"one scale for a block \[64, 64\]",
        ),
    ],
)
def test_a_config_that_does_not_fit_says_why(written, tmp_path, change, message):
    config = json.loads((written[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").symlink_to(written[1] / "model.safetensors")
    with pytest.raises(MoecError, match=message) as error:
        load(tmp_path)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("name", ["embed.weight", "head.weight", "norm.weight", "hc_head_fn", "layers.0.hc_attn_fn"])
def test_a_renamed_tensor_is_named(written, tmp_path, name):
    """The dialect is what most names are: no single tensor's absence makes the others look foreign."""
    tensors = load_file(written[1] / "model.safetensors")
    tensors[f"x{name}"] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((written[1] / "config.json").read_bytes())
    with pytest.raises(MoecError) as caught:
        load(tmp_path)
    assert name in str(caught.value) and caught.value.exit_code == 2


def test_a_missing_tensor_is_named(written, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(written[1] / "model.safetensors")
    tensors.pop("layers.2.attn.compressor.ape")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((written[1] / "config.json").read_text())
    with pytest.raises(MoecError, match=r"no tensor layers\.2\.attn\.compressor\.ape"):
        load(tmp_path)
