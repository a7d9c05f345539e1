"""Where a tensor of a checkpoint goes in a GGUF file, and what the file's metadata says of the model.

Names and architectures are those by which moec reads GGUF files (compiler/frontends/gguf). What llama.cpp's architecture
computes in one way only has to be what the config says; anything else is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ...compiler.errors import MoecError
from ...compiler.frontends.gguf.config import ARCHITECTURES
from ...compiler.frontends.gguf.model import REORDERED, gguf_name

_EXPERT = re.compile(
    r"^(.*\.)(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
_WEIGHTS = {"w1": "gate", "w2": "down", "w3": "up"}
_THEIRS = re.compile(r"^(token_embd|output|output_norm|blk\.\d+\.\w+)\.(weight|bias)$")
_ALWAYS_F32 = ("ffn_gate_inp", "norm")
# whether llama.cpp scales the weights of the chosen experts to a sum of 1
_NORMED = {"mixtral": True, "qwen2_moe": False, "qwen3_moe": True, "olmoe": False}
# attributes of a config that llama.cpp's architectures have one value for
_FIXED: dict[str, tuple[Any, ...]] = {
    "mlp_only_layers": (None, []), "decoder_sparse_step": (None, 1), "clip_qkv": (None,), "use_sliding_window": (None, False),
    "hidden_act": ("silu",),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The tensor of the file, the expert's number in it (None: it is no stack), and whether its numbers have to be f32."""

    name: str
    expert: int | None
    plain: bool


def find_architecture(config: Any) -> str:
    """Return llama.cpp's architecture for a config of transformers; MoecError where there is none that computes the same."""
    found = next((a for a, types in ARCHITECTURES.items() if config.model_type in types), None)
    if found is None:
        known = ", ".join(t for types in ARCHITECTURES.values() for t in types)
        raise MoecError(
            f"GGUF files of {config.model_type} are not written", todo=f"{known} are; or use --target safetensors"
        )
    fixed = {**_FIXED, "norm_topk_prob": (None, _NORMED[config.model_type])} if config.model_type in _NORMED else _FIXED
    if config.model_type == "mistral" and config.sliding_window:
        raise _not_computed("sliding_window", config.sliding_window, found)
    for key, values in fixed.items():
        if (value := getattr(config, key, None)) not in values:
            raise _not_computed(key, value, found)
    if config.model_type == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        raise _not_computed("num_key_value_heads", config.num_key_value_heads, found)
    if config.rope_parameters.get("rope_type", "default") != "default":
        raise _not_computed("rope_type", config.rope_parameters["rope_type"], found)
    return found


def _not_computed(key: str, value: Any, architecture: str) -> MoecError:
    what = f"{key} of config.json is {value!r:.60}, which llama.cpp's architecture {architecture} has no key for here"
    return MoecError(what, todo="use --target safetensors or cpu")


def find_place(name: str) -> Place:
    """Return the place of a tensor; MoecError for one that the file has no name for."""
    if expert := _EXPERT.match(name):
        part = _WEIGHTS.get(expert[3]) or expert[3].removesuffix("_proj")
        return Place(f"{gguf_name(expert[1])}ffn_{part}_exps.weight", int(expert[2]), False)
    theirs = gguf_name(name.replace(".block_sparse_moe.", ".mlp."))
    if not _THEIRS.match(theirs):
        raise MoecError(f"llama.cpp has no name for the tensor {name}", todo="use --target safetensors or cpu")
    return Place(theirs, None, theirs.endswith(".bias") or any(part in theirs for part in _ALWAYS_F32))


def turned_heads(place: Place, architecture: str, config: Any) -> int | None:
    """Return how many heads the rows of a tensor belong to, where these lie as interleaved rope wants them."""
    if architecture not in REORDERED or (part := re.search(r"attn_([qk])\.", place.name)) is None:
        return None
    return int(config.num_attention_heads if part[1] == "q" else config.num_key_value_heads)


def model_metadata(config: Any, architecture: str) -> dict[str, Any]:
    """Return the keys that say what the model computes."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    about = {
        "context_length": config.max_position_embeddings, "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]), "vocab_size": config.vocab_size,
    }  # fmt: skip
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if config.model_type in _NORMED:
        about |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
    if wide := getattr(config, "moe_intermediate_size", None):
        about["expert_feed_forward_length"] = wide
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        about["expert_shared_feed_forward_length"] = shared
    return {
        "general.architecture": architecture, "general.quantization_version": 2,
        **{f"{architecture}.{key}": value for key, value in about.items()},
    }  # fmt: skip
