"""The transformers importer: numbers of the imported module, what it looks like, and what it refuses."""

import json
import subprocess
import sys

import moec
import pytest
import torch
from moec.compiler.check.interpret import interpret
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES, Family
from moec.compiler.frontends.load import load
from moec.compiler.ops.verify import verify_module
from moec.compiler.text.printer import print_module
from moec.compiler.weights.evaluate import evaluate_recipe
from places import CONFIGS
from tiny_models import padded_batch, random_model, save, stepped

# family, changes to its tiny config, kinds of layers
CASES = {
    "mixtral": ("mixtral", {}, 1),
    "mixtral-window": ("mixtral", {"sliding_window": 4}, 1),
    "qwen3_moe-dense": ("qwen3_moe", {"mlp_only_layers": [1]}, 2),
    "qwen2_moe": ("qwen2_moe", {}, 1),
    "olmoe": ("olmoe", {}, 1),
    "deepseek_v3": ("deepseek_v3", {}, 2),
    "gpt_oss": ("gpt_oss", {}, 2),
    "llama": ("llama", {}, 1),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Return (model, its checkpoint loaded as a module, the number of layer functions it must have)."""
    family, changes, kinds = CASES[request.param]
    model = random_model(FAMILIES[family], **changes)
    return model, load(save(model, tmp_path_factory.mktemp(request.param))), kinds


def run(loaded, ids, mask, positions, states):
    """Interpret the program on its own weights."""
    return interpret(
        loaded.module, [ids, mask, positions, *states], lambda recipe: evaluate_recipe(recipe, loaded.weights)
    )


def empty_states(module, batch):
    """Return the states before the first token."""
    sizes = {"B": batch, "P": 0}
    return [
        torch.zeros([sizes.get(str(s), s) if s.is_Symbol else int(s) for s in p.type.shape])
        for p in module.main.params
        if p.type.state
    ]


def difference(actual, expected, mask):
    """Return the largest difference over real tokens, relative to the largest logit."""
    return ((actual - expected).abs()[mask.bool()].max() / expected.abs()[mask.bool()].max()).item()


def test_numbers_equal_transformers(case):
    model, loaded, _ = case
    ids, mask, positions = padded_batch(128, 9)
    expected, cache = stepped(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    with torch.no_grad():
        step = torch.randint(3, 128, (3, 1), generator=torch.Generator().manual_seed(5))
        longer = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)
        logits, *states = run(loaded, ids, mask, positions, empty_states(loaded.module, 3))
        after, *_ = run(loaded, step, longer, positions[:, -1:] + 1, states)
    reference, _ = stepped(model, cache, input_ids=step, attention_mask=longer, position_ids=positions[:, -1:] + 1)
    assert difference(logits, expected, mask) < 1e-5
    assert difference(after, reference, torch.ones(3, 1)) < 1e-5


def test_layers_of_a_kind_are_one_function(case):
    _, loaded, kinds = case
    verify_module(loaded.module)
    assert loaded.module.stage == "graph"
    assert len(loaded.module.functions) == kinds + 1
    assert len([op for op in loaded.module.main.ops if op.callee]) == 3


def test_live_module_gives_the_same_program(case):
    model, loaded, _ = case
    before = {name: t.clone() for name, t in model.state_dict().items()}
    live = load(model)
    ids, mask, positions = padded_batch(128, 5)
    states = empty_states(loaded.module, 3)
    assert torch.equal(run(live, ids, mask, positions, states)[0], run(loaded, ids, mask, positions, states)[0])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.config._attn_implementation != "moec"


def test_import_reads_no_weights(tmp_path, monkeypatch):
    folder = save(random_model(FAMILIES["mixtral"]), tmp_path)
    from moec.compiler.weights.sources.checkpoint import Checkpoint

    def fail(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "read", fail)
    assert "stack(tensor(" in print_module(load(folder).module)


def test_config_alone_gives_the_same_text(tmp_path):
    model = random_model(FAMILIES["qwen3_moe"]).to(torch.bfloat16)
    full, bare = tmp_path / "a", tmp_path / "b"
    save(model, full)
    bare.mkdir()
    (bare / "config.json").write_text((full / "config.json").read_text())
    assert load(bare).weights is None
    texts = [print_module(load(f).module).replace(str(f), "") for f in (full, bare)]
    assert texts[0] == texts[1]


def test_fp8_blocks_are_dequantized(tmp_path):
    model = random_model(FAMILIES["deepseek_v3"])
    folder = save(model, tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    quantized = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "embed" not in name and "lm_head" not in name and "mlp.gate.w" not in name:
            n, k = tensor.shape
            scales = 0.01 + torch.rand(-(-n // 16), -(-k // 16))
            codes = (tensor / scales.repeat_interleave(16, 0)[:n].repeat_interleave(16, 1)[:, :k]).to(
                torch.float8_e4m3fn
            )
            quantized |= {name: codes, f"{name}_scale_inv": scales}
            tensors[name] = codes.float() * scales.repeat_interleave(16, 0)[:n].repeat_interleave(16, 1)[:, :k]
        else:
            quantized[name] = tensor
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    save_file(quantized, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(folder)
    save_file(tensors, folder / "model.safetensors")
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    plain = load(folder)
    ids, mask, positions = padded_batch(128, 6)
    states = empty_states(plain.module, 3)
    save_file(quantized, folder / "model.safetensors")
    actual = run(load_again(loaded, folder), ids, mask, positions, states)[0]
    save_file(tensors, folder / "model.safetensors")
    expected = run(load_again(plain, folder), ids, mask, positions, states)[0]
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


def load_again(loaded, folder):
    """Return the program with the weights that lie in the folder now."""
    from moec.compiler.frontends.load import Loaded
    from moec.compiler.weights.sources.checkpoint import open_checkpoint

    return Loaded(loaded.module, open_checkpoint(folder), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "no_such_model", "architectures": ["NoSuchForCausalLM"]}, "is not known to transformers"),
        ({"num_attention_heads": "four"}, "num_attention_heads is 'four': it has to be a whole number"),
        ({"tie_word_embeddings": "yes"}, "does not accept this config"),
        ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "'hqq' are not understood"),
        ({"hidden_size": 128}, "do not belong together"),
        ({"num_hidden_layers": 4}, "has no tensor"),
        (
            {"num_hidden_layers": 2},
            r"announces num_hidden_layers 2, but the checkpoint has model\.layers\.2\..* and \d+ more",
        ),
    ],
)
def test_bad_configs_have_one_clear_error(tmp_path, change, message):
    folder = save(random_model(FAMILIES["mixtral"]), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config.update(change)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(MoecError, match=message):
        load(folder)


@pytest.mark.parametrize(("name", "lines"), [("OLMoE-1B-7B-0924", 250), ("Qwen3-235B-A22B", 250), ("DeepSeek-V3", 500)])
def test_published_configs_fit_on_a_few_pages(name, lines, tmp_path):
    dump = tmp_path / "dump"
    module = moec.compile(CONFIGS / name, stop_after="moe", dump=dump)
    assert module.stage == "moe"
    assert len(print_module(module).splitlines()) <= lines
    assert all(len(file.read_text().splitlines()) <= lines for file in dump.iterdir())


def test_remote_code_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code was run')")
    with pytest.raises(MoecError, match="comes with code of its own"):
        load(tmp_path)


def test_what_is_not_understood_is_named():
    settings = {"intermediate_size": 96, "is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}
    with pytest.raises(MoecError, match="DogeAttention builds its own attention mask"):
        load(random_model(Family("Doge", "doge", "DogeConfig", settings)))


def test_a_live_model_may_be_the_first_thing_imported():
    """What transformers has to know of this package is told it by whatever comes first in a process."""
    code = (
        "import moec, transformers; from moec.compiler.frontends.families import FAMILIES;"
        "print(moec.load(transformers.AutoModelForCausalLM.from_config(FAMILIES['llama'].config())).stage)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "graph", done.stderr


def test_a_clamp_behind_the_activation_is_read_as_such():
    """Step 3.7 clamps what silu gives in some layers; its experts are one op there too."""
    module = moec.compile(random_model(FAMILIES["step3p7"]), stop_after="moe")
    experts = [op.attributes["act"] for f in module.functions for op in f.ops if op.name == "moe.experts"]
    assert set(map(str, experts)) == {
        "gated(silu, limit=0.5, clamp_after=true)", "gated(silu)", "gated(silu, limit=0.7, clamp_after=true)",
    }  # fmt: skip
