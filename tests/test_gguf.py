"""GGUF files as sources: their header, llama.cpp's names, the config in the metadata, and artifacts with their codes."""

import re

import gguf_files
import moec
import numpy as np
import pytest
import torch
from moec.compiler.errors import MoecError
from moec.compiler.frontends import load
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.gguf.model import dequantized, gguf_name
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.weights.pull import pull
from moec.compiler.weights.sources.gguf import open_gguf
from moec.compiler.weights.sources.source import ModuleSource
from test_code_steps import random_blocks
from test_keep import EXACT, difference
from tiny_models import random_model, save

ARCHITECTURES = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}


def k_quant(kind):
    """Return a function that ignores a weight's numbers and makes random blocks as large as the weight."""

    def made(x):
        flat = random_blocks(kind, x.size // x.shape[-1], x.shape[-1] // 256).reshape(
            -1, {"q4_k": 144, "q6_k": 210}[kind]
        )
        for start in (0, 2) if kind == "q4_k" else (208,):
            scale = flat[:, start : start + 2].copy().view("<f2").astype(np.float32)
            flat[:, start : start + 2] = (np.abs(scale) / 5000).astype("<f2").view(np.uint8)
        raw = flat.reshape(*x.shape[:-1], -1)
        tensor = Tensor("w", TensorType.of("u8", *raw.shape))
        return raw, pull(dequantized(tensor, kind), ModuleSource({"w": torch.from_numpy(raw)})).numpy()

    return made


ENCODE = {"q4_0": gguf_files.q4_0, "q8_0": gguf_files.q8_0, "mxfp4": gguf_files.mxfp4} | {
    kind: k_quant(kind) for kind in ("q4_k", "q6_k")
}


def interleaved_rope(x, heads):
    """Return the rows of q or k as llama.cpp's converter stores them: `permute` of convert_hf_to_gguf.py."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_model(folder, family, kind_of, **changes):
    """Write a random model as GGUF and, as a checkpoint of what that stands for, in safetensors; return both."""
    model = random_model(FAMILIES[family], **changes)
    tensors = gguf_tensors(model, family, kind_of)
    plain = save(model, folder / "plain")
    (folder / "file").mkdir()
    return gguf_files.write(folder / "file" / "m.gguf", metadata(model.config, ARCHITECTURES[family]), tensors), plain


def gguf_tensors(model, family, kind_of):
    """Return a model's tensors as a GGUF file has them; the model gets the numbers that these stand for."""
    tensors = {}
    for name, parameter in model.state_dict().items():
        numbers, theirs = parameter.numpy(), gguf_name(name)
        kind = kind_of(theirs) if numbers.ndim > 1 else "f32"
        stored = numbers
        rows = re.search(r"attn_([qk])\.", theirs) if family == "mixtral" else None
        heads = model.config.num_attention_heads if rows and rows[1] == "q" else model.config.num_key_value_heads
        if rows:
            stored = interleaved_rope(numbers, heads)
        raw, meant = (stored, stored) if kind == "f32" else ENCODE[kind](stored)
        if rows:
            meant = meant.reshape(heads, -1, 2, *meant.shape[1:]).swapaxes(1, 2).reshape(meant.shape)
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(meant)))
        if "ffn_gate_up_exps" in theirs:
            half = raw.shape[1] // 2
            for part, piece in zip(("gate", "up"), (raw[:, :half], raw[:, half:]), strict=True):
                shape = (numbers.shape[0], half, numbers.shape[2])
                tensors[theirs.replace("gate_up", part)] = (kind, shape, piece.tobytes())
        elif "shexp.weight" in theirs and "inp" in theirs:
            tensors[theirs] = (kind, numbers.shape[1:], raw.tobytes())
        else:
            tensors[theirs] = (kind, numbers.shape, raw.tobytes())
    return tensors


def metadata(config, architecture):
    given = config.to_dict()
    about = {
        "context_length": given["max_position_embeddings"], "block_count": given["num_hidden_layers"],
        "embedding_length": given["hidden_size"], "feed_forward_length": given["intermediate_size"],
        "attention.head_count": given["num_attention_heads"], "attention.head_count_kv": given["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": given["rms_norm_eps"], "rope.freq_base": given["rope_parameters"]["rope_theta"],
        "expert_count": given.get("num_experts") or given["num_local_experts"],
        "expert_used_count": given["num_experts_per_tok"],
    }  # fmt: skip
    if given.get("head_dim"):
        about["attention.key_length"] = given["head_dim"]
    if "moe_intermediate_size" in given:
        about["expert_feed_forward_length"] = given["moe_intermediate_size"]
    words = [f"t{i}" for i in range(given["vocab_size"])]
    return {
        "general.architecture": architecture, "tokenizer.ggml.tokens": words, "general.name": "tiny",
    } | {f"{architecture}.{k}": v for k, v in about.items()}  # fmt: skip


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
    notes = []
    artifact = moec.compile(file, out=tmp_path / "a", accuracy="exact", why=notes)
    kept = artifact.manifest["figures"]["kept"]
    assert kept["main"] == {"exact": ["int8_g16"]} and artifact.manifest["lossy"]
    assert kept["layer_0"] == {"exact": ["int8_g16"], "near": ["int8_g16", "int8_g32"]}
    assert kept["layer_1"] == {"near": ["int8_g32"]}
    assert any("minimums that are no multiples" in note for note in notes)
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
        made = pull(dequantized(recipe, kind) if kind else recipe, opened.checkpoint).numpy()
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
