"""Quantized sources are decoded as their config says, or refused by the name of a tensor: groups, zero points, scales.

Expected numbers are those that checkpoint_formats.py computes from the layouts' definitions, and what is said beside them.
"""

import json

import checkpoint_formats as formats
import numpy as np
import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.frontends.stored.quantization_config import read_quantization
from moec.compiler.frontends.stored.stored import decode_checkpoint
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.checkpoint import open_checkpoint
from stored_checkpoint import Config, write_and_decode

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
AUTO = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
INT4 = {"type": "int", "num_bits": 4, "strategy": "group"}
NAME = "model.layers.0.mlp.up_proj"


def weight(rows=40, columns=96, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def decoded(folder, tensors, quantization):
    """Write tensors by their names and return the weights, as numbers by name."""
    recipes, checkpoint, _ = write_and_decode(folder, tensors, quantization)
    return {name: evaluate_recipe(r, checkpoint).numpy() for name, r in recipes.items()}


def module(leaves, name=NAME):
    return {f"{name}.{leaf}": t for leaf, t in leaves.items()}


def check(folder, leaves, meant, quantization, name=NAME):
    assert np.array_equal(decoded(folder, module(leaves, name), quantization)[f"{name}.weight"], meant)


def refused(folder, leaves, quantization, message, name=NAME):
    with pytest.raises(MoecError, match=message) as caught:
        decoded(folder, module(leaves, name), quantization)
    assert caught.value.exit_code == 2


# --- groups --------------------------------------------------------------------------------------------------------


GROUPS = {
    "gptq": (lambda w, g: formats.gptq(w, group=g), lambda g: {**GPTQ, "group_size": g}),
    "gptq 3 bits": (lambda w, g: formats.gptq(w, bits=3, group=g), lambda g: {**GPTQ, "bits": 3, "group_size": g}),
    "awq": (lambda w, g: formats.awq(w, group=g), lambda g: {**AWQ, "group_size": g}),
    "ct": (
        lambda w, g: formats.ct_packed(w, group=g, zeros=True),
        lambda g: formats.ct_config("pack-quantized", **INT4, group_size=g, symmetric=False),
    ),
    "fp8 blocks": (
        lambda w, g: formats.fp8(w, (32, g), "weight_scale_inv"), lambda g: {"quant_method": "fp8", "weight_block_size": [32, g]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("group", [32, 64, 80, 96])
def test_group_size_decides_where_the_last_group_is_short(name, group, tmp_path):
    """192 inputs; 80 and 128 leave a short group, and none of the tensors says how wide a group is."""
    write, config = GROUPS[name]
    leaves, meant = write(weight(32, 192), group)
    leaves.pop("g_idx", None)
    check(tmp_path, leaves, meant, config(group))


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("said", [32, 128, 192])
def test_a_group_size_that_the_scales_contradict_is_refused(name, said, tmp_path):
    """g_idx says which group each input has: with it there is nothing to guess, and the numbers are right."""
    write, config = GROUPS[name]
    leaves, meant = write(weight(32, 192), 64)
    if leaves.pop("g_idx", None) is not None:
        (tmp_path / "indexed").mkdir()
        indexed, _ = write(weight(32, 192), 64)
        check(tmp_path / "indexed", indexed, meant, config(said))
    refused(tmp_path, leaves, config(said), rf"up_proj\.(\w*scale\w*) is .*\b{32 if 'fp8' in name else ''}")


@pytest.mark.parametrize("said", [16, 64])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_groups_of_fp4_that_are_not_the_configs(name, said, tmp_path):
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": said}
    leaves, meant = formats.nvfp4(weight(8, 128))
    if name == "mxfp4":
        quantization = formats.ct_config("mxfp4-pack-quantized", type="float", num_bits=4, group_size=said)
        leaves, meant = formats.mxfp4(weight(8, 128))
    if said == 16 and name == "nvfp4":
        check(tmp_path, leaves, meant, quantization)
    else:
        refused(tmp_path, leaves, quantization, rf"up_proj\.weight_scale is .*groups of {said}")


@pytest.mark.parametrize("name", ["gptq", "awq", "ct"])
def test_one_group_a_row(name, tmp_path):
    write, config = GROUPS[name]
    leaves, meant = write(weight(32, 96), 96)
    check(tmp_path, leaves, meant, config(-1))


def test_scales_of_fp8_with_four_axes(tmp_path):
    """ModelOpt's FP8_PB_WO: [rows / 128, 1, columns / 128, 1], also where blocks are cut at the edges."""
    for i, (rows, columns) in enumerate(((256, 128), (200, 300), (64, 64))):
        shape = (-(-rows // 128), 1, -(-columns // 128), 1)
        leaves, meant = formats.fp8(weight(rows, columns), (128, 128), shape=shape)
        folder = tmp_path / str(i)
        folder.mkdir()
        check(folder, leaves, meant, {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"})


@pytest.mark.parametrize(
    ("block", "shape", "quantization"),
    [
        ((32, 32), None, {"quant_method": "fp8"}),
        ((0, 0), (), {"quant_method": "fp8", "weight_block_size": [32, 32]}),
        ((1, 0), (64, 1), formats.ct_config("float-quantized", type="float", num_bits=8, strategy="tensor")),
        ((0, 0), (1,), formats.ct_config("float-quantized", type="float", num_bits=8, strategy="channel")),
    ],
)
def test_scales_that_belong_to_something_else_than_the_config_says(block, shape, quantization, tmp_path):
    leaves, _ = formats.fp8(weight(64, 96), block, shape=shape)
    refused(tmp_path, leaves, quantization, r"up_proj\.weight_scale is f32")


# --- zero points, bits and orders of GPTQ ----------------------------------------------------------------------------


def symmetric(bits=4, stored=None, rows=64, columns=96):
    """Return symmetric GPTQ leaves whose zero points are stored as a number, and what they mean."""
    rng = np.random.default_rng(1)
    codes, half = rng.integers(0, 1 << bits, (rows, columns)), 1 << (bits - 1)
    scales = rng.uniform(0.01, 0.1, (rows, columns // 32)).astype(np.float16)
    zeros = np.full((rows, columns // 32), half - 1 if stored is None else stored)
    leaves = {
        "qweight": formats.stream(codes.T, bits, 0), "qzeros": formats.stream(zeros.T, bits, 1),
        "scales": torch.from_numpy(scales.T.copy()),
    }  # fmt: skip
    meant = formats.numbers(codes, scales, np.full_like(zeros, half), np.arange(columns) // 32)
    return leaves, meant


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stored", [-1, 0])
@pytest.mark.parametrize("said", [{}, {"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}])
def test_sym_decides_about_zero_points(bits, stored, said, tmp_path):
    leaves, meant = symmetric(bits, (1 << (bits - 1)) + stored)
    for i, sym in enumerate(({"sym": True}, {})):
        folder = tmp_path / str(i)
        folder.mkdir()
        own = {key: value for key, value in GPTQ.items() if key != "sym"}
        check(folder, leaves, meant, {**own, "bits": bits, **sym, **said})


def test_zero_points_that_sym_excludes(tmp_path):
    for i, leaves in enumerate((symmetric(stored=3)[0], formats.gptq(weight(64, 96))[0])):
        folder = tmp_path / str(i)
        folder.mkdir()
        refused(folder, leaves, {**GPTQ, "sym": True}, r"up_proj\.qzeros is not 8 \(or 7\) everywhere")


@pytest.mark.parametrize("zeros", [None, torch.zeros(0, dtype=torch.int32), torch.zeros(3, 0, dtype=torch.int32)])
def test_zero_points_that_are_not_there(zeros, tmp_path):
    leaves, meant = symmetric()
    leaves = {**leaves, "qzeros": zeros} if zeros is not None else {k: v for k, v in leaves.items() if k != "qzeros"}
    (tmp_path / "a").mkdir()
    check(tmp_path, leaves, meant, {**GPTQ, "sym": True})
    refused(tmp_path / "a", leaves, GPTQ, r"up_proj\.qzeros is missing or empty, and `sym` is not true")


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_the_version_of_gptq_under_either_name(key, tmp_path):
    leaves, meant = formats.gptq(weight(32, 128), version=2)
    check(tmp_path, leaves, meant, {**GPTQ, key: "gptq_v2"})
    both = {**GPTQ, "checkpoint_format": "gptq", "format": "gptq_v2"}
    refused(tmp_path, leaves, both, "checkpoint_format 'gptq and gptq_v2'")
    refused(tmp_path, leaves, {**AWQ, key: "gemv_fast"}, "'gemv_fast' are not understood")


@pytest.mark.parametrize("index", [torch.zeros(128, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)])
def test_a_g_idx_that_says_nothing(index, tmp_path):
    """Kernels take an index of zeros for none, where there are several groups."""
    leaves, meant = formats.gptq(weight(32, 128))
    check(tmp_path, {**leaves, "g_idx": index}, meant, GPTQ)
    refused(tmp_path, {**leaves, "g_idx": index}, {**GPTQ, "desc_act": True}, r"g_idx is missing, empty or zero")


DYNAMIC = {
    r"+:.*\.layers\.0\.mlp\.up": {"bits": 8, "group_size": 64},
    r".*up_proj": {"bits": 2},
    r"-:.*\.gate$": {},
    r"down_proj": {"bits": 8},
}


@pytest.mark.parametrize(
    ("name", "bits", "group"),
    [
        ("model.layers.0.mlp.up_proj", 8, 64),  # the first pattern wins
        ("model.layers.1.mlp.up_proj", 2, 32),
        ("model.layers.1.mlp.down_proj", 4, 32),  # patterns match from the start of the name
        ("model.layers.0.mlp.experts.3.gate_proj", 4, 32),
    ],
)
def test_bits_and_groups_of_modules_by_gptqmodels_dynamic(name, bits, group, tmp_path):
    leaves, meant = formats.gptq(weight(32, 128), bits=bits, group=group)
    check(tmp_path, leaves, meant, {**GPTQ, "dynamic": DYNAMIC}, name)


def test_codes_of_a_module_that_dynamic_leaves_out(tmp_path):
    leaves, _ = formats.gptq(weight(32, 128))
    refused(tmp_path, leaves, {**GPTQ, "dynamic": DYNAMIC}, "mlp.gate.qweight holds codes, but .* unquantized", "model.layers.2.mlp.gate")  # fmt: skip
    broken = {**GPTQ, "dynamic": {"+:(": {"bits": 8}}}
    refused(tmp_path, leaves, broken, "is not a regular expression")


@pytest.mark.parametrize("key", ["bits", "group_size"])
@pytest.mark.parametrize("value", [None, 0, "4", 4.5, True, [4]])
def test_values_of_a_config_that_are_no_sizes(key, value, tmp_path):
    leaves, _ = formats.gptq(weight(32, 128))
    refused(tmp_path, leaves, {**GPTQ, key: value}, f"{key} in quantization_config (is missing|cannot be)")


def test_desc_act_without_an_order(tmp_path):
    leaves, meant = formats.gptq(weight(), act_order=True)
    (tmp_path / "a").mkdir()
    check(tmp_path, leaves, meant, {**GPTQ, "desc_act": True})
    index = leaves.pop("g_idx")
    refused(tmp_path / "a", leaves, {**GPTQ, "desc_act": True}, r"up_proj\.g_idx is missing.* and `desc_act` is true")
    refused(tmp_path / "a", {**leaves, "g_idx": index + 1}, GPTQ, r"up_proj\.g_idx points outside the 3 groups")


def test_an_order_of_inputs_in_one_layer_alone(tmp_path):
    """The types of both layers are equal; what tells them apart are the numbers of g_idx."""
    plain, first = formats.gptq(weight())
    ordered, second = formats.gptq(weight(seed=1), act_order=True)
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    tensors = {**module(plain, names[0]), **module(ordered, names[1])}
    found = decoded(tmp_path, tensors, GPTQ)
    assert all(np.array_equal(found[f"{n}.weight"], m) for n, m in zip(names, (first, second), strict=True))
    layers = decode_checkpoint(open_checkpoint(tmp_path), GPTQ).alike
    assert layers[f"{names[0]}.weight"] != layers[f"{names[1]}.weight"]


# --- AutoRound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packing", "write"),
    [
        ({}, formats.gptq),
        ({"packing_format": "auto_round:auto_gptq"}, formats.gptq),
        ({"packing_format": "auto_round"}, lambda w: formats.gptq(w, version=2)),
        ({"backend": "auto_round:exllamav2"}, lambda w: formats.gptq(w, version=2)),
        ({"backend": "auto_round:gptq:exllamav2"}, formats.gptq),
        ({"packing_format": "auto_round:gptqmodel"}, lambda w: formats.gptq(w, version=2)),
        ({"packing_format": "auto_round:auto_awq"}, formats.awq),
    ],
)
def test_packings_of_auto_round(packing, write, tmp_path):
    leaves, meant = write(weight())
    leaves.pop("g_idx", None)
    check(tmp_path, leaves, meant, {**AUTO, "quant_method": "intel/auto-round", **packing})


def test_extra_config_of_auto_round(tmp_path):
    extra = {
        ".*experts.*": {"bits": 8},
        NAME: {"bits": 2, "group_size": 64},
        "lm_head": {"bits": 16, "data_type": "fp"},
    }
    config = {**AUTO, "packing_format": "auto_round", "extra_config": extra}
    cases = {NAME: (2, 64), "model.layers.0.mlp.experts.0.up_proj": (8, 32), "model.layers.1.mlp.up_proj": (4, 32)}
    tensors, meant = {}, {}
    for name, (bits, group) in cases.items():
        leaves, meant[f"{name}.weight"] = formats.gptq(weight(32, 128), bits=bits, group=group, version=2)
        tensors |= module(leaves, name)
    found = decoded(tmp_path, tensors, config)
    assert all(np.array_equal(found[name], numbers) for name, numbers in meant.items())
    refused(tmp_path, formats.gptq(weight())[0], config, "lm_head.qweight holds codes, but", "lm_head")
    refused(tmp_path, formats.gptq(weight())[0], {**AUTO, "packing_format": "auto_round:fp8"}, "packing_format")


# --- groups of modules of compressed-tensors and ModelOpt ------------------------------------------------------------


def test_groups_of_modules_with_other_widths(tmp_path):
    """Names go before patterns, and patterns before classes; 64 inputs in one group could be any of them."""
    groups = {
        "a": {"targets": ["Linear"], "weights": {**INT4, "group_size": 32}},
        "b": {"targets": ["re:.*down_proj"], "weights": {**INT4, "group_size": 80}},
        "c": {
            "targets": ["model.layers.0.mlp.down_proj"],
            "weights": {"type": "int", "num_bits": 8, "strategy": "channel"},
        },
    }
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    cases = {"model.layers.0.mlp.down_proj": (8, 0), "model.layers.1.mlp.down_proj": (4, 80), NAME: (4, 32)}
    for i, (name, (bits, group)) in enumerate(cases.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        leaves, meant = formats.ct_packed(weight(), bits=bits, group=group)
        check(folder, leaves, meant, config, name)
    refused(
        tmp_path, formats.ct_packed(weight(), group=32)[0], config, "weight_scale is", "model.layers.1.mlp.down_proj"
    )


def test_a_mixed_config_of_modelopt(tmp_path):
    layers = {
        "model.language_model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
        "model.language_model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
    }
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    expert, attention = "model.layers.0.mlp.experts.1.up_proj", "model.layers.0.self_attn.q_proj"
    (first, one), (second, two) = formats.nvfp4(weight()), formats.fp8(weight(), shape=())
    found = decoded(tmp_path, {**module(first, expert), **module(second, attention)}, config)
    assert np.array_equal(found[f"{expert}.weight"], one) and np.array_equal(found[f"{attention}.weight"], two)
    refused(tmp_path, first, config, r"q_proj\.weight is not understood: codes cannot be", attention)
    refused(
        tmp_path, first, {**config, "quantized_layers": {"x": {"quant_algo": "W4A16_AWQ"}}}, "quant_algo 'W4A16_AWQ'"
    )


# --- experts in one tensor -------------------------------------------------------------------------------------------


def stacked(write, count=3):
    """Return the leaves of experts in one tensor and what they mean."""
    made = [write(weight(40, 64, seed)) for seed in range(count)]
    leaves = {leaf: torch.stack([own[leaf] for own, _ in made]) for leaf in made[0][0]}
    return leaves, np.stack([meant for _, meant in made])


@pytest.mark.parametrize(
    ("write", "names", "quantization"),
    [
        (lambda w: formats.fp8(w, (32, 32), "weight_scale_inv"), {"weight_scale_inv": "_scale_inv"}, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
        (lambda w: formats.fp8(w, (32, 32)), {"weight_scale": "_scale"}, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
        (lambda w: formats.fp8(w, (32, 32)), {"weight_scale": "_weight_scale"}, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
        (lambda w: formats.fp8(w, shape=()), {"weight_scale": "_scale"}, {"quant_method": "fp8"}),
        (lambda w: formats.fp8(w, (1, 0), shape=(40, 1)), {"weight_scale": "_weight_scale"}, formats.ct_config("float-quantized", type="float", strategy="channel")),
        (formats.nvfp4, {"weight_scale": "_weight_scale", "weight_scale_2": "_weight_scale_2"}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        (formats.mxfp4, {"weight_packed": "_packed", "weight_scale": "_scale"}, formats.ct_config("mxfp4-pack-quantized", type="float")),
    ],
)  # fmt: skip
def test_scales_of_experts_in_one_tensor(write, names, quantization, tmp_path):
    leaves, meant = stacked(write)
    owner = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{owner}{names.get(leaf, '')}": t for leaf, t in leaves.items()}
    found = decoded(tmp_path, {**tensors, f"{owner}_input_scale": torch.ones(3)}, quantization)
    assert list(found) == [owner] and np.array_equal(found[owner], meant)
    scale = next(name for name in tensors if name.endswith(("_scale", "_scale_inv")))
    tensors[scale] = tensors[scale].flatten()[:2].clone()
    with pytest.raises(MoecError, match=scale):
        decoded(tmp_path, tensors, quantization)


def test_a_scale_for_each_of_a_square_matrix_belongs_to_no_axis(tmp_path):
    codes = torch.zeros(3, 32, 32).to(torch.float8_e4m3fn)
    tensors = {"a.experts.up_proj": codes, "a.experts.up_proj_scale": torch.ones(3, 32)}
    with pytest.raises(MoecError, match=r"up_proj_scale is f32\[3, 32\]"):
        decoded(tmp_path, tensors, formats.ct_config("float-quantized", type="float", strategy="channel"))


# --- folders of other tools ------------------------------------------------------------------------------------------


def test_folders_of_tools_that_are_not_read_are_named(tmp_path):
    mlx = {"group_size": 64, "bits": 4}
    config = Config(None)
    config.quantization = mlx
    for given in (config, Config({**mlx, "mode": "affine"})):
        with pytest.raises(MoecError, match="a folder of MLX"):
            read_quantization(given, tmp_path)
    (tmp_path / "quant_model_description.json").write_text(json.dumps({"model_quant_type": "W8A8_DYNAMIC"}))
    with pytest.raises(MoecError, match="a folder of msModelSlim") as caught:
        read_quantization(Config(None), tmp_path)
    assert caught.value.where.endswith("quant_model_description.json")
