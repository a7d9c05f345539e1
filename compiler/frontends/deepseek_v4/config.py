"""What a DeepSeek-V4 config says, in one form: transformers reads both dialects of config.json into the same object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import MoecError
from ...ir.activation import Activation

SPARSE, HEAVY, SLIDING = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"
SCORES = ("sqrtsoftplus", "sigmoid", "softmax")


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: tokens in a compressed entry (0: none), whether an indexer chooses entries, hash routing."""

    ratio: int
    sparse: bool
    hashed: bool


@dataclass(frozen=True)
class Settings:
    """The numbers of a model. `frequencies` are the rope's, of layers without entries (False) and with them (True)."""

    layers: tuple[LayerKind, ...]
    vocabulary: int
    hidden: int
    heads: int
    head: int
    rope: int
    q_rank: int
    groups: int
    o_rank: int
    window: int
    index_heads: int
    index_head: int
    index_topk: int
    experts: int
    chosen: int
    inner: int
    limit: float
    score: str
    routed_scale: float
    streams: int
    sinkhorn: int
    stream_eps: float
    eps: float
    context: int
    frequencies: Mapping[bool, tuple[float, ...]]

    @property
    def activation(self) -> dict[str, Activation]:
        """The attribute of expert ops, where it is not the usual one, that bounds what goes into the activation."""
        return {"act": Activation(limit=self.limit)} if math.isfinite(self.limit) else {}


def read_settings(config: Any) -> Settings:
    """Return the settings of transformers' DeepseekV4Config; MoecError names the key that is not understood."""
    _refuse_unsupported(config)
    rates = config.compress_rates
    layers = tuple(
        LayerKind(0 if kind == SLIDING else int(rates[kind]), kind == SPARSE, routing == "hash_moe")
        for kind, routing in zip(config.layer_types, config.mlp_layer_types, strict=True)
    )
    return Settings(
        layers=layers, vocabulary=config.vocab_size, hidden=config.hidden_size, heads=config.num_attention_heads,
        head=config.head_dim, rope=config.qk_rope_head_dim, q_rank=config.q_lora_rank, groups=config.o_groups,
        o_rank=config.o_lora_rank, window=config.sliding_window, index_heads=config.index_n_heads,
        index_head=config.index_head_dim, index_topk=config.index_topk, experts=config.n_routed_experts,
        chosen=config.num_experts_per_tok, inner=config.moe_intermediate_size,
        limit=float(config.swiglu_limit or math.inf), score=config.scoring_func,
        routed_scale=float(config.routed_scaling_factor), streams=config.hc_mult, sinkhorn=config.hc_sinkhorn_iters,
        stream_eps=config.hc_eps, eps=config.rms_norm_eps, context=config.max_position_embeddings,
        frequencies={
            compressed: _rope_frequencies(config, config.rope_parameters["compress" if compressed else "main"])
            for compressed in (False, True)
        },
    )  # fmt: skip


def _refuse_unsupported(config: Any) -> None:
    """Raise MoecError for a setting that would change the program in a way that is not built here."""
    wanted = {
        "hidden_act": ("silu",), "scoring_func": SCORES, "norm_topk_prob": (True,), "n_shared_experts": (1,),
        "num_key_value_heads": (1,), "attention_bias": (False,), "mlp_bias": (False,), "tie_word_embeddings": (False,),
    }  # fmt: skip
    for key, known in wanted.items():
        value = getattr(config, key, known[0])
        if value not in known:
            raise MoecError(
                f"{key} is {value!r} in the config of a DeepSeek-V4 model",
                todo=f"understood: {', '.join(map(repr, known))}",
            )
    for kind in {SPARSE, HEAVY}.intersection(config.layer_types):
        if int(config.compress_rates.get(kind) or 0) < 1:
            raise MoecError(f"compress_rates has no number of tokens for {kind}")


def _rope_frequencies(config: Any, rope: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the angle of each pair of numbers for one position, in float32 as transformers computes it.

    YaRN (Peng et al. 2023) divides slow frequencies by the factor, keeps fast ones, and mixes in between.
    """
    width = config.qk_rope_head_dim
    base, kind = float(rope["rope_theta"]), rope.get("rope_type", rope.get("type", "default"))
    plain = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if kind == "default":
        return tuple(plain.tolist())
    scale = rope.get("attention_factor")
    if kind != "yarn" or scale != 1.0:
        raise MoecError(
            f"rope_type {kind!r} with attention_factor {scale} is not understood in a DeepSeek-V4 model",
            todo="default is, and yarn with an attention_factor of 1",
        )
    length = rope.get("original_max_position_embeddings") or config.max_position_embeddings

    def turning(rotations: float) -> float:
        """Return the pair that makes so many rotations in the original context."""
        return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = turning(float(rope.get("beta_fast") or 32)), turning(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    slow = ramp.clamp(0, 1)
    return tuple((plain / float(rope["factor"]) * slow + plain * (1 - slow)).tolist())
