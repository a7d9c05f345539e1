"""The model families that the tests check, each with a tiny configuration.

Any causal LM of the installed transformers may be compiled; these are the ones whose numbers are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BASE: Mapping[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EIGHT = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_DEEPSEEK = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "intermediate_size": 96, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family: its name, transformers' model_type and config class, a tiny configuration over BASE.

    `state` says what a layer keeps from step to step. The tests compare the compiled model of each with transformers:
    a tiny random checkpoint and the live model, prefill at several lengths, cached decoding, left padding.
    """

    name: str
    model_type: str
    config_class: str
    tiny: Mapping[str, Any]
    state: str = "kv"
    padding: bool = True  # whether the rows of a batch may be padded on the left

    def config(self, **changes: Any) -> Any:
        """Return the tiny transformers config, with changes."""
        import transformers

        return getattr(transformers, self.config_class)(**{**BASE, **self.tiny, **changes})


_GROUPED = {**_DEEPSEEK, "head_dim": 16}
_FOUR = {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}

_SPARSE = "compressed_sparse_attention"

_ALL = (
    Family("OLMoE", "olmoe", "OlmoeConfig", {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}),
    Family("Mixtral", "mixtral", "MixtralConfig", {**_FOUR, "intermediate_size": 96}),
    Family("Qwen2-MoE", "qwen2_moe", "Qwen2MoeConfig",
           {"intermediate_size": 96, "shared_expert_intermediate_size": 48, "mlp_only_layers": [], **_EIGHT}),
    Family("Qwen3-MoE", "qwen3_moe", "Qwen3MoeConfig",
           {"intermediate_size": 96, "head_dim": 16, "norm_topk_prob": True, **_EIGHT}),
    Family("DeepSeek-V3", "deepseek_v3", "DeepseekV3Config", {**_MLA, **_DEEPSEEK}, state="latent kv"),
    # many index heads: with few, scores are often exactly 0, and which of equal ones is chosen is anyone's guess
    Family("DeepSeek-V4", "deepseek_v4", "DeepseekV4Config",
           {"num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 32, "partial_rotary_factor": 0.25,
            "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "sliding_window": 8, "index_n_heads": 32, "index_head_dim": 16, "index_topk": 4,
            "layer_types": ["sliding_attention", _SPARSE, "heavily_compressed_attention", _SPARSE],
            "compress_rates": {_SPARSE: 4, "heavily_compressed_attention": 8},
            "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"]},
           state="window, compressed entries, unfinished windows", padding=False),
    Family("gpt-oss", "gpt_oss", "GptOssConfig", {**_FOUR, "head_dim": 16, "sliding_window": 4}),
    Family("AFMoE", "afmoe", "AfmoeConfig",
           {**_EIGHT, "intermediate_size": 96, "head_dim": 16, "sliding_window": 4, "num_dense_layers": 1}),
    Family("Cohere2-MoE", "cohere2_moe", "Cohere2MoeConfig",
           {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "head_dim": 16}),
    Family("dots.llm1", "dots1", "Dots1Config", _GROUPED),
    Family("ERNIE 4.5 MoE", "ernie4_5_moe", "Ernie4_5_MoeConfig",
           {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "intermediate_size": 96,
            "moe_layer_start_index": 1}),
    Family("EXAONE MoE", "exaone_moe", "ExaoneMoeConfig",
           {**_EIGHT, "intermediate_size": 96, "head_dim": 16, "sliding_window": 4, "num_hidden_layers": 4,
            "n_group": 1, "topk_group": 1}),
    Family("FlexOlmo", "flex_olmo", "FlexOlmoConfig",
           {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}),
    Family("GLM-4 MoE", "glm4_moe", "Glm4MoeConfig", _GROUPED),
    Family("GLM-4 MoE Lite", "glm4_moe_lite", "Glm4MoeLiteConfig", {**_MLA, **_DEEPSEEK}, state="latent kv"),
    Family("Granite MoE", "granitemoe", "GraniteMoeConfig", _FOUR),
    Family("Granite MoE Shared", "granitemoeshared", "GraniteMoeSharedConfig", {**_FOUR, "shared_intermediate_size": 48}),
    Family("Hunyuan MoE", "hunyuan_v1_moe", "HunYuanMoEV1Config",
           {"num_experts": 8, "moe_topk": 2, "intermediate_size": 32, "head_dim": 16}),
    Family("Mellum", "mellum", "MellumConfig", {**_EIGHT, "intermediate_size": 96, "head_dim": 16}),
    Family("MiniMax-M2", "minimax_m2", "MiniMaxM2Config", {**_FOUR, "head_dim": 16}),
    Family("Solar Open", "solar_open", "SolarOpenConfig", _GROUPED),
    Family("Llama (no experts)", "llama", "LlamaConfig", {"intermediate_size": 96}),
    Family("Gemma 3 (no experts)", "gemma3_text", "Gemma3TextConfig",
           {"intermediate_size": 96, "head_dim": 16, "sliding_window": 4}),
    Family("GPT-NeoX (no experts)", "gpt_neox", "GPTNeoXConfig", {"intermediate_size": 96}),
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
