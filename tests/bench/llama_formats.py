"""The formats of llama.cpp's own quantizer on examples/tiny-moe, for quality.py: with an importance matrix of a text.

The importance matrix is what llama-imatrix writes: for each column of a matrix the mean square of its inputs on the first
8192 tokens of the text, of an expert on those that it is given; here from the model in transformers. Quantized matrices are
decoded by gguf and put back into a checkpoint, so that the loss is that of the weights alone.

A python with gguf and llama-cpp-python runs `python tests/bench/llama_formats.py IMPORTANCE.npz Q4_K_M OUT`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-moe"
WINDOW, TOKENS = 512, 8192


def write_importance(text: Path, out: Path) -> None:
    """Write the importance of the columns of every matrix on a text, by the name of the tensor in GGUF."""
    import torch
    from moec.compiler.runtime.reference import open_reference
    from moec.compiler.runtime.tokenizer import load_tokenizer

    sums: dict[str, Any] = {}
    counts: dict[str, Any] = {}

    def add(name: str, x: torch.Tensor, expert: int | None = None, experts: int = 1) -> None:
        rows = x.reshape(-1, x.shape[-1])
        sums.setdefault(name, torch.zeros(experts, rows.shape[1]))[expert or 0] += rows.square().sum(0)
        counts.setdefault(name, torch.zeros(experts, 1))[expert or 0] += len(rows)

    ids = load_tokenizer(MODEL).encode(text.read_text(encoding="utf-8"))[:TOKENS]
    with open_reference(MODEL) as reference, torch.no_grad():
        model = reference.model
        for i, layer in enumerate(model.model.layers):
            block, place = layer.mlp, f"blk.{i}"

            def routed(module: Any, given: Any, place: str = place, block: Any = block) -> None:
                x = given[0].reshape(-1, given[0].shape[-1])
                chosen = torch.nn.functional.linear(x, block.gate.weight).topk(model.config.num_experts_per_tok).indices
                both, down = block.experts.gate_up_proj, block.experts.down_proj
                for e in range(len(down)):
                    rows = x[(chosen == e).any(-1)]
                    gate, up = torch.nn.functional.linear(rows, both[e]).chunk(2, -1)
                    for name in ("gate", "up"):
                        add(f"{place}.ffn_{name}_exps.weight", rows, e, len(down))
                    add(f"{place}.ffn_down_exps.weight", torch.nn.functional.silu(gate) * up, e, len(down))

            block.register_forward_pre_hook(routed)
            for ours, linear in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
                name = f"{place}.attn_{ours}.weight"
                getattr(layer.self_attn, linear).register_forward_pre_hook(
                    lambda _, given, name=name: add(name, given[0])
                )
        model.lm_head.register_forward_pre_hook(lambda _, given: add("token_embd.weight", given[0]))
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            model(torch.tensor([ids[start : start + WINDOW]]))
    # an expert that saw no token: all of its columns count alike
    found = {n: torch.where(counts[n] > 0, s / counts[n].clamp(min=1), 1.0).flatten().numpy() for n, s in sums.items()}
    np.savez(out, **found)


def quantized_checkpoint(importance: Path, kind: str, out: Path) -> int:
    """Write the checkpoint with its matrices put through a format of llama.cpp; return the bytes of all tensors in it."""
    import gguf
    import llama
    import llama_cpp
    from quality import write_checkpoint

    config = json.loads((MODEL / "config.json").read_text())
    source = llama.Checkpoint(MODEL)
    plan = {
        name: sources
        for name, sources in llama._plan({**config, "num_experts": config["num_local_experts"]})
        if sources[0] in source.places
    }
    plain, packed = out.with_suffix(".bf16.gguf"), out.with_suffix(".gguf")
    _write_gguf(plain, config, source, plan)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = 1, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in np.load(importance).items()}
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [(name.encode(), a.ctypes.data_as(pointer), a.size) for name, a in arrays.items()]
    given = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)  # the last one is empty: the end
    settings.imatrix = given
    if status := llama_cpp.llama_model_quantize(str(plain).encode(), str(packed).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama_model_quantize failed ({status})")
    made, stored = {}, 0
    for tensor in gguf.GGUFReader(packed).tensors:
        sources, stored = plan[tensor.name], stored + int(tensor.n_bytes)
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        numbers = numbers.reshape(len(sources), *source.shape(sources[0])).astype("<f4")
        made |= dict(zip(sources, numbers, strict=True))
    write_checkpoint(out, made)
    return stored


def _write_gguf(path: Path, config: dict[str, Any], source: Any, plan: dict[str, list[str]]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    for name, sources in plan.items():
        data = np.stack([source.read(s) for s in sources]) if len(sources) > 1 else source.read(sources[0])
        wide = data.ndim == 1 or "ffn_gate_inp" in name
        numbers = (data.astype(np.uint32) << 16).view(np.float32)
        if wide:
            writer.add_tensor(name, numbers)
        else:
            raw = data.view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    print(quantized_checkpoint(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
