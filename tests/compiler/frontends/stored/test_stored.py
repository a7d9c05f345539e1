"""Quantized checkpoints: what each layout decodes to, and what is said where one is not understood."""

import json

import checkpoint_formats as formats
import numpy as np
import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.formats.table import format_of
from moec.compiler.frontends.stored.layouts import Stored
from moec.compiler.frontends.stored.layouts_gptq import gptq_weight
from moec.compiler.frontends.stored.quantization_config import read_quantization
from moec.compiler.frontends.stored.schemes import read_schemes
from moec.compiler.frontends.stored.stored import decode_checkpoint
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.kept_codes import exact_formats, pack_codes, take_apart
from moec.compiler.weights.rows import encode_rows
from moec.compiler.weights.sources.checkpoint import open_checkpoint
from moec.compiler.weights.sources.source import RandomSource, slice_box
from moec.compiler.weights.steps.table import step
from safetensors.torch import save_file
from stored_checkpoint import Config, write_and_decode

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
FP8 = {"quant_method": "fp8"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
INT4 = {"type": "int", "num_bits": 4}

# name -> (rows, columns, how it is written, quantization_config)
LAYOUTS = {
    "fp8 blocks": (40, 100, lambda w: formats.fp8(w, (16, 32), "weight_scale_inv"), {**FP8, "weight_block_size": [16, 32]}),
    "fp8 tensor": (7, 33, lambda w: formats.fp8(w, shape=()), FP8),
    "fp8 tensor, one element": (7, 33, lambda w: formats.fp8(w, shape=(1,)), {"quant_method": "modelopt"}),
    "fp8 mistral": (7, 33, lambda w: formats.fp8(w, leaf="qscale_weight", shape=()), FP8),
    "fp8 rows": (7, 33, lambda w: formats.fp8(w, (1, 0), shape=(7, 1)), formats.ct_config("float-quantized", type="float")),
    "fp8 rows, flat": (7, 33, lambda w: formats.fp8(w, (1, 0), shape=(7,)), FP8),
    "fp8 ct blocks": (
        40, 70, lambda w: formats.fp8(w, (16, 32)), formats.ct_config("float-quantized", block_structure=[16, 32]),
    ),
    "mxfp8": (7, 96, formats.mxfp8, {"quant_method": "mxfp8"}),
    "mxfp4": (7, 96, formats.mxfp4, formats.ct_config("mxfp4-pack-quantized", type="float", num_bits=4)),
    "mxfp4 deepseek v4": (7, 96, lambda w: formats.mxfp4(w, "weight", "scale"), {**FP8, "weight_block_size": [128, 128]}),
    "fp8 deepseek v4": (
        200, 130, lambda w: formats.fp8(w, (128, 128), "scale"), {**FP8, "weight_block_size": [128, 128]},
    ),
    "nvfp4 modelopt": (7, 96, formats.nvfp4, MODELOPT),
    "nvfp4 ct": (7, 96, lambda w: formats.nvfp4(w, "ct"), formats.ct_config("nvfp4-pack-quantized", type="float")),
    "gptq": (40, 96, formats.gptq, GPTQ),
    "gptq v2": (40, 96, lambda w: formats.gptq(w, version=2), {**GPTQ, "checkpoint_format": "gptq_v2"}),
    "gptq act-order": (40, 96, lambda w: formats.gptq(w, act_order=True), {**GPTQ, "desc_act": True}),
    "gptq act-order, not said": (40, 96, lambda w: formats.gptq(w, act_order=True), GPTQ),
    "gptq short last group": (40, 112, formats.gptq, GPTQ),
    "gptq 2 bits": (32, 96, lambda w: formats.gptq(w, bits=2), {**GPTQ, "bits": 2}),
    "gptq 3 bits": (32, 96, lambda w: formats.gptq(w, bits=3), {**GPTQ, "bits": 3}),
    "gptq 8 bits": (32, 96, lambda w: formats.gptq(w, bits=8), {**GPTQ, "bits": 8}),
    "awq": (40, 96, formats.awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "ct int4": (7, 96, formats.ct_packed, formats.ct_config("pack-quantized", **INT4, group_size=32)),
    "ct int4, short last group": (7, 100, formats.ct_packed, formats.ct_config("pack-quantized", **INT4, group_size=32)),
    "ct int4 zeros": (
        7, 100, lambda w: formats.ct_packed(w, zeros=True), formats.ct_config("pack-quantized", **INT4, group_size=32),
    ),
    "ct int4 rows": (7, 99, lambda w: formats.ct_packed(w, group=0), formats.ct_config("pack-quantized", **INT4)),
    "ct int3": (
        7, 100, lambda w: formats.ct_packed(w, bits=3, zeros=True),
        formats.ct_config("pack-quantized", type="int", num_bits=3, group_size=32),
    ),
    "ct int8": (
        7, 99, lambda w: formats.ct_packed(w, bits=8),
        formats.ct_config("pack-quantized", type="int", num_bits=8, group_size=32),
    ),
    "ct int-quantized": (7, 99, formats.ct_int8, formats.ct_config("int-quantized", type="int", num_bits=8)),
    "ct int-quantized zeros": (
        7, 99, lambda w: formats.ct_int8(w, zeros=True), formats.ct_config("int-quantized", type="int", num_bits=8),
    ),
}  # fmt: skip


def opened(folder, leaves, quantization, name="model.layers.0.mlp.up_proj"):
    """Write one module and return its tensors as recipes, and the checkpoint."""
    return write_and_decode(folder, {f"{name}.{leaf}": t for leaf, t in leaves.items()}, quantization)[:2]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_decode_as_defined(name, tmp_path):
    rows, columns, write, quantization = LAYOUTS[name]
    weight = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    leaves, meant = write(weight)
    recipes, checkpoint = opened(tmp_path, {**leaves, "bias": torch.ones(rows)}, quantization)
    assert sorted(recipes) == ["model.layers.0.mlp.up_proj.bias", "model.layers.0.mlp.up_proj.weight"]
    recipe = recipes["model.layers.0.mlp.up_proj.weight"]
    made = evaluate_recipe(recipe, checkpoint)
    assert np.array_equal(made.numpy(), meant)
    assert 0 < np.abs(meant - weight).max() < (2.2 if " 2 bits" in name else 0.7)  # it is the weight, in fewer bits
    for box in (((1, 4), (0, columns)), ((0, rows), (5, 31)), ((3, rows - 1), (17, columns))):
        assert torch.equal(evaluate_recipe(recipe, checkpoint, box), slice_box(made, box))


def test_a_tile_reads_its_own_codes_alone():
    """Rows 8..16 of one expert: its words, scales and zero points for these rows, and nothing of the others."""
    asked = {}

    class Watch(RandomSource):
        def read(self, name, box=None, expected=None):
            asked[name] = box
            return super().read(name, box, expected)

    types = {
        "qweight": TensorType.of("i32", 12, 40), "qzeros": TensorType.of("i32", 3, 5), "scales": TensorType.of("f16", 3, 40),
    }  # fmt: skip
    parts = {leaf: Tensor(f"experts.{{0..7}}.{leaf}", t) for leaf, t in types.items()}
    (scheme,) = read_schemes({**GPTQ, "sym": False})("")
    stacked = step("stack", gptq_weight(Stored(parts, lambda name: torch.empty(0)), scheme))
    wanted = {"qweight": ((0, 12), (8, 16)), "qzeros": ((0, 3), (1, 2)), "scales": ((0, 3), (8, 16))}
    wanted = {f"experts.5.{leaf}": box for leaf, box in wanted.items()}
    rows = ((5, 6), (8, 16))
    evaluate_recipe(stacked, Watch(), (*rows, (0, 96)))
    assert asked == wanted
    asked.clear()
    encode_rows(pack_codes(take_apart(stacked), format_of("uint4_g32")), Watch(), rows)
    assert asked == wanted


def test_the_experts_of_gpt_oss(tmp_path):
    weight = np.random.default_rng(0).normal(size=(3, 10, 64)).astype(np.float32)
    leaves, meant = formats.mxfp4(weight, "_blocks", "_scales")
    leaves["_blocks"] = leaves["_blocks"].reshape(3, 10, 2, 16)
    save_file({f"layers.0.mlp.experts.up{k}": t for k, t in leaves.items()}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    recipes = decode_checkpoint(checkpoint, {"quant_method": "mxfp4"}).recipes
    made = evaluate_recipe(recipes["layers.0.mlp.experts.up"], checkpoint)
    assert np.array_equal(made.numpy(), meant.transpose(0, 2, 1))


def test_as_compressed_tensors_decodes(tmp_path):
    """Scales in f32 and numbers in f32: the library rounds to the dtype of the scales otherwise."""
    from compressed_tensors import compressors as base
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    assert base
    cases = {
        "ct int4": {"num_bits": 4, "strategy": "group", "group_size": 32},
        "ct int3": {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False},
        "ct int4 zeros": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        "ct int4 rows": {"num_bits": 4, "strategy": "channel"},
        "ct int-quantized": {"num_bits": 8, "strategy": "channel"},
        "ct int-quantized zeros": {"num_bits": 8, "strategy": "channel", "symmetric": False},
        "fp8 rows": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        "nvfp4 ct": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    }
    for name, arguments in cases.items():
        rows, _, write, quantization = LAYOUTS[name]
        columns = 96
        leaves, _ = write(np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32))
        if name not in ("mxfp4", "nvfp4 ct"):
            leaves["weight_scale"] = leaves["weight_scale"].float()
        recipes, checkpoint = opened(tmp_path, leaves, quantization)
        made = evaluate_recipe(recipes["model.layers.0.mlp.up_proj.weight"], checkpoint)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
        compressor = BaseCompressor.get_value_from_registry(quantization["format"])
        wanted = compressor.decompress({k: v.clone() for k, v in leaves.items()}, scheme)["weight"]
        assert torch.equal(made.to(wanted.dtype), wanted), name


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "hqq"}, "weights quantized with 'hqq' are not understood"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ weights of version 'gemv'"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (formats.ct_config("marlin-24"), "compressed tensors with format 'marlin-24'"),
        (
            {**formats.ct_config("pack-quantized"), "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config",
        ),
        ({**formats.ct_config("pack-quantized"), "transform_config": {"r1": {}}}, "transform_config is not understood"),
    ],
)
def test_configs_that_are_not_understood(quantization, message, tmp_path):
    with pytest.raises(MoecError, match=message) as caught:
        read_quantization(Config(quantization), tmp_path)
    assert caught.value.where.endswith("config.json") and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "nvfp4 modelopt",
            {"pre_quant_scale": torch.ones(96)},
            "up_proj.pre_quant_scale beside .*weight is not understood",
        ),
        ("nvfp4 modelopt", {"weight_scale_2": None}, r"up_proj\.weight_scale_2 or \S+\.weight_global_scale is missing"),
        ("gptq", {"qzeros": None}, r"up_proj\.qzeros is missing or empty, and `sym` is not true"),
        ("gptq", {"scales": torch.ones(3, 41, dtype=torch.float16)}, "up_proj.qweight is not understood"),
        ("ct int4", {"weight_shape": torch.tensor([7, 200])}, r"weight_shape \[7, 200\]"),
        (
            "fp8 blocks",
            {"weight_scale_inv": torch.ones(3, 7)},
            r"weight_scale_inv is f32\[3, 7\], one scale for a block \[16, 32\]",
        ),
    ],
)
def test_tensors_that_are_not_understood(name, change, message, tmp_path):
    rows, columns, write, quantization = LAYOUTS[name]
    leaves, _ = write(np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32))
    changed = {k: v for k, v in {**leaves, **change}.items() if v is not None}
    with pytest.raises(MoecError, match=message) as caught:
        opened(tmp_path, changed, quantization)
    assert caught.value.where.endswith("model.safetensors")


def test_scales_without_a_quantization_config(tmp_path):
    leaves, _ = formats.fp8(np.ones((4, 4), np.float32), (2, 2), "weight_scale_inv")
    with pytest.raises(MoecError, match=r"has scales, but config\.json has no quantization_config"):
        opened(tmp_path, leaves, None)


def test_the_config_of_modelopt_may_be_a_file_of_its_own(tmp_path):
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert read_quantization(Config(None), tmp_path) == MODELOPT
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(MoecError, match="has no `quantization`"):
        read_quantization(Config(None), tmp_path)


@pytest.mark.parametrize(("columns", "names"), [(256, ["fp8_b128"]), (192, [])])
def test_fp8_is_kept_in_whole_blocks_of_columns(columns, names):
    """Rows of 192 end within a block, which the format does not have: such weights are stored as near integers."""
    codes = Tensor("w", TensorType.of("f8e4m3", 200, columns))
    weight = step("dequantize", codes, Tensor("s", TensorType.of("f32", 2, 2)), block=(128, 128))
    found = take_apart(weight)
    assert [format.name for format in exact_formats(found)] == names
    assert [pack_codes(found, format_of(name)).type for name in names] == [
        TensorType.of(n, 200, columns) for n in names
    ]
