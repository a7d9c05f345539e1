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
# the first token's output of a delta rule may be next to nothing, which the norm behind it would blow up with its rounding
_EPS = 1e-2
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": _EPS,
}
_DEEPSEEK = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "intermediate_size": 96, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}  # fmt: skip


CHECKED = "prefill, cached steps, left padding, greedy tokens"
LATENT = "latent kv"
MAMBA = "kv, convolution, ssm"
DELTA = "kv, convolution, delta rule"


_INDEXER = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 6}
INDEXED = "latent kv, index keys"


@dataclass(frozen=True)
class Family:
    """A family: its name, transformers' model_type and config class, a tiny configuration over BASE.

    `state` says what layers keep from step to step, `layers` what kinds of layers there are, `checked` what the tests
    compare with transformers: a tiny random checkpoint and the live model, prefill at several lengths, cached decoding,
    left padding.
    """

    name: str
    model_type: str
    config_class: str
    tiny: Mapping[str, Any]
    state: str = "kv"
    layers: str = "attention, experts"
    checked: str = CHECKED
    padding: bool = True  # whether the rows of a batch may be padded on the left
    whole: Mapping[str, Any] | None = None  # of a model of text and images: what is not the text model's config
    needs: str = ""  # the transformers that it needs; empty: any that can be installed

    def config(self, **changes: Any) -> Any:
        """Return the tiny transformers config, with changes."""
        import transformers

        cls, tiny = getattr(transformers, self.config_class), {**BASE, **self.tiny, **changes}
        return cls(**tiny) if self.whole is None else cls(text_config=tiny, **self.whole)


_GROUPED = {**_DEEPSEEK, "head_dim": 16}
_FOUR = {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}

# vision towers, which stand in the checkpoints and are left out of the programs
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION_QWEN = {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
_SAM = {**_VISION, "image_size": 64, "output_channels": 32, "downsample_channels": [32, 32]}

_SPARSE = "compressed_sparse_attention"

_ALL = (
    Family("OLMoE", "olmoe", "OlmoeConfig", {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}),
    Family("Mixtral", "mixtral", "MixtralConfig", {**_FOUR, "intermediate_size": 96}),
    Family("Qwen2-MoE", "qwen2_moe", "Qwen2MoeConfig",
           {"intermediate_size": 96, "shared_expert_intermediate_size": 48, "mlp_only_layers": [], **_EIGHT}),
    Family("Qwen3-MoE", "qwen3_moe", "Qwen3MoeConfig",
           {"intermediate_size": 96, "head_dim": 16, "norm_topk_prob": True, **_EIGHT}),
    Family("DeepSeek-V3", "deepseek_v3", "DeepseekV3Config", {**_MLA, **_DEEPSEEK}, LATENT, "MLA, dense and experts"),
    # many index heads: with few, scores are often exactly 0, and which of equal ones is chosen is anyone's guess
    Family("DeepSeek-V4", "deepseek_v4", "DeepseekV4Config",
           {"num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 32, "partial_rotary_factor": 0.25,
            "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "sliding_window": 8, "index_n_heads": 32, "index_head_dim": 16, "index_topk": 4,
            "layer_types": ["sliding_attention", _SPARSE, "heavily_compressed_attention", _SPARSE],
            "compress_rates": {_SPARSE: 4, "heavily_compressed_attention": 8},
            "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"]},
           "window, compressed entries, unfinished windows", "hyper-connections, compressed attention, experts",
           "prefill, cached steps, greedy tokens", padding=False),
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
    Family("GLM-4 MoE Lite", "glm4_moe_lite", "Glm4MoeLiteConfig", {**_MLA, **_DEEPSEEK}, LATENT, "MLA, dense and experts"),
    Family("Granite MoE", "granitemoe", "GraniteMoeConfig", _FOUR),
    Family("Granite MoE Shared", "granitemoeshared", "GraniteMoeSharedConfig", {**_FOUR, "shared_intermediate_size": 48}),
    Family("Hunyuan MoE", "hunyuan_v1_moe", "HunYuanMoEV1Config",
           {"num_experts": 8, "moe_topk": 2, "intermediate_size": 32, "head_dim": 16}),
    Family("Mellum", "mellum", "MellumConfig", {**_EIGHT, "intermediate_size": 96, "head_dim": 16}),
    Family("MiniMax-M2", "minimax_m2", "MiniMaxM2Config", {**_FOUR, "head_dim": 16}),
    Family("Solar Open", "solar_open", "SolarOpenConfig", _GROUPED),
    Family("A.X K1", "axk1", "AXK1Config", {**_MLA, **_DEEPSEEK}, LATENT, "MLA, dense and experts"),
    Family("Aria (text)", "aria_text", "AriaTextConfig",
           {"intermediate_size": 32, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 2}),
    Family("Bailing hybrid (Ling 2.5)", "bailing_hybrid", "BailingHybridConfig",
           {**_MLA, **_DEEPSEEK, "num_experts": 8, "num_hidden_layers": 6, "linear_num_heads": 4, "linear_head_dim": 8,
            "rms_norm_eps": _EPS},
           f"{LATENT}, convolution, delta rule", "KDA and MLA, dense and experts"),
    Family("Flint", "flint", "FlintConfig",
           {**_EIGHT, "intermediate_size": 96, "head_dim": 16, "sliding_window": 4, "num_hidden_layers": 4},
           layers="sliding and full attention without positions, dense and experts"),
    Family("Gemma 4", "gemma4_text", "Gemma4TextConfig",
           {"intermediate_size": 96, "head_dim": 16, "global_head_dim": 32, "sliding_window": 4, "num_experts": 8,
            "enable_moe_block": True, "top_k_experts": 2, "moe_intermediate_size": 32, "num_hidden_layers": 6,
            "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
           layers="sliding and full attention, dense beside experts"),
    Family("Granite MoE hybrid", "granitemoehybrid", "GraniteMoeHybridConfig",
           {**_FOUR, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8,
            "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 16},
           MAMBA, "Mamba 2 and attention, experts"),
    Family("Granite MoE sliding window", "granitemoe_swa", "GraniteMoeSWAConfig",
           {**_FOUR, "shared_intermediate_size": 48, "sliding_window": 4},
           layers="sliding and full attention, experts"),
    Family("Hunyuan 3", "hy_v3", "HYV3Config",
           {**_EIGHT, "intermediate_size": 96, "head_dim": 16, "first_k_dense_replace": 1, "num_shared_experts": 1},
           layers="attention, dense and experts"),
    Family("Jamba", "jamba", "JambaConfig",
           {"num_hidden_layers": 4, "intermediate_size": 64, "num_experts": 4, "expert_layer_period": 2,
            "expert_layer_offset": 1, "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 8,
            "mamba_dt_rank": 8}, MAMBA, "Mamba and attention, dense and experts"),
    Family("Kimi Linear", "kimi_linear", "KimiLinearConfig",
           {**_MLA, **_DEEPSEEK, "num_experts": 8, "linear_num_heads": 4, "linear_head_dim": 8, "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]},
           f"{LATENT}, convolution, delta rule", "KDA and MLA without positions, dense and experts"),
    Family("Kolibri", "kolibri1", "Kolibri1Config",
           {**_EIGHT, "intermediate_size": 96, "head_dim": 16, "sliding_window": 4, "num_hidden_layers": 5},
           layers="sliding and full attention without positions, experts"),
    Family("Laguna", "laguna", "LagunaConfig",
           {**_EIGHT, "intermediate_size": 96, "head_dim": 16, "sliding_window": 4,
            "shared_expert_intermediate_size": 32}, layers="attention, dense and experts"),
    Family("LFM2 MoE", "lfm2_moe", "Lfm2MoeConfig",
           {**_EIGHT, "intermediate_size": 96, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
           "kv, convolution", "short convolution and attention, dense and experts"),
    Family("MiMo V2 Flash", "mimo_v2_flash", "MiMoV2FlashConfig",
           {**_DEEPSEEK, "n_group": 1, "topk_group": 1, "n_shared_experts": None, "head_dim": 24, "v_head_dim": 16,
            "sliding_window": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 24,
            "swa_v_head_dim": 16}, layers="sliding and full attention, dense and experts"),
    Family("MiniMax-01", "minimax", "MiniMaxConfig",
           {**_FOUR, "head_dim": 16, "num_hidden_layers": 4, "block_size": 8},
           "kv, linear attention", "lightning and full attention, experts"),
    Family("Nemotron-H", "nemotron_h", "NemotronHConfig",
           {"layer_types": ["mamba", "moe", "attention", "mlp"], "n_routed_experts": 8, "num_experts_per_tok": 2,
            "n_group": 4, "topk_group": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48,
            "intermediate_size": 96, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16,
            "n_groups": 2, "chunk_size": 16, "time_step_min": 1e-30}, MAMBA, "Mamba 2, attention, dense, experts",
           # transformers' decoding leaves the limit out, which its prefill applies; moec applies it always
           f"{CHECKED}; with time_step_min 1e-30"),
    Family("Qwen3-Next", "qwen3_next", "Qwen3NextConfig",
           {**_EIGHT, **_LINEAR, "num_hidden_layers": 4, "shared_expert_intermediate_size": 32, "head_dim": 16,
            "intermediate_size": 96}, DELTA, "gated delta net and attention, experts"),
    Family("Beam", "beam", "BeamConfig",
           {**_DEEPSEEK, "num_experts": 8, "head_dim": 16, "num_hidden_layers": 6, "sliding_window": 4},
           layers="sliding and full attention without positions, dense and experts"),
    Family("DBRX", "dbrx", "DbrxConfig",
           {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 512,
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}),
    Family("DeepSeek-V2", "deepseek_v2", "DeepseekV2Config",
           {**_MLA, **_DEEPSEEK, "norm_topk_prob": False, "topk_method": "group_limited_greedy"}, LATENT, "MLA, dense and experts"),
    Family("JetMoE", "jetmoe", "JetMoeConfig",
           {"kv_channels": 16, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
           layers="mixture of attention heads, experts"),
    Family("Llama 4", "llama4_text", "Llama4TextConfig",
           {"num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 32, "intermediate_size_mlp": 64,
            "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8},
           layers="chunked and full attention without positions, dense and experts"),
    Family("LongCat Flash", "longcat_flash", "LongcatFlashConfig",
           {**_MLA, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "n_routed_experts": 8, "zero_expert_num": 4,
            "moe_topk": 3, "num_hidden_layers": 4, "head_dim": 8},
           LATENT, "two MLA, dense beside experts, some of them the identity"),
    Family("Phi-MoE", "phimoe", "PhimoeConfig", _FOUR),
    Family("Qwen3.5 MoE", "qwen3_5_moe_text", "Qwen3_5MoeTextConfig",
           {**_EIGHT, **_LINEAR, "num_hidden_layers": 4, "shared_expert_intermediate_size": 32, "head_dim": 16},
           DELTA, "gated delta net and attention, experts"),
    Family("A.X K2", "axk2", "AXK2Config", {**_MLA, **_DEEPSEEK, **_INDEXER}, INDEXED,
           "sparse MLA, dense and experts"),
    Family("DeepSeek-V3.2", "deepseek_v32", "DeepseekV32Config", {**_MLA, **_DEEPSEEK, **_INDEXER, "head_dim": 8},
           INDEXED, "sparse MLA, dense and experts"),
    Family("dots3", "dots3_note_text", "Dots3NoteTextConfig",
           {**_MLA, **_DEEPSEEK, **_INDEXER, "n_group": 1, "topk_group": 1, "shared_experts_intermediate_size": 32,
            "head_dim": 24, "num_hidden_layers": 4, "sliding_window": 4, "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 16,
            "swa_qk_rope_head_dim": 8, "swa_v_head_dim": 16, "swa_head_dim": 24}, INDEXED,
           "sparse and sliding MLA, dense and experts"),
    Family("GLM MoE DSA (GLM-5)", "glm_moe_dsa", "GlmMoeDsaConfig", {**_MLA, **_DEEPSEEK, **_INDEXER}, INDEXED,
           "sparse MLA, dense and experts"),
    Family("Hunyuan 4", "hy_v4", "HYV4Config", {**_MLA, **_DEEPSEEK, **_INDEXER, "num_experts": 8}, INDEXED,
           "sparse MLA with sinks, hyper-connections, dense and experts"),
    Family("Mistral 4", "mistral4", "Mistral4Config", {**_MLA, **_DEEPSEEK}, LATENT, "MLA, dense and experts"),
    Family("Zaya", "zaya", "ZayaConfig",
           {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8, "router_hidden_size": 32,
            "num_hidden_layers": 4}, "kv, convolution, delayed values",
           "attention on convolved queries and keys, experts with a router over layers"),
    Family("Kimi K2.5 (text)", "kimi_k25", "Kimi_K25Config", {**_MLA, **_DEEPSEEK, "model_type": "deepseek_v3"}, LATENT,
           "MLA, dense and experts", whole={"vision_config": _VISION}),
    Family("Qwen3-VL MoE (text)", "qwen3_vl_moe", "Qwen3VLMoeConfig",
           {"intermediate_size": 96, "head_dim": 16, **_EIGHT}, whole={"vision_config": _VISION_QWEN}),
    Family("GLM-4.5V (text)", "glm4v_moe", "Glm4vMoeConfig",
           {**_DEEPSEEK, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2],
                                             "partial_rotary_factor": 0.5}}, layers="attention, dense and experts",
           whole={"vision_config": _VISION_QWEN}),
    Family("ERNIE 4.5 VL (text)", "ernie4_5_vl_moe", "Ernie4_5_VLMoeConfig",
           {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": [32, 16], "intermediate_size": 96,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]}},
           layers="attention, dense and experts", whole={"vision_config": _VISION_QWEN}),
    Family("DeepSeek-OCR 2 (text)", "deepseek_ocr2", "DeepseekOcr2Config",
           {**_DEEPSEEK, "mlp_layer_types": ["dense", "sparse", "sparse"]}, layers="attention, dense and experts",
           whole={"vision_config": {"sam_config": _SAM, "encoder_config": _VISION}}),
    Family("Step 3.7 (text)", "step3p7", "Step3p7Config",
           {"intermediate_size": 96, "head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "share_expert_dim": 32, "sliding_window": 4, "num_hidden_layers": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_sliding_attention_heads": 8,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "swiglu_limits": [None, 0.5, None, 0.7], "swiglu_limits_shared": [None, None, 0.6, 0.7],
            "moe_router_scaling_factor": 2.0}, layers="sliding and full attention, dense and experts",
           whole={"vision_config": _VISION}),
    Family("Muse Spark (text)", "muse_spark", "MuseSparkConfig",
           {"intermediate_size": 96, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "moe_hidden_size": 48, "sliding_window": 4, "num_hidden_layers": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "layer_rope_theta": [10000.0, 10000.0, 10000.0, 0]},
           layers="sliding and full attention without positions, dense and experts with a norm behind each",
           whole={"vision_config": _VISION, "audio_config": {"patch_sizes": [2], "hidden_sizes": [32], "depths": [1],
                                                             "num_hidden_layers": 1, "out_hidden_size": 64},
                  "out_hidden_size": 64, "projector_hidden_size": 32}),
    Family("MiniMax-M3 (text)", "minimax_m3_vl", "MiniMaxM3VLConfig",
           {"num_hidden_layers": 4, "head_dim": 16, "intermediate_size": 32, "num_local_experts": 8,
            "num_experts_per_tok": 2, "dense_intermediate_size": 96, "shared_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "rotary_dim": 8, "index_n_heads": 2,
            "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 3, "index_local_blocks": 1,
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "full_attention"]},
           "kv, index keys", "attention to chosen blocks and full attention, dense and experts",
           "prefill, cached steps, greedy tokens", padding=False, whole={"vision_config": _VISION}),
    Family("Mistral Large 4 (text)", "mistral_large4", "MistralLarge4Config",
           {**_MLA, **_DEEPSEEK, **_INDEXER, "head_dim": 8, "num_hidden_layers": 6,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse", "sparse"],
            "no_rope_layers": [1, 0, 1, 1, 0, 1], "kv_source_layers": [0, 1, 2, 2, 1, 5],
            "indexer_types": ["full", "full", "shared", "full", "shared", "full"]}, INDEXED,
           "sparse MLA, some without positions or with the latents of an earlier layer, dense and experts",
           whole={"vision_config": {**_VISION, "model_type": "pixtral"}}),
    Family("Inkling (text)", "inkling_text", "InklingTextConfig",
           {"intermediate_size": 96, "head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "n_shared_experts": 2, "sliding_window_size": 4, "num_hidden_layers": 4,
            "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "d_rel": 8,
            "rel_extent": 12, "log_scaling_n_floor": 10, "route_scale": 2.0, "unpadded_vocab_size": 120,
            "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid", "hybrid_sliding"],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "logits_mup_width_multiplier": 2.0},
           "kv, convolution", "sliding and full attention by distance, short convolutions, dense and experts"),
    Family("Inkling 2 (text)", "inkling2", "Inkling2Config",
           {"head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "sliding_window_size": 4, "num_hidden_layers": 5, "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2, "swa_head_dim": 16, "d_rel": 8, "rel_extent": 12, "log_scaling_n_floor": 10,
            "route_scale": 2.0, "unpadded_vocab_size": 120, "n_layers_per_attn_res_block": 3,
            "qk_l2_clip_threshold": 3.0, "rel_l2_clip_threshold": 2.0,
            "layer_types": ["hybrid_sliding"] * 3 + ["hybrid"] * 2},
           "kv, convolution", "sliding and full attention by distance, short convolutions, experts, attention over layers",
           whole={"vision_config": {**_VISION, "text_hidden_size": 64}}),
    Family("Inkling 2 Loop (text)", "inkling2_loop", "Inkling2LoopConfig",
           {"head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "sliding_window_size": 4, "num_hidden_layers": 5, "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2, "swa_head_dim": 16, "d_rel": 8, "rel_extent": 12, "log_scaling_n_floor": 10,
            "route_scale": 2.0, "unpadded_vocab_size": 120, "n_layers_per_attn_res_block": 2,
            "qk_l2_clip_threshold": 3.0, "rel_l2_clip_threshold": 2.0, "loop_layer_index_start": 2,
            "loop_layer_index_end": 4, "loop_num_passes": 3, "loop_gate_rank": 8,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid", "hybrid_sliding"]},
           "kv, convolution, for each pass", "as Inkling 2, some layers in three passes with messages to the next one",
           whole={"vision_config": {**_VISION, "text_hidden_size": 64}}, needs="transformers 5.24"),
    Family("Lara Mini", "lara_mini", "LaraMiniConfig",
           {**_EIGHT, **_LINEAR, "num_hidden_layers": 4, "shared_expert_intermediate_size": 32, "head_dim": 16,
            "sliding_window": 4}, DELTA, "gated delta net, sliding and full attention, experts", needs="transformers 5.24"),
    Family("Qwen3-Omni MoE (thinker)", "qwen3_omni_moe_thinker", "Qwen3OmniMoeThinkerConfig",
           {"intermediate_size": 96, "head_dim": 16, **_EIGHT},
           whole={"vision_config": _VISION_QWEN, "vision_start_token_id": 125, "audio_start_token_id": 126,
                  "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
                                   "encoder_ffn_dim": 32, "output_dim": 64, "downsample_hidden_size": 32}}),
    Family("GLM-5 Next (text)", "glm5_next", "Glm5NextConfig",
           {**_MLA, **_DEEPSEEK, **_INDEXER, "qk_rope_head_dim": 0, "index_n_heads": 32, "index_topk": 6,
            "index_kpool": 3, "linear_num_heads": 4, "linear_head_dim": 8, "rms_norm_eps": _EPS, "swiglu_limit": 0.7,
            "num_hidden_layers": 5, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse"],
            "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention", "full_attention"],
            "indexer_types": ["full", "full", "shared", "full", "full"]},
           "latent kv, index keys, convolution, delta rule",
           "KDA and MLA to chosen blocks without positions, hyper-connections, dense and experts",
           whole={"vision_config": _VISION_QWEN}),
    Family("Llama (no experts)", "llama", "LlamaConfig", {"intermediate_size": 96}, layers="attention, dense"),
    Family("Gemma 3 (no experts)", "gemma3_text", "Gemma3TextConfig",
           {"intermediate_size": 96, "head_dim": 16, "sliding_window": 4}, layers="full and sliding attention, dense"),
    Family("GPT-NeoX (no experts)", "gpt_neox", "GPTNeoXConfig", {"intermediate_size": 96}, layers="attention, dense"),
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
