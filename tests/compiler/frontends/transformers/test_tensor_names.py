"""Checkpoints whose tensors have other names than the family writes: every parameter is what transformers has."""

import json
import re
import shutil

import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.load import load
from moec.compiler.frontends.skeleton import build_skeleton, read_config
from moec.compiler.frontends.stored.stored import decode_checkpoint
from moec.compiler.frontends.transformers.names import map_parameters
from moec.compiler.runtime.reference import open_reference
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.checkpoint import open_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import random_model, save


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a function: family and changes -> (the model's own state, its saved folder, the saved tensors)."""
    made = {}

    def get(family, **changes):
        key = family, json.dumps(changes)
        if key not in made:
            model = random_model(FAMILIES[family], **changes)
            folder = save(model, tmp_path_factory.mktemp(family))
            tensors = {k: t for f in sorted(folder.glob("*.safetensors")) for k, t in load_file(f).items()}
            made[key] = model.state_dict(), folder, tensors
        return made[key]

    return get


def write(folder, tensors, config):
    folder.mkdir()
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, folder / "model.safetensors")
    shutil.copy(config / "config.json", folder)
    return folder


def parameters(folder):
    """Return the numbers of all parameters that the folder's tensors make."""
    skeleton = build_skeleton(read_config(folder))
    wanted = list(skeleton.model.state_dict())
    with open_checkpoint(folder) as checkpoint:
        recipes = map_parameters(
            skeleton.model, wanted, decode_checkpoint(checkpoint, None).of_layers(wanted), checkpoint.lacks
        )
        return {name: evaluate_recipe(recipe, checkpoint) for name, recipe in recipes.items()}


def assert_same(found, state, tied=False):
    """Compare with the parameters of the model that was saved, bit by bit."""
    assert state.keys() - found.keys() == ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(found[name], state[name]) for name in found)


def stacked(tensors, where=r".*"):
    """Stack experts that are stored one by one: gate and up as one, transformers' order of axes."""
    out, own = {}, {}
    for name, t in tensors.items():
        found = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)\.weight", name)
        if found and re.fullmatch(where, name):
            own.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = t
        else:
            out[name] = t
    for block, matrices in own.items():
        whole = {m: torch.stack([each[i] for i in range(len(each))]) for m, each in matrices.items()}
        gate, up, down = ("gate_proj", "up_proj", "down_proj") if "gate_proj" in whole else ("w1", "w3", "w2")
        out[f"{block}.gate_up_proj"] = torch.cat([whole[gate], whole[up]], 1)
        out[f"{block}.down_proj"] = whole[down]
    return out


def renamed(*pairs):
    def change(tensors):
        out = {}
        for name, t in tensors.items():
            for pattern, text in pairs:
                name = re.sub(pattern, text, name)
            out[name] = t
        return out

    return change


def halves(tensors):
    """Stack the experts, gate and up apart."""
    out = {}
    for name, t in stacked(tensors).items():
        if name.endswith(".gate_up_proj"):
            block = name.removesuffix("gate_up_proj")
            out[f"{block}gate_proj"], out[f"{block}up_proj"] = t.chunk(2, 1)
        else:
            out[name] = t
    return out


def one_by_one(tensors, spell="{block}.{expert}.{matrix}.weight"):
    """Cut the stacks of gpt-oss, whose experts are stored [in, out], as linear layers of one expert each."""
    out = {}
    for name, t in tensors.items():
        found = re.fullmatch(r"(.*experts)\.(\w+?)(_bias)?", name)
        if found is None:
            out[name] = t
            continue
        for expert, own in enumerate(t):
            spelled = spell.format(block=found[1], expert=expert, matrix=found[2], matrices=f"{found[2]}s")
            out[spelled.replace(".weight", ".bias") if found[3] else spelled] = own if found[3] else own.T
    return out


def each_as_one(tensors):
    """Store gate and up of each expert as one matrix."""
    out = {}
    for name, t in tensors.items():
        if re.search(r"experts\.\d+\.up_proj", name):
            continue
        if re.search(r"experts\.\d+\.gate_proj", name):
            out[name.replace("gate_proj", "gate_up_proj")] = torch.cat(
                [t, tensors[name.replace("gate_proj", "up_proj")]]
            )
        else:
            out[name] = t
    return out


def fused_linears(tensors):
    """Store q, k and v as one matrix, and gate and up of what is no expert."""
    out = dict(tensors)
    for name in tensors:
        for first, others, whole in (
            ("q_proj", ("k_proj", "v_proj"), "qkv_proj"),
            ("gate_proj", ("up_proj",), "gate_up_proj"),
        ):
            if f".{first}." in name and ".experts." not in name:
                parts = [out.pop(name.replace(first, part)) for part in (first, *others)]
                out[name.replace(first, whole)] = torch.cat(parts)
    return out


def layer_1(change):
    """Apply a change to the tensors of layer 1 alone."""

    def only(tensors):
        own = {name: t for name, t in tensors.items() if ".1." in name and "layers.1." in name}
        return {name: t for name, t in tensors.items() if name not in own} | change(own)

    return only


TO_LINEAR = (
    (r"block_sparse_moe", "mlp"), (r"(experts\.\d+)\.w1", r"\1.gate_proj"), (r"(experts\.\d+)\.w3", r"\1.up_proj"),
    (r"(experts\.\d+)\.w2", r"\1.down_proj"),
)  # fmt: skip
TO_MIXTRAL = (
    (r"mlp\.(gate\.|experts)", r"block_sparse_moe.\1"), (r"(experts\.\d+)\.gate_proj", r"\1.w1"),
    (r"(experts\.\d+)\.up_proj", r"\1.w3"), (r"(experts\.\d+)\.down_proj", r"\1.w2"),
)  # fmt: skip

# name -> (family, what is done to the tensors' names)
EXPERTS = {
    "mixtral as linear layers": ("mixtral", renamed(*TO_LINEAR)),
    "mixtral as linear layers in its own block": ("mixtral", renamed(*TO_LINEAR[1:])),
    "mixtral w1 in mlp": ("mixtral", renamed(TO_LINEAR[0])),
    "qwen3 as mixtral's": ("qwen3_moe", renamed(*TO_MIXTRAL)),
    "olmoe as mixtral's": ("olmoe", renamed(*TO_MIXTRAL)),
    "mixtral stacked": ("mixtral", stacked),
    "qwen3 stacked": ("qwen3_moe", stacked),
    "qwen3 stacked under mixtral's block": ("qwen3_moe", lambda t: renamed(TO_MIXTRAL[0])(stacked(t))),
    "lfm2 stacked in mlp": ("lfm2_moe", lambda t: renamed((r"feed_forward\.experts", "mlp.experts"))(stacked(t))),
    "vllm's w13 and w2": ("qwen3_moe", lambda t: renamed((r"experts\.gate_up_proj", "experts.w13_weight"),
                                                         (r"experts\.down_proj", "experts.w2_weight"))(stacked(t))),
    "gate and up stacked apart": ("mixtral", halves),
    "gate and up of each expert as one": ("qwen3_moe", each_as_one),
    "one layer stacked": ("qwen3_moe", layer_1(stacked)),
    "one expert as linear layers": ("mixtral", renamed((r"experts\.2\.w1", "experts.2.gate_proj"), (r"experts\.2\.w3", "experts.2.up_proj"))),
    "gpt-oss one by one": ("gpt_oss", lambda t: one_by_one(t, "{block}.{matrices}.{expert}.weight")),
    "gpt-oss one by one, the expert first": ("gpt_oss", one_by_one),
    "granite as qwen's": ("granitemoe", renamed((r"block_sparse_moe\.input_linear\.weight", "mlp.experts.gate_up_proj"),
                                                (r"block_sparse_moe\.output_linear\.weight", "mlp.experts.down_proj"),
                                                (r"block_sparse_moe\.router\.layer", "mlp.gate"))),
    "fused attention and dense layers": ("deepseek_v3", fused_linears),
    "fused attention": ("qwen3_moe", fused_linears),
    "shared experts by another word": ("qwen2_moe", renamed((r"shared_expert\.", "shared_experts."))),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_under_other_names(name, plain, tmp_path):
    family, change = EXPERTS[name]
    state, folder, tensors = plain(family)
    changed = change(tensors)
    assert changed.keys() != tensors.keys()
    assert_same(parameters(write(tmp_path / "model", changed, folder)), state, tied=family == "lfm2_moe")


# name -> (family, pairs of what is put for what)
PREFIXES = {
    "language_model": ("qwen3_moe", [(r"^", "language_model.")]),
    "model.language_model": ("qwen3_moe", [(r"^model\.", "model.language_model.")]),
    "thinker": ("mixtral", [(r"^", "thinker.")]),
    "none": ("qwen3_moe", [(r"^model\.", "")]),
    "none for one layer": ("mixtral", [(r"^model\.(layers\.1\.)", r"\1")]),
    "mixed within a layer": ("qwen3_moe", [(r"^model\.(layers\.1\.mlp)", r"language_model.model.\1")]),
    "mixed among experts": ("qwen3_moe", [(r"^model\.(layers\.\d\.mlp\.experts\.5)", r"thinker.model.\1")]),
    "compiled": ("deepseek_v3", [(r"^", "_orig_mod.")]),
    "text and images, names of text": ("qwen3_vl_moe", [(r"^model\.language_model\.", "model.")]),
    "text and images, without model": ("qwen3_vl_moe", [(r"^model\.language_model\.", "language_model.model."), (r"^lm_head", "language_model.lm_head")]),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFIXES)
def test_text_prefixes(name, plain, tmp_path):
    family, pairs = PREFIXES[name]
    state, folder, tensors = plain(family)
    changed = renamed(*pairs)(tensors)
    assert changed.keys() != tensors.keys()
    assert_same(parameters(write(tmp_path / "model", changed, folder)), state)


@pytest.mark.parametrize(
    "change", [renamed((r"^model\.(layers\.1\.)", r"\1")), layer_1(stacked)], ids=["prefix", "stacked"]
)
def test_a_layer_with_other_names_is_read_as_it_is_named(change, plain, tmp_path):
    """The program, not only the mapping: layers that are named differently are functions of their own."""
    _, folder, tensors = plain("qwen3_moe")
    loaded = load(write(tmp_path / "model", change(tensors), folder))
    layers = {f.name: f for f in loaded.module.functions}
    assert {"layer_0", "layer_1"} < layers.keys()


# --- stacked experts, the axes of each exchanged ---------------------------------------------------------------------

SIZES = {
    "no square": {"moe_intermediate_size": 48},
    "gate and up square": {"moe_intermediate_size": 32},
    "down square": {"moe_intermediate_size": 64},
}


def exchanged(tensors):
    return {n: t.transpose(1, 2) if re.search(r"experts\.(gate_up|down)_proj$", n) else t for n, t in tensors.items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_moe"])
def test_a_square_stack_is_stored_as_its_sibling(family, size, plain, tmp_path):
    """Qwen3-VL was released [in, out], which transformers tells by the shape alone; it reads square stacks wrong."""
    state, folder, tensors = plain(family, **SIZES[size])
    released = exchanged(stacked(tensors))
    assert_same(parameters(write(tmp_path / "model", released, folder)), state)
    assert_same(parameters(write(tmp_path / "own", stacked(tensors), folder)), state)


def test_a_square_stack_without_a_sibling_is_refused(plain, tmp_path):
    _, folder, tensors = plain("qwen3_vl_moe", moe_intermediate_size=32)
    apart = {}
    for name, t in exchanged(tensors).items():
        if name.endswith("experts.down_proj"):
            apart |= {f"{name.removesuffix('down_proj')}{i}.down_proj.weight": own.T for i, own in enumerate(t)}
        else:
            apart[name] = t
    with pytest.raises(MoecError, match=r"gate_up_proj is square .* which of its axes are the rows"):
        parameters(write(tmp_path / "model", apart, folder))


# --- what is missing, or there twice -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "change", "lost"),
    [
        ("qwen3_moe", dict, "model.layers.1.mlp.experts.5.up_proj.weight"),
        ("mixtral", dict, "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
        ("mixtral", renamed(*TO_LINEAR), "model.layers.1.mlp.experts.0.down_proj.weight"),
        ("qwen3_moe", each_as_one, "model.layers.0.mlp.experts.7.gate_up_proj.weight"),
        ("gpt_oss", one_by_one, "model.layers.0.mlp.experts.2.down_proj.bias"),
        ("qwen3_moe", stacked, "model.layers.1.mlp.experts.down_proj"),
        ("qwen3_moe", dict, "model.layers.1.self_attn.q_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named(family, change, lost, plain, tmp_path):
    _, folder, tensors = plain(family)
    left = dict(change(tensors))
    del left[lost]
    with pytest.raises(MoecError, match=rf"has no tensor (for )?{re.escape(lost)}\n") as caught:
        load(write(tmp_path / "model", left, folder))
    assert caught.value.todo.startswith("the closest names that are there: model.layers.")
    assert caught.value.where.startswith(str(tmp_path))


def test_numbers_of_experts_with_a_gap(plain, tmp_path):
    """As many experts as the config says, but one of them, or one matrix, has a number beyond: none takes its place."""
    _, folder, tensors = plain("qwen3_moe")
    for i, only in enumerate(("", r"\.down_proj")):
        moved = {re.sub(rf"layers\.0\.mlp\.experts\.2(?={only}.*\.weight)", "layers.0.mlp.experts.8", name): t for name, t in tensors.items()}  # fmt: skip
        with pytest.raises(MoecError, match=r"has no tensor model\.layers\.0\.mlp\.experts\.2\.\w+_proj\.weight"):
            parameters(write(tmp_path / str(i), moved, folder))


def test_a_missing_shard_without_an_index_is_named(plain, tmp_path):
    _, folder, tensors = plain("qwen3_moe")
    half = {name: t for i, (name, t) in enumerate(tensors.items()) if i % 2}
    write(tmp_path / "model", half, folder)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model-00001-of-00002.safetensors")
    with pytest.raises(MoecError) as caught:
        load(tmp_path / "model")
    assert caught.value.todo == "model-00002-of-00002.safetensors is missing: finish the download"


def test_a_size_that_is_not_the_configs_is_named_by_its_key(plain, tmp_path):
    _, folder, tensors = plain("qwen3_moe")
    name = "model.embed_tokens.weight"
    padded = {**tensors, name: torch.cat([tensors[name], torch.zeros(32, tensors[name].shape[1])])}
    with pytest.raises(MoecError, match=rf"give {name} the shape \[160, 64\], .* \[128, 64\]") as caught:
        load(write(tmp_path / "model", padded, folder))
    assert caught.value.todo.endswith("incomplete: vocab_size is 128 in config.json")


def test_tensors_of_adapters_are_named(plain, tmp_path):
    """Beside a weight, in its place, within a layer and outside of all."""
    _, folder, tensors = plain("qwen3_moe")
    name, small = "model.layers.0.self_attn.q_proj", torch.ones(4, 4)
    wrapped = {own.replace(f"{name}.", f"{name}.base_layer."): t for own, t in tensors.items()}
    for i, (more, named) in enumerate([
        ({**wrapped, f"{name}.lora_A.default.weight": small}, rf"{name}\.(base_layer|lora_A)"),
        ({**tensors, f"{name}.lora_down.weight": small}, rf"{name}\.lora_down"),
        ({**tensors, "lm_head.modules_to_save.default.weight": small}, r"lm_head\.modules_to_save"),
    ]):  # fmt: skip
        with pytest.raises(MoecError, match=rf"{named}\S* belongs to an adapter"):
            load(write(tmp_path / str(i), more, folder))


def test_two_names_for_one_weight_are_refused(plain, tmp_path):
    _, folder, tensors = plain("qwen3_moe")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    for i, other in enumerate(
        ("model.layers.1.block_sparse_moe.experts.5.w3.weight", f"language_model.{name}", name[6:])
    ):
        twice = {**tensors, other: tensors[name]}
        with pytest.raises(MoecError, match="two names for the same weight") as caught:
            parameters(write(tmp_path / str(i), twice, folder))
        assert name in caught.value.what and other in caught.value.what


def test_towers_are_not_taken_for_the_model_of_text(plain, tmp_path):
    """A tower with layers like the decoder's: it is left out, and its absence of a tensor would be noticed."""
    state, folder, tensors = plain("qwen3_moe")
    towers = {name.replace("model.", "model.audio_tower.", 1): t + 1 for name, t in tensors.items() if "layers" in name}
    assert_same(parameters(write(tmp_path / "model", {**tensors, **towers}, folder)), state)
    loaded = load(tmp_path / "model")
    assert [f.name for f in loaded.module.functions] == ["layer", "main"]


def test_the_reference_has_other_names_too(plain, tmp_path):
    """transformers would make up the weights; what is put in their place is said."""
    state, folder, tensors = plain("mixtral")
    other = write(tmp_path / "other", renamed(*TO_LINEAR)(tensors), folder)
    with open_reference(other) as reference:
        found = reference.model.state_dict()
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
        assert reference.decoding and "names that it knows" in reference.decoding.line()
    with open_reference(folder) as reference:
        assert reference.decoding is None
    less = {name: t for name, t in tensors.items() if name != "model.norm.weight"}
    with (
        pytest.raises(MoecError, match=r"lacks 1 tensors, such as model\.norm\.weight"),
        open_reference(write(tmp_path / "less", less, folder)),
    ):
        pass
