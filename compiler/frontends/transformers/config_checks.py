"""Judges the numbers of a config before any model is built: each by what its key means, and some by each other.

No family is known here. Keys of one meaning have many names (`num_experts`, `n_routed_experts`); what no rule knows is
looked at for NaN only. Configs of towers, for images say, are not part of the program and are left alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeGuard

import torch

from ...errors import MoecError

MAX_LAYERS, MAX_EXPERTS, MAX_SIZE = 2048, 65536, 2**31 - 1

LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
    "num_selected_experts",
)  # fmt: skip
GROUPS = ("n_group", "num_expert_group")
HEADS = (
    ("num_attention_heads", "num_key_value_heads"), ("swa_num_attention_heads", "swa_num_key_value_heads"),
    ("num_attention_heads", "num_kv_heads"), ("n_heads", "kv_n_heads"),
)  # fmt: skip
SCALINGS = ("rope_scaling", "rope_parameters")

_TOWER = re.compile(
    r"vision|visual|image|audio|speech|video|talker|code2wav|token2wav|sam_|quantization|generation|aligner"
)
_INFINITE = re.compile(r"limit|clip|max|threshold|bound")  # keys whose infinity says that there is no bound
_COUNTS = re.compile(
    r"vocab_size|hidden_size|d_model|n_embd|((swa|global|linear|num|n)_)*(attention_|key_value_|key_|value_)?heads"
    r"|kv_n_heads|num_kv_heads|n_head|max_position_embeddings|original_max_position_embeddings|max_seq_len|n_positions"
    r"|attention_chunk_size|index_topk|index_head_dim|index_n_heads|(.*_)?conv_kernel(_size|_dim)?|conv_L_cache"
    r"|(mamba_)?(d_conv|d_state|d_head|n_groups|chunk_size)|mamba_head_dim|ssm_state_size|linear_(key_|value_)?head_dim"
)
_WHOLE = re.compile(
    r"(.*_)?head_dim|(moe_)?intermediate_size|(q|kv)_lora_rank|n(um)?_shared_experts|n_group|topk_group"
)
_SIZES = re.compile(r"(.*_)?(size|dim|dims|rank|heads|experts|groups?|topk|top_k)")
_LENGTHS = re.compile(r"(.*_)?(window|window_size|length|len|positions|pattern)")
_SHARES = ("partial_rotary_factor", "rotary_pct")
_BASE = re.compile(r"(.*_)?rope_theta|rope_local_base_freq|rotary_emb_base|rope_base")
_EPSILON = re.compile(r"(.*_)?(eps|epsilon)(_.*)?")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")

# what rope_parameters hold: each is divided by, or the logarithm of it is taken
_POSITIVE_IN_ROPE = (
    "factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "rope_theta",
    "short_factor", "long_factor", "alpha",
)  # fmt: skip


def check_config(values: Mapping[str, Any], where: str) -> None:
    """Raise MoecError for a value that no model can be made with, by its key; `values` are those of config.json."""
    for prefix, scope in _config_scopes(values, ""):
        for key, value in scope.items():
            _check_value(key, f"{prefix}{key}", value, where)
        for name in SCALINGS:
            if scope.get(name) is not None and not isinstance(scope[name], Mapping):
                _refuse_value(f"{prefix}{name}", scope[name], "it has to be an object, or null", where)
            _check_rope(scope.get(name) or {}, f"{prefix}{name}.", where)
        _check_relations(scope, prefix, where)


def check_sizes(values: Mapping[str, Any], where: str) -> None:
    """Raise MoecError for sizes that do not fit each other where the config's class has filled in what was not said."""
    _check_relations(values, "", where)
    heads, width, head = values.get("num_attention_heads"), values.get("hidden_size"), values.get("head_dim", 0)
    if _is_count(heads) and _is_count(width) and head is None and not values.get("kv_lora_rank") and width % heads:
        _refuse_value(
            "num_attention_heads", heads, f"it does not divide hidden_size {width}, and there is no head_dim", where
        )
    layers = min((values[key] for key in LAYERS if _is_int(values.get(key))), default=0)
    for key in ("layer_types", "mlp_layer_types", "indexer_types"):
        kinds = values.get(key)
        if isinstance(kinds, (list, tuple)) and len(kinds) < layers:
            _refuse_value(key, f"a list of {len(kinds)}", f"there are {layers} layers", where)


def _is_dtype(value: Any) -> bool:
    """Return whether a value names a dtype of torch; a table (one for each part of a model) is left to the library."""
    if not isinstance(value, str):
        return value is None or isinstance(value, Mapping)
    return value == "auto" or isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)


# --- the parts of a config ---------------------------------------------------------------------------------------


def _config_scopes(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the config and every config in it that belongs to the text, with the prefix of its keys.

    `attn_config` and `ffn_config` (DBRX) are parts of the same config: their keys stand beside the others.
    """
    parts = {k: v for k, v in values.items() if k in ("attn_config", "ffn_config") and isinstance(v, Mapping)}
    yield prefix, {**values, **{key: value for part in parts.values() for key, value in part.items()}}
    for key, value in values.items():
        if isinstance(value, Mapping) and key.endswith("_config") and key not in parts and not _TOWER.search(key):
            yield from _config_scopes(value, f"{prefix}{key}.")


def _first_whole_number(scope: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, int] | None:
    """Return the first of several keys that has a whole number."""
    return next(((key, scope[key]) for key in keys if _is_int(scope.get(key))), None)


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> TypeGuard[int]:
    return _is_int(value) and value > 0


def _numbers_in(value: Any) -> list[int | float]:
    """Return the numbers of a value: its own, or those of a list."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [n for n in items if isinstance(n, (int, float)) and not isinstance(n, bool)]


def _refuse_value(key: str, value: Any, why: str, where: str) -> NoReturn:
    shown = value if isinstance(value, str) and value.startswith("a list") else f"{value!r:.60}"
    raise MoecError(f"{key} is {shown}: {why}", where=where, todo=f"correct {key}")


# --- each value by itself ----------------------------------------------------------------------------------------


def _check_value(key: str, name: str, value: Any, where: str) -> None:
    if key == "quantization_config" and value is not None and not isinstance(value, Mapping):
        _refuse_value(name, value, "it has to be an object, or null", where)
    if key in SCALINGS or _TOWER.search(key):
        return
    if key in ("dtype", "torch_dtype") and not _is_dtype(value):
        _refuse_value(name, value, "it has to be the name of a torch dtype, such as bfloat16", where)
    counts = key in LAYERS or key in EXPERTS or key in CHOSEN or bool(_COUNTS.fullmatch(key))
    sizes = counts or bool(_SIZES.fullmatch(key))
    items = value if isinstance(value, (list, tuple)) else (value,)  # a count for each layer, of some families
    if (counts or _WHOLE.fullmatch(key)) and any(isinstance(item, (str, float, bool, Mapping, list)) for item in items):
        _refuse_value(name, value, "it has to be a whole number", where)
    for number in _numbers_in(value):
        if isinstance(number, float) and (math.isnan(number) or (math.isinf(number) and not _INFINITE.search(key))):
            _refuse_value(name, number, "it has to be a number that is finite", where)
        if key in LAYERS and not 1 <= number <= MAX_LAYERS:
            _refuse_value(name, number, f"models have 1 to {MAX_LAYERS} layers", where)
        if key in EXPERTS and not 0 <= number <= MAX_EXPERTS:
            _refuse_value(name, number, f"models have at most {MAX_EXPERTS} experts", where)
        if _COUNTS.fullmatch(key) and number < 1:
            _refuse_value(name, number, "it has to be at least 1", where)
        if (sizes or _LENGTHS.fullmatch(key)) and number < 0:
            _refuse_value(name, number, "it must not be negative", where)
        if sizes and number > MAX_SIZE:
            _refuse_value(name, number, "no tensor is that large", where)
        if key in _SHARES and not 0 <= number <= 1:
            _refuse_value(name, number, "it is a share of the head, from 0 to 1", where)
        if _BASE.fullmatch(key) and (number < 0 or (number == 0 and not isinstance(value, list))):
            _refuse_value(name, number, "rotary embeddings need a base above 0", where)
        if _EPSILON.fullmatch(key) and number < 0:
            _refuse_value(name, number, "a norm's epsilon must not be negative", where)
        if key in _DIVISORS and number == 0:
            _refuse_value(name, number, "the logits are divided by it", where)


def _check_rope(scope: Mapping[str, Any], prefix: str, where: str) -> None:
    for key, value in scope.items():
        if isinstance(value, Mapping):
            _check_rope(value, f"{prefix}{key}.", where)
        if key in ("rope_type", "type") and not isinstance(value, str):
            _refuse_value(f"{prefix}{key}", value, "it has to be a name", where)
        wrong = (str, bool) if key != "rope_theta" else (str, bool, list, Mapping, type(None))
        if key in _POSITIVE_IN_ROPE and isinstance(value, wrong):
            _refuse_value(f"{prefix}{key}", value, "it has to be a number", where)
        for number in _numbers_in(value):
            if isinstance(number, float) and not math.isfinite(number):
                _refuse_value(f"{prefix}{key}", number, "it has to be a number that is finite", where)
            if number > 10**18:
                _refuse_value(f"{prefix}{key}", number, "no angle is computed with a number that large", where)
            if (key in _POSITIVE_IN_ROPE or key == "original_max_position_embeddings") and number <= 0:
                _refuse_value(f"{prefix}{key}", number, "it has to be above 0", where)
            if key in _SHARES and not 0 <= number <= 1:
                _refuse_value(f"{prefix}{key}", number, "it is a share of the head, from 0 to 1", where)


# --- values by each other ----------------------------------------------------------------------------------------


def _check_relations(scope: Mapping[str, Any], prefix: str, where: str) -> None:
    _check_experts(scope, prefix, where)
    for many, few in HEADS:
        heads, shared = scope.get(many), scope.get(few)
        if _is_count(heads) and _is_count(shared) and heads % shared:
            _refuse_value(f"{prefix}{few}", shared, f"it does not divide {many} {heads}", where)
    if scope.get("head_dim") == 0 and not scope.get("qk_nope_head_dim"):
        _refuse_value(f"{prefix}head_dim", 0, "a head has at least one channel", where)
    turned = scope.get("qk_rope_head_dim")
    if _is_int(turned) and turned % 2:
        _refuse_value(f"{prefix}qk_rope_head_dim", turned, "rotary embeddings turn pairs of numbers", where)
    if scope.get("kv_lora_rank") == 0 and scope.get("qk_nope_head_dim"):
        _refuse_value(f"{prefix}kv_lora_rank", 0, "keys and values are made of that many numbers", where)
    vocabulary, padding = scope.get("vocab_size"), scope.get("pad_token_id")
    if _is_count(vocabulary) and _is_int(padding) and not -vocabulary <= padding < vocabulary:
        _refuse_value(f"{prefix}pad_token_id", padding, f"it is beyond the vocabulary (vocab_size {vocabulary})", where)


def _check_experts(scope: Mapping[str, Any], prefix: str, where: str) -> None:
    experts, chosen, groups = (
        _first_whole_number(scope, EXPERTS),
        _first_whole_number(scope, CHOSEN),
        _first_whole_number(scope, GROUPS),
    )
    if experts is None or experts[1] == 0:
        return
    count = experts[1] + (scope.get("zero_expert_num") or 0)  # experts that do nothing (LongCat) can be chosen too
    if chosen and chosen[1] < 1:
        _refuse_value(prefix + chosen[0], chosen[1], "a token goes to at least one expert", where)
    if chosen and chosen[1] > count:
        _refuse_value(prefix + chosen[0], chosen[1], f"there are {count} experts ({experts[0]})", where)
    width = scope.get("moe_intermediate_size")
    if _is_int(width) and width < 1:
        _refuse_value(f"{prefix}moe_intermediate_size", width, f"it is the width of {count} experts", where)
    kept = scope.get("topk_group")
    if groups is None or scope.get("topk_method") == "greedy":
        return
    name = prefix + groups[0]
    if groups[1] < 1 or experts[1] % groups[1]:
        _refuse_value(name, groups[1], f"it does not divide {experts[1]} experts ({experts[0]})", where)
    if _is_int(kept) and not 1 <= kept <= groups[1]:
        _refuse_value(f"{prefix}topk_group", kept, f"there are {groups[1]} groups ({groups[0]})", where)
    if chosen and _is_count(kept) and chosen[1] > kept * (experts[1] // groups[1]):
        held = f"the {kept} groups that a token may use hold {kept * (experts[1] // groups[1])} experts"
        _refuse_value(prefix + chosen[0], chosen[1], held, where)
