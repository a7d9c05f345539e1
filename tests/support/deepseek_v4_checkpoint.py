"""Writes a tiny DeepSeek-V4 checkpoint as the released ones are: their names, FP8 blocks, FP4 experts, E8M0 scales."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoint_formats
import torch
from moec.compiler.frontends.deepseek_v4.weights import _AROUND, _MEMORY
from safetensors.torch import save_file

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCK = 128
QUANTIZED = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3")  # but for those of compressors, which are bf16


def scale_of(largest: torch.Tensor, top: float, powers: bool) -> torch.Tensor:
    """Return scales under which the largest number is at most `top`, as powers of two or as they come."""
    scale = largest.clamp(min=1e-4) / top
    return scale.log2().ceil().exp2() if powers else scale


def fp8(w: torch.Tensor, powers: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (codes, scales, the numbers that they stand for) of blocks of 128 x 128."""
    rows, columns = w.shape
    padded = torch.nn.functional.pad(w, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale = scale_of(blocks.abs().amax((1, 3)), 448, powers)
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    numbers = (codes.float() * scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :columns]
    codes = codes.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous()
    return codes, scale.to(torch.float8_e8m0fnu) if powers else scale, numbers


def fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (two codes in a byte, scales, the numbers) of groups of 32 along a row; the low bits are the even column."""
    groups = w.unflatten(1, (-1, 32))
    scale = scale_of(groups.abs().amax(2), 6, True)
    codes = ((groups / scale[..., None])[..., None] - E2M1).abs().argmin(-1)
    numbers = (E2M1[codes] * scale[..., None]).flatten(1)
    pairs = codes.flatten(1).unflatten(1, (-1, 2))
    packed = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8).view(torch.int8)
    return packed, scale.to(torch.float8_e8m0fnu), numbers


def official_names(model: torch.nn.Module) -> dict[str, str]:
    """Return the names of a model's tensors by their official ones; `experts.E.wN` are parts of stacked tensors."""
    around = {official: memory for official, (_, memory) in _AROUND.items()}
    layers = range(model.config.num_hidden_layers)
    leaves = {f"layers.{n}.{o}": f"model.layers.{n}.{m}" for n in layers for o, m in _MEMORY.items()}
    state = model.state_dict()
    return {official: own for official, own in {**around, **leaves}.items() if own in state}


def write_official(
    model: torch.nn.Module, folder: Path, config: dict, *, base: bool = False, mtp: bool = True, nvfp4: bool = False
) -> Path:  # fmt: skip
    """Write a checkpoint folder, and put the numbers that its codes stand for into the model.

    `base` writes what the Base checkpoints hold: FP8 experts, f32 scales; `nvfp4` the experts of ModelOpt's. `config` is
    the content of config.json.
    """
    folder.mkdir(exist_ok=True)
    state, made = model.state_dict(), {}
    with torch.no_grad():
        for official, own in official_names(model).items():
            made.update(_stored(official, state[own], base))
        for n, layer in enumerate(model.model.layers):
            experts = layer.mlp.experts
            for e in range(experts.num_experts):
                gate, up = experts.gate_up_proj[e].chunk(2)
                for name, w in (("w1", gate), ("w3", up), ("w2", experts.down_proj[e])):
                    whole = f"layers.{n}.ffn.experts.{e}.{name}"
                    made.update(_nvfp4(whole, w) if nvfp4 else _stored(f"{whole}.weight", w, base))
    if mtp:
        made["mtp.0.e_proj.weight"] = torch.zeros(4, 8)
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _stored(name: str, w: torch.Tensor, base: bool) -> dict[str, torch.Tensor]:
    """Return what is stored for a tensor; the tensor gets the numbers that it stands for."""
    parts = name.split(".")
    if parts[-1] != "weight" or parts[-2] not in QUANTIZED or "compressor" in parts:
        kept = not w.is_floating_point() or parts[-1] in ("attn_sink", "ape", "bias") or "hc_" in name
        stored = w.clone() if kept else w.to(torch.bfloat16)
        w.copy_(stored)
        return {name: stored}
    codes, scales, numbers = fp4(w) if ".experts." in name and not base else fp8(w, powers=not base)
    w.copy_(numbers)
    return {name: codes, name.removesuffix("weight") + "scale": scales}


def _nvfp4(name: str, w: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what ModelOpt stores for a matrix of an expert, the scale of its inputs too."""
    leaves, numbers = checkpoint_formats.nvfp4(w.numpy())
    w.copy_(torch.from_numpy(numbers))
    return {f"{name}.{leaf}": t.clone() for leaf, t in leaves.items()} | {f"{name}.input_scale": torch.tensor(0.1)}


def official_config(model: torch.nn.Module, *, base: bool = False) -> dict:
    """Return the config.json of the released models with a tiny model's numbers."""
    c = model.config
    ratios = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    quantization = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        **({} if base else {"scale_fmt": "ue8m0"}),
    }  # fmt: skip
    kept = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "n_routed_experts", "n_shared_experts",
        "num_experts_per_tok", "moe_intermediate_size", "routed_scaling_factor", "index_n_heads", "index_head_dim",
        "index_topk", "scoring_func", "norm_topk_prob", "swiglu_limit", "sliding_window", "hc_mult",
        "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "max_position_embeddings", "num_nextn_predict_layers",
        "tie_word_embeddings", "hidden_act", "bos_token_id", "eos_token_id", "attention_bias",
    )  # fmt: skip
    return {
        **{name: getattr(c, name) for name in kept},
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "torch_dtype": "bfloat16",
        "compress_ratios": [*(ratios[kind] for kind in c.layer_types), 0],
        "num_hash_layers": c.mlp_layer_types.count("hash_moe"), "topk_method": "noaux_tc",
        "rope_theta": 10000, "compress_rope_theta": 160000,
        "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 64,
                         "beta_fast": 32, "beta_slow": 1},
        "quantization_config": quantization, **({} if base else {"expert_dtype": "fp4"}),
    }  # fmt: skip
