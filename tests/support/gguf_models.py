"""Random models as GGUF files, with llama.cpp's names and metadata, and checkpoints of what these stand for."""

import re

import gguf_files
import numpy as np
import torch
from gguf_files import random_blocks
from moec.compiler.frontends.families import FAMILIES
from moec.compiler.frontends.gguf.model import dequantize_blocks, gguf_name
from moec.compiler.ir.recipes import Tensor
from moec.compiler.ir.types import TensorType
from moec.compiler.weights.evaluate import evaluate_recipe
from moec.compiler.weights.sources.source import ModuleSource
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
        return raw, evaluate_recipe(dequantize_blocks(tensor, kind), ModuleSource({"w": torch.from_numpy(raw)})).numpy()

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
    """Return the metadata that llama.cpp's converter writes for a config."""
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
