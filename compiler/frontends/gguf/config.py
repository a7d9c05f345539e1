"""The transformers config of a GGUF file: made of its metadata, or a config.json beside it that agrees with that.

What the metadata has to say is what llama.cpp requires; nothing is taken from transformers' defaults. Sizes that the
tensors have too are compared with these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import MoecError
from ...weights.ggml import BLOCKS
from ...weights.sources.gguf import Gguf
from ..skeleton import read_config
from . import rope as gguf_rope
from .metadata import Keys

# general.architecture -> model_types of transformers that are stored under it
ARCHITECTURES = {
    "llama": ("mixtral", "llama", "mistral"), "qwen2moe": ("qwen2_moe",), "qwen3moe": ("qwen3_moe",),
    "olmoe": ("olmoe",), "qwen2": ("qwen2",), "qwen3": ("qwen3",),
}  # fmt: skip
_MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
_BESIDE = "put the model's config.json beside the file, or give the safetensors checkpoint"
_BELONG = "remove it, or bring those that belong together"

# a size that a key names -> the tensor and the axis that have it
_SIZES = (
    ("embedding_length", "token_embd.weight", 1), ("vocab_size", "token_embd.weight", 0),
    ("expert_count", "blk.0.ffn_gate_inp.weight", 0), ("expert_feed_forward_length", "blk.0.ffn_up_exps.weight", 1),
    ("expert_shared_feed_forward_length", "blk.0.ffn_up_shexp.weight", 0),
    ("feed_forward_length", "blk.0.ffn_up.weight", 0),
)  # fmt: skip


def gguf_config(opened: Gguf, file: Path) -> Any:
    """Return the transformers config of a GGUF file; MoecError names the key that is missing, wrong or not understood."""
    keys = Keys.of(opened.metadata, _checked_architecture(opened, file), file)
    beside = file.parent / "config.json"
    return _read_beside(keys, opened, beside) if beside.is_file() else _config_from_metadata(keys, opened)


def _checked_architecture(opened: Gguf, file: Path) -> str:
    architecture, kind = opened.metadata.get("general.architecture"), opened.metadata.get("general.type", "model")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise MoecError(
            f"GGUF files of architecture {architecture!r:.80} are not understood",
            where=str(file),
            todo=f"there are {', '.join(ARCHITECTURES)}; or give the safetensors checkpoint",
        )
    if kind != "model":
        raise MoecError(
            f"general.type is {kind!r:.80}: this is no model", where=str(file), todo="give the model's file"
        )
    version = opened.metadata.get("general.quantization_version", 2)
    if opened.kinds and version != 2:
        what = f"general.quantization_version is {version!r:.80}: only version 2 of the block types is read"
        raise MoecError(what, where=str(file), todo="convert the model again with a current llama.cpp")
    return architecture


def _read_beside(keys: Keys, opened: Gguf, path: Path) -> Any:
    """Return the config of config.json, which has to agree with what the file says."""
    config = read_config(path.parent)
    model_type = config.model_type
    if model_type not in ARCHITECTURES[keys.architecture]:
        what = f"config.json is of model_type {model_type!r}, the file of architecture {keys.architecture!r}"
        raise MoecError(what, where=str(path), todo=_BELONG)
    keys.require_neutral()
    stated = {**_stated_values(keys, model_type), "rope_theta": ("rope.freq_base", keys.real("rope.freq_base"))}
    told = {**config.to_dict(), "rope_theta": config.rope_parameters.get("rope_theta")}
    told["head_dim"] = told.get("head_dim") or config.hidden_size // config.num_attention_heads
    del stated["max_position_embeddings"]  # how far positions go changes no numbers
    for attribute, (key, value) in stated.items():
        if key not in keys or told.get(attribute) is None or math.isclose(told[attribute], value, rel_tol=1e-6):
            continue
        what = f"config.json has {attribute} {told[attribute]}, but {keys.full(key)} in the file is {value}"
        raise MoecError(what, where=str(path), todo=_BELONG)
    _check_blocks(opened, config.num_hidden_layers, "num_hidden_layers", path)
    _check_scaling(keys, opened, config, path)
    config.tie_word_embeddings = _is_tied(opened)
    return config


def _check_scaling(keys: Keys, opened: Gguf, config: Any, path: Path) -> None:
    """Raise MoecError where the file scales its rotary embeddings and config.json does so in another way."""
    kind = keys.text("rope.scaling.type", "linear")
    factor = keys.real("rope.scaling.factor") or keys.real("rope.scale_linear") or 1.0
    told = config.rope_parameters
    scaled = kind not in ("none", "linear") or (kind == "linear" and factor != 1)
    if scaled and (told["rope_type"] != kind or not math.isclose(told.get("factor") or factor, factor, rel_tol=1e-6)):
        what = f"config.json has rope_type {told['rope_type']!r}, but {keys.full('rope.scaling.type')} is {kind!r}"
        raise MoecError(f"{what} with a factor of {factor:g}", where=str(path), todo=_BELONG)
    gguf_rope.check_config(keys, opened, config)


def _config_from_metadata(keys: Keys, opened: Gguf) -> Any:
    """Return the config that the metadata says."""
    from transformers import AutoConfig

    experts = keys.count("expert_count", least=0, default=0) or 0
    model_type = ARCHITECTURES[keys.architecture][0 if experts or keys.architecture != "llama" else 1]
    _require_keys(keys, model_type)
    keys.check(bool(experts) == (model_type in _MOE), "expert_count", f"is {experts}")
    values = {
        attribute: value for attribute, (_, value) in _stated_values(keys, model_type).items() if value is not None
    }
    _check_blocks(opened, values["num_hidden_layers"], keys.full("block_count"), keys.file)
    used, heads = values.get("num_experts_per_tok", 0), values["num_attention_heads"]
    keys.check(used <= experts, "expert_used_count", f"is {used}, and there are {experts} experts")
    values.setdefault("num_key_value_heads", heads)
    kv = values["num_key_value_heads"]
    keys.check(heads % kv == 0, "attention.head_count_kv", f"is {kv}, which does not divide {heads} heads")
    width = values["hidden_size"]
    if "head_dim" not in values:
        keys.check(width % heads == 0, "attention.head_count", f"is {heads}, which does not divide {width} channels")
        values["head_dim"] = width // heads
    head = values["head_dim"]
    keys.check(head % 2 == 0, "attention.key_length", f"is {head}; it has to be even")
    _check_sizes(keys, opened, values)
    values["rope_parameters"] = gguf_rope.rope_parameters(keys, opened, head, values["max_position_embeddings"])
    values["tie_word_embeddings"] = _is_tied(opened)
    values["vocab_size"] = _vocabulary_size(keys, opened)
    values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # transformers' are another tokenizer's
    if model_type == "qwen2_moe":
        # the tensor says how wide it is where the key does not
        shared = _tensor_shape(opened, "blk.0.ffn_up_shexp.weight")
        values.setdefault("shared_expert_intermediate_size", shared[0] if shared else 0)
    _check_window(keys, values["max_position_embeddings"])
    keys.require_neutral()
    keys.require_known()
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what = f"transformers does not accept the config of the metadata: {lines[0]}"
        raise MoecError(what, where=str(keys.file), todo=_BESIDE) from error


def _stated_values(keys: Keys, model_type: str) -> dict[str, tuple[str, Any]]:
    """Return what the metadata says of the config: an attribute -> (the key, its value or None)."""
    moe = model_type in _MOE
    names = {
        "max_position_embeddings": "context_length", "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length", "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    }  # fmt: skip
    found: dict[str, tuple[str, Any]] = {attribute: (key, keys.count(key)) for attribute, key in names.items()}
    found["rms_norm_eps"] = ("attention.layer_norm_rms_epsilon", keys.real("attention.layer_norm_rms_epsilon"))
    dense = keys.count("feed_forward_length", least=0)
    wide = keys.count("expert_feed_forward_length", least=0) or None
    shared = keys.count("expert_shared_feed_forward_length", least=0)
    used, experts = keys.count("expert_used_count", least=0), keys.count("expert_count", least=0)
    if not moe:
        found["intermediate_size"] = ("feed_forward_length", dense)
        for key, value in (("expert_used_count", used), ("expert_feed_forward_length", wide), (_SHARED, shared)):
            keys.check(not value, key, f"is {value}, in a model without experts")
        return found
    found["num_local_experts" if model_type == "mixtral" else "num_experts"] = ("expert_count", experts)
    keys.check(used != 0, "expert_used_count", "is 0")
    found["num_experts_per_tok"] = ("expert_used_count", used)
    if model_type in ("qwen2_moe", "qwen3_moe"):
        if wide is None and dense and used:
            wide = dense // used  # as llama.cpp has it
        found["moe_intermediate_size"] = ("expert_feed_forward_length", wide)
        found["intermediate_size"] = ("feed_forward_length", dense or wide)
    else:
        found["intermediate_size"] = ("expert_feed_forward_length" if wide else "feed_forward_length", wide or dense)
    if model_type == "qwen2_moe":
        found["shared_expert_intermediate_size"] = (_SHARED, shared or None)
    else:
        keys.check(not shared, _SHARED, f"is {shared}: these models have no shared experts")
    count = keys.count("expert_shared_count", least=0, default=0)
    most = 1 if model_type == "qwen2_moe" else 0
    keys.check(count in (0, most), "expert_shared_count", f"is {count}: these models have {most} shared experts")
    normed = keys.flag("expert_weights_norm")
    if model_type == "mixtral":
        keys.check(normed is not False, "expert_weights_norm", "is false: these models always scale to a sum of 1")
    else:
        found["norm_topk_prob"] = ("expert_weights_norm", model_type == "qwen3_moe" if normed is None else normed)
    return found


_SHARED = "expert_shared_feed_forward_length"


def _require_keys(keys: Keys, model_type: str) -> None:
    """Raise MoecError for a key that has to be there."""
    always = (
        "block_count", "context_length", "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon",
    )  # fmt: skip
    width = () if "expert_feed_forward_length" in keys else ("feed_forward_length",)
    moe = ("expert_count", "expert_used_count") if model_type in _MOE else ()
    missing = [key for key in (*always, *moe, *width) if key not in keys]
    if missing:
        what = f"a config cannot be made of it: the metadata has no {keys.full(missing[0])}"
        raise MoecError(what, where=str(keys.file), todo=_BESIDE)


def _check_window(keys: Keys, context: int) -> None:
    """Raise MoecError for a sliding window: llama.cpp gives these architectures none, transformers some of them."""
    window = keys.count("attention.sliding_window", least=0, default=0)
    if window and window < context:
        raise keys.error("attention.sliding_window", f"is {window}, which these models can mean or not", todo=_BESIDE)


# --- what the tensors say ------------------------------------------------------------------------------------------


def _tensor_shape(opened: Gguf, name: str) -> tuple[int, ...] | None:
    """Return the sizes of a tensor in numbers; None where the file does not have it."""
    info = opened.checkpoint.tensors.get(name)
    if info is None:
        return None
    *rows, last = info.type.sizes or (1,)
    block = BLOCKS.get(opened.kinds.get(name, ""))
    return (*rows, last // block.bytes * block.elements if block else last)


def _check_sizes(keys: Keys, opened: Gguf, values: Mapping[str, Any]) -> None:
    """Raise MoecError for a size that is another in the tensors of the first block, before anything is built of it."""
    head = values["head_dim"]
    wanted = [(key, keys.count(key, least=0), name, axis, "") for key, name, axis in _SIZES]
    for letter, key, attribute in (
        ("q", "attention.head_count", "num_attention_heads"), ("k", "attention.head_count_kv", "num_key_value_heads"),
    ):  # fmt: skip
        heads = values[attribute]
        wanted.append((key, heads * head, f"blk.0.attn_{letter}.weight", 0, f" times {head} channels of a head"))
    for key, size, name, axis, times in wanted:
        shape = _tensor_shape(opened, name)
        if not size or shape is None or len(shape) <= axis or shape[axis] == size:
            continue
        stated = size // head if times else size
        raise keys.error(key, f"is {stated}{times}, but {name} has the shape {list(shape)}")


def _vocabulary_size(keys: Keys, opened: Gguf) -> int:
    """Return the rows of the embedding, which the list of tokens has to have too."""
    shape = _tensor_shape(opened, "token_embd.weight")
    if shape is None:
        raise MoecError("the file has no tensor token_embd.weight", where=str(keys.file), todo="is a part missing?")
    tokens = opened.metadata.get("tokenizer.ggml.tokens")
    count = getattr(tokens, "count", None) if not isinstance(tokens, tuple) else len(tokens)
    if count is not None and count != shape[0]:
        what = f"tokenizer.ggml.tokens has {count} tokens, but token_embd.weight has {shape[0]} rows"
        raise MoecError(what, where=str(keys.file), todo="convert the model again")
    return shape[0]


def _is_tied(opened: Gguf) -> bool:
    return "output.weight" not in opened.checkpoint.tensors


def _check_blocks(opened: Gguf, layers: int, key: str, where: Path) -> None:
    """Raise MoecError unless the file has the tensors of just the blocks that are announced."""
    found = {name: int(n[1]) for name in opened.checkpoint.tensors if (n := re.match(r"blk\.(\d{1,9})\.", name))}
    there = set(found.values())
    lacking = next((n for n in range(layers) if n not in there), None)
    beyond = next((name for name, n in found.items() if n >= layers), None)
    if lacking is None and beyond is None:
        return
    what = f"no tensors of block {lacking}" if lacking is not None else f"{len(there)} blocks, and in them {beyond}"
    raise MoecError(
        f"{key} is {layers}, but the file has {what}",
        where=str(where),
        todo="is a part missing, or do they not belong together?",
    )
