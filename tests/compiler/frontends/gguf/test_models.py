"""GGUF files as sources: their header, llama.cpp's names, the config in the metadata, and artifacts with their codes."""

import gguf_files
import moec
import numpy as np
import pytest
import torch
from gguf_models import write_model
from moec.compiler.driver import compile_source
from moec.compiler.errors import MoecError
from moec.compiler.frontends.gguf.model import dequantize_blocks
from moec.compiler.frontends.load import load
from moec.compiler.ir.recipes import Tensor
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.gguf import open_gguf
from quantized_checkpoints import EXACT, difference

LARGE = {"hidden_size": 256, "num_hidden_layers": 2}
CASES = {
    "mixtral": ("q4_0", {}, "int4"),
    "olmoe": ("mxfp4", {}, "int8"),
    "qwen3_moe": ("q8_0", {}, "int8"),
    "qwen2_moe": (
        "q6_k",
        {**LARGE, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
        "int8",
    ),
}


@pytest.mark.parametrize("family", CASES)
def test_kept_codes_equal_the_dequantized_model(family, tmp_path):
    kind, changes, expected = CASES[family]
    router = lambda name: "f32" if "gate_inp" in name else kind  # noqa: E731
    with torch.no_grad():
        file, plain = write_model(tmp_path, family, router, **changes)
    artifact = moec.compile(file, out=tmp_path / "a", accuracy="exact")
    kept = artifact.manifest["figures"]["kept"]
    assert all(set(formats) == {"exact"} for formats in kept.values())
    assert {format.partition("_")[0] for format in kept["layer"]["exact"]} == {expected}
    assert not artifact.manifest["lossy"]
    assert difference(artifact, plain) <= EXACT


def test_layers_in_mixed_types_with_minimums(tmp_path):
    """As Q4_K_M has it: Q6_K for `down` in some layers. Q4_K has minimums, which no format holds."""

    def kind(name):
        if "gate_inp" in name:
            return "f32"
        return "q6_k" if name.startswith(("blk.0.ffn_down", "output", "token_embd")) else "q4_k"

    with torch.no_grad():
        file, plain = write_model(
            tmp_path, "mixtral", kind, hidden_size=256, intermediate_size=256, num_hidden_layers=2
        )
    done = compile_source(file, out=tmp_path / "a", accuracy="exact")
    artifact, notes = done.artifact, done.notes
    kept = artifact.manifest["figures"]["kept"]
    assert kept["main"] == {"exact": ["int8_g16"]} and artifact.manifest["lossy"]
    assert kept["layer_0"] == {"exact": ["int8_g16"], "near": ["int8_g16", "int8_g32"]}
    assert kept["layer_1"] == {"near": ["int8_g32"]}
    assert any("minimums that are no multiples" in note.reason for note in notes)
    assert difference(artifact, plain, of=torch.median) < 0.01


def test_a_config_beside_the_file_and_a_folder_as_the_source(tmp_path):
    with torch.no_grad():
        file, plain = write_model(tmp_path, "qwen3_moe", lambda name: "f32")
    (file.parent / "config.json").write_text((plain / "config.json").read_text())
    artifact = moec.compile(file.parent, out=tmp_path / "a")
    assert artifact.manifest["precision"]["layer"] == ["f32"] and "kept" not in artifact.manifest["figures"]
    assert difference(artifact, plain) <= EXACT
    program = artifact.folder / "program.moir"
    again = moec.compile(program, out=tmp_path / "b", weights=file)
    assert again.manifest["files"]["model.onnx.data"] == artifact.manifest["files"]["model.onnx.data"]


def test_the_header_as_gguf_reads_it(tmp_path):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    with torch.no_grad():
        file, _ = write_model(tmp_path, "qwen3_moe", lambda name: "q8_0")
    opened, theirs = open_gguf(file), GGUFReader(file)
    assert {t.name for t in theirs.tensors} == set(opened.checkpoint.tensors)
    for tensor in theirs.tensors:
        info, kind = opened.checkpoint.tensors[tensor.name], opened.kinds.get(tensor.name)
        recipe = Tensor(tensor.name, info.type)
        made = evaluate_recipe(dequantize_blocks(recipe, kind) if kind else recipe, opened.checkpoint).numpy()
        assert np.array_equal(made, dequantize(tensor.data, tensor.tensor_type)), tensor.name


TINY = {"general.architecture": "qwen3moe", "a.list": [1, 2, 3], "a.flag": True, "a.number": 0.5}
ONE = {"w": ("f32", (2, 3), np.arange(6, dtype="<f4").tobytes())}


def test_a_file_of_two_parts(tmp_path):
    gguf_files.write(tmp_path / "m-00001-of-00002.gguf", TINY, ONE)
    gguf_files.write(tmp_path / "m-00002-of-00002.gguf", {}, {"v": ("f32", (2,), b"\0" * 8)}, version=2)
    opened = open_gguf(tmp_path / "m-00001-of-00002.gguf")
    assert sorted(opened.checkpoint.tensors) == ["v", "w"] and opened.metadata["a.list"] == (1, 2, 3)
    assert opened.checkpoint.read("w", ((1, 2), (1, 3))).tolist() == [[4.0, 5.0]]
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(MoecError, match="cannot open"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"GGML" + raw[4:], "not a GGUF file"),
        (lambda raw: raw[:4] + b"\0\0\0\3" + raw[8:], "GGUF version 50331648 is not read"),
        (lambda raw: raw[:60], "truncated"),
        (lambda raw: raw[:-24], "the file has"),
        (lambda raw: raw[:8] + b"\xff" * 8 + raw[16:], "the header announces"),
        (lambda raw: raw[:24] + b"\xff" * 8 + raw[32:], "truncated"),
        (lambda raw: raw.replace(b"a.flag", b"a.f\xffag"), "not UTF-8"),
        (lambda raw: raw.replace(b"w\2\0\0\0\3", b"w\2\0\0\0\xff"), "should start at"),
    ],
)
def test_damaged_files_are_refused(damage, message, tmp_path):
    file = gguf_files.write(tmp_path / "m.gguf", TINY, ONE)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(MoecError, match=message) as caught:
        open_gguf(file)
    assert caught.value.exit_code == 2


def test_what_is_not_understood_is_named(tmp_path):
    with torch.no_grad():
        file, _ = write_model(tmp_path, "qwen3_moe", lambda name: "q8_0")
    raw = file.read_bytes()
    changes = {
        "architecture 'qwen9moe'": raw.replace(b"qwen3moe", b"qwen9moe"),
        "blk.0.attn_x_norm.weight has no place in the model": raw.replace(b"blk.0.attn_q_norm", b"blk.0.attn_x_norm"),
        "no qwen3moe.block_count": raw.replace(b"qwen3moe.block_count", b"qwen3moe.block_cuont"),
    }
    for message, content in changes.items():
        file.write_bytes(content)
        with pytest.raises(MoecError, match=message):
            load(file)
    gguf_files.TYPES["iq2_xs"] = 17
    other = gguf_files.write(tmp_path / "b.gguf", TINY, {"w": ("iq2_xs", (256,), b"\0" * 74)})
    with pytest.raises(MoecError, match="tensor 'w' has the type IQ2_XS, which is not read"):
        open_gguf(other)
