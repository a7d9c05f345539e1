"""Weights as the formats' own libraries decode them, beside numbers made by hand, one small weight for each layout."""

from dataclasses import replace
from importlib.metadata import version

import checkpoint_formats as formats
import gguf_files
import numpy as np
import pytest
import torch
from gguf_files import random_blocks
from moec.compiler.errors import MoecError
from moec.compiler.frontends.gguf.model import dequantize_blocks
from moec.compiler.frontends.stored.decoded import Decoding, gguf_source, safetensors_source
from moec.compiler.ir.recipes import Tensor
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.ggml import BLOCKS
from moec.compiler.weights.sources.gguf import open_gguf
from moec.compiler.weights.steps.table import step
from stored_checkpoint import write_and_decode

MODULE = "model.layers.0.mlp.up_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
FP8 = {"quant_method": "fp8"}


def ct(form, kind="int", **weights):
    return formats.ct_config(form, type=kind, **weights)


INT4 = ct("pack-quantized", num_bits=4, group_size=32, strategy="group")
ZEROS4 = ct("pack-quantized", num_bits=4, group_size=32, strategy="group", symmetric=False)
ROWS8 = ct("int-quantized", num_bits=8, strategy="channel")
E4M3 = {"num_bits": 8, "strategy": "block", "block_structure": [16, 32]}
# name -> (shape, how it is written, quantization_config, the library that decodes it; empty: moec)
LAYOUTS = {
    "gptq": ((40, 96), formats.gptq, GPTQ, ""),
    "awq": ((40, 96), formats.awq, AWQ, "compressed-tensors"),
    "pack-quantized": ((8, 96), formats.ct_packed, INT4, "compressed-tensors"),
    "pack-quantized, zero points": ((40, 96), lambda w: formats.ct_packed(w, zeros=True), ZEROS4, "compressed-tensors"),
    "pack-quantized, a short group": ((8, 80), formats.ct_packed, INT4, ""),
    "pack-quantized, 8 bits": (
        (8, 96), lambda w: formats.ct_packed(w, bits=8, group=0),
        ct("pack-quantized", num_bits=8, strategy="channel"), "compressed-tensors",
    ),
    "int-quantized": ((7, 99), formats.ct_int8, ROWS8, "compressed-tensors"),
    "mxfp4": (
        (8, 96), formats.mxfp4, ct("mxfp4-pack-quantized", "float", num_bits=4, group_size=32, strategy="group"),
        "compressed-tensors",
    ),
    "mxfp4 of deepseek": (
        (8, 96), lambda w: formats.mxfp4(w, "weight", "scale"), FP8 | {"weight_block_size": [128, 128]}, "transformers",
    ),
    "nvfp4": (
        (8, 96), lambda w: formats.nvfp4(w, "ct"),
        ct("nvfp4-pack-quantized", "float", num_bits=4, group_size=16, strategy="tensor_group"), "compressed-tensors",
    ),
    "nvfp4 of modelopt": (
        (8, 96), formats.nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "compressed-tensors",
    ),
    "fp8 blocks": (
        (32, 96), lambda w: formats.fp8(w, (16, 32), "weight_scale_inv"), FP8 | {"weight_block_size": [16, 32]},
        "transformers",
    ),
    "fp8 blocks, cut": (
        (40, 100), lambda w: formats.fp8(w, (16, 32), "weight_scale_inv"), FP8 | {"weight_block_size": [16, 32]},
        "compressed-tensors",
    ),
    # 96 rows have 3 scales of 40 rows: the library of transformers would take them for 32 rows each
    "fp8 blocks, cut evenly": (
        (96, 64), lambda w: formats.fp8(w, (40, 64), "weight_scale_inv"), FP8 | {"weight_block_size": [40, 64]},
        "compressed-tensors",
    ),
    "fp8 tensor": ((7, 33), lambda w: formats.fp8(w, shape=()), FP8, "transformers"),
    "fp8 rows": (
        (7, 33), lambda w: formats.fp8(w, (1, 0)), ct("float-quantized", "float", num_bits=8, strategy="channel"),
        "compressed-tensors",
    ),
    "fp8 blocks of compressed-tensors": (
        (32, 96), lambda w: formats.fp8(w, (16, 32)), ct("float-quantized", "float", **E4M3), "compressed-tensors",
    ),
    "mxfp8": ((7, 96), formats.mxfp8, {"quant_method": "mxfp8"}, "transformers"),
}  # fmt: skip


def source_of(folder, tensors, quantization):
    """Return the decoded source of a checkpoint with these tensors, and moec's recipes for its weights."""
    recipes, checkpoint, found = write_and_decode(folder, tensors, quantization)
    return safetensors_source(checkpoint, found), recipes


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_library_decodes_what_was_written(name, tmp_path):
    shape, write, quantization, library = LAYOUTS[name]
    leaves, meant = write(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    source, recipes = source_of(tmp_path, {f"{MODULE}.{k}": t for k, t in leaves.items()}, quantization)
    recipe = source.decoded_tensor(recipes[f"{MODULE}.weight"])
    assert isinstance(recipe, Tensor) and recipe.type.sizes == shape
    np.testing.assert_allclose(evaluate_recipe(recipe, source).numpy(), meant, rtol=1e-6, atol=0)
    assert torch.equal(evaluate_recipe(recipe, source, ((1, 4), (2, 9))), evaluate_recipe(recipe, source)[1:4, 2:9])
    decoding = source.decoding
    assert decoding.libraries == ({f"{library} {version(library)}": 1} if library else {})
    assert decoding.own == (not library) and bool(decoding.reason) == (not library)


def test_the_experts_of_gpt_oss(tmp_path):
    leaves, meant = formats.mxfp4(
        np.random.default_rng(0).normal(size=(3, 10, 64)).astype(np.float32), "_blocks", "_scales"
    )
    leaves["_blocks"] = leaves["_blocks"].reshape(3, 10, 2, 16)
    name = "model.layers.0.mlp.experts.down_proj"
    source, recipes = source_of(tmp_path, {name + k: t for k, t in leaves.items()}, {"quant_method": "mxfp4"})
    found = evaluate_recipe(source.decoded_tensor(recipes[name]), source).numpy()
    assert np.array_equal(found, meant.transpose(0, 2, 1))
    assert source.decoding.libraries == {f"transformers {version('transformers')}": 1}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_gguf(kind, tmp_path):
    from gguf import GGMLQuantizationType, quants

    block = BLOCKS[kind]
    raw = random_blocks(kind, 4, 2).reshape(4, -1)
    gguf_files.TYPES.setdefault(kind, GGMLQuantizationType[kind.upper()].value)
    gguf_files.ELEMENTS.setdefault(kind, block.elements)
    file = gguf_files.write(tmp_path / "m.gguf", {}, {"w": (kind, (4, 2 * block.elements), raw.tobytes())})
    opened = open_gguf(file)
    own = step("transpose", dequantize_blocks(Tensor("w", opened.checkpoint.tensors["w"].type), kind), perm=(1, 0))
    source = gguf_source(opened)
    recipe = source.with_decoded_weights(own)
    assert recipe.items == (Tensor("w", own.items[0].type),)
    wanted = quants.dequantize(raw, GGMLQuantizationType[kind.upper()])
    assert np.array_equal(evaluate_recipe(recipe, source).numpy(), wanted.T, equal_nan=True)
    assert source.decoding == Decoding({f"gguf {version('gguf')}": 1}, 0, "")


WRONG = {
    "a number": (
        lambda t: t.where(torch.arange(t.numel()).reshape(t.shape) != 7, 1.001 * t),
        "1 of 768 numbers differ",
    ),
    "all numbers": (lambda t: -t, "numbers differ"),
    "the shape": (lambda t: t.T, r"the shapes are \[8, 96\] and \[96, 8\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_library_that_decodes_otherwise_fails_the_check(name, tmp_path):
    change, message = WRONG[name]
    leaves, _ = formats.ct_packed(np.random.default_rng(0).normal(size=(8, 96)).astype(np.float32))
    source, recipes = source_of(tmp_path, {f"{MODULE}.{k}": t for k, t in leaves.items()}, INT4)
    library_of = source.library_of

    def other(codes):
        library = library_of(codes)
        return replace(library, decode=lambda: change(library.decode()))

    source.library_of = other
    with pytest.raises(
        MoecError, match=rf"moec decodes {MODULE}\.weight_packed otherwise than .*: .*{message}"
    ) as caught:
        evaluate_recipe(source.decoded_tensor(recipes[f"{MODULE}.weight"]), source)
    assert caught.value.exit_code == 1


def test_what_is_said_of_a_decoding():
    some = Decoding({"gguf 0.19.0": 3}, 0, "")
    assert some.line() == "the weights of the source are decoded by gguf 0.19.0 (3)"
    assert some.to_dict() == {"libraries": {"gguf 0.19.0": 3}, "moec": 0}
    own = Decoding({}, 2, "no library")
    assert own.line() == "the weights of the source are decoded by moec itself, which this does not check: no library"
    both = Decoding({"gguf 0.19.0": 3}, 2, "no library")
    assert "by gguf 0.19.0 (3), and 2 by moec itself, which this does not check: no library" in both.line()
    assert both.to_dict() == {"libraries": {"gguf 0.19.0": 3}, "moec": 2, "reason": "no library"}
