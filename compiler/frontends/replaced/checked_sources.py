"""Hashes of the code of transformers that moec's functions stand for, as it was when their numbers were compared.

More than one hash: modelling files, or versions of transformers, differ, and each was compared (see stand_ins.py).
"""

from __future__ import annotations

from collections.abc import Mapping

CHECKED: Mapping[str, tuple[str, ...]] = {
    "AXK2Indexer.forward": ("7a28cd9271f5c411", "77cb38e4b2ca4bf2"),
    "DbrxExperts.forward": ("a839bd2837effeb3",),
    "DeepseekV2RotaryEmbedding.forward": ("212f6676c0851223", "ea0801f578afb460"),
    "DeepseekV32Indexer.forward": ("7a28cd9271f5c411", "77cb38e4b2ca4bf2"),
    "Dots3NoteTextIndexer.forward": ("07892f2d51c815f8", "70b9832510f61e69"),
    "Glm4vMoeTextRotaryEmbedding.forward": ("887bf3b9683e2fba", "aaa5abf307c3ea1c"),
    "Glm5NextTextAttention.build_attention_mask_from_topk": ("4d8eabeef3f1ed73",),
    "Glm5NextTextIndexer.forward": ("54d909f7956cfafd", "5ce40afb401f55ec"),
    "GlmMoeDsaIndexer.forward": ("07892f2d51c815f8", "70b9832510f61e69"),
    "HYV4Indexer.forward": ("acb9a563e52f4829", "0afd4694f2ef9072"),
    "Inkling2DynamicShortConvolution.forward": ("b36531afae739821", "0e48b4fc587713cc"),
    "Inkling2LoopDynamicShortConvolution.forward": ("0e48b4fc587713cc",),
    "JetMoeMoA.map": ("4240ee2690d6f0db",),
    "JetMoeMoA.reduce": ("e2dc096cf7155014",),
    "JetMoeMoE.forward": ("cb7a4adcf545b5ff",),
    "Llama4TextMoe.forward": ("3089415137fa1e5f",),
    "Llama4TextRotaryEmbedding.forward": ("212f6676c0851223", "ea0801f578afb460"),
    "LongcatFlashExperts.forward": ("163c28f6df9a2099",),
    "MiniMaxCache": ("d09ef6a2596b8a9a",),
    "MiniMaxLightningAttention.forward": ("1ab9d68cd484e9d7", "3993794b68d32f3f"),
    "MiniMaxM3VLIndexer.forward": ("cd2b07e0ae80ab79", "e54dba4274737a3d"),
    "MistralLarge4TextIndexer.forward": ("dcf77a4dd3bcdb97", "059f5c37d09822ab"),
    "PhimoeRotaryEmbedding.forward": ("0b2b0b37e06259f9", "936dc36fa316be68"),
    "Qwen3OmniMoeThinkerTextRotaryEmbedding.forward": ("c444a2024ad2a188", "5530740d47422370"),
    "Qwen3VLMoeTextRotaryEmbedding.forward": ("c444a2024ad2a188", "5530740d47422370"),
    "Qwen3_5MoeTextRotaryEmbedding.forward": ("c444a2024ad2a188", "5530740d47422370"),
    "Step3p7Experts.forward": ("2723db1c901fc7f9",),
    "causal_conv1d_fn": ("eb951309ef37f924",),
    "chunk_kimi_delta_attention": ("82fa450f7e27b619",),
    "create_recurrent_attention_mask": ("f26e025b9b5353c5", "0e562e6c82f700f8"),
    "dynamic_rope_update": ("3a661e8d63097cfc",),
    "mamba2_chunk_scan": ("71a9265142306815",),
    "mamba_selective_scan": ("bc883e19f416747f",),
    "modeling_deepseek_v2.apply_rotary_emb": ("4505eaafc8b0e546",),
    "modeling_deepseek_v4": ("09ef5d58b082f1ef", "2fd7afff4206b17e"),
    "modeling_llama4.apply_rotary_emb": ("b0730131d0a94f2a",),
    "torch_chunk_gated_delta_rule": ("755db4527bdb5637",),
}
