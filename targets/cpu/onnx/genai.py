"""genai_config.json: how ONNX Runtime GenAI (0.18) runs the model, where it can."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ....compiler.artifact.generation_files import CONFIG, GENERATION, find_end_tokens, read_object
from ....compiler.artifact.manifest import interface_entries
from ....compiler.errors import Refuse
from ....compiler.ir.module import Module, Value
from ....compiler.ir.types import TensorType

NAME = "genai_config.json"
TYPE = "decoder"  # GenAI knows few model types by name; this one takes any decoder with the inputs below
_INPUTS = ("input_ids", "attention_mask", "position_ids")
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_SHARED_TOKENS = 8192  # of a buffer, unless the user asks for another max_length
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def write_genai_config(module: Module, folder: Path, library: str | None = None) -> None:
    """Write genai_config.json into an artifact that has the checkpoint's config.json, where GenAI can run it.

    `library` is the file in the folder with custom operators. GenAI has one name for it, whatever the platform.
    """
    config, generation = (read_object(folder, name) for name in (CONFIG, GENERATION))
    ends = find_end_tokens(folder).ids
    if config:
        with suppress(Refuse):
            content = genai_config(module, config, generation, ends, library)
            (folder / NAME).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def genai_config(
    module: Module, config: Mapping[str, Any], generation_config: Mapping[str, Any], ends: Sequence[int],
    library: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the content of genai_config.json; Refuse where GenAI cannot run the program.

    `config` and `generation_config` are the checkpoint's files as read, `ends` its end tokens. GenAI wants
    token ids, a mask and positions, one key and one value cache for each layer, all of one shape, and logits for every
    new token.
    """
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    tokens = {**config, **{k: v for k, v in generation_config.items() if v is not None}}
    cache = _cache_type(module)
    vocabulary = _logits_width(module)
    if not ends:
        raise Refuse("the checkpoint names no end-of-text token")
    heads, hidden = (_config_integer(config, name) for name in ("num_attention_heads", "hidden_size"))
    first = ends[0]
    context = config.get("max_position_embeddings")
    if not isinstance(context, int) or context < 1:
        context = next(d.high for d in module.dims if d.name == "P")
    given = [p.name for p in module.main.params if p.name in _INPUTS]
    decoder = {
        "filename": "model.onnx",
        "session_options": {"provider_options": [], **({"custom_ops_library": library} if library else {})},
        "head_size": int(cache.shape[3]),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": sum(p.type.state for p in module.main.params) // 2,
        "num_key_value_heads": int(cache.shape[1]),
        "inputs": {
            **{name: name for name in given},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": TYPE,
        "vocab_size": vocabulary,
        "context_length": context,
        "bos_token_id": _first_or_default(tokens.get("bos_token_id"), first),
        "eos_token_id": list(ends) if len(ends) > 1 else first,
        "pad_token_id": _first_or_default(tokens.get("pad_token_id"), first),
        "decoder": decoder,
    }
    # a shared buffer is allocated for max_length tokens at once, and the context of a model may be more than a machine has memory for
    shared = all(state["in_place"] for state in interface_entries(module)["states"])
    longest = min(context, _SHARED_TOKENS) if shared else context
    search = {"max_length": longest, "num_beams": 1, "past_present_share_buffer": shared}
    search |= {name: tokens[name] for name in _SEARCH if tokens.get(name) is not None}
    return {"model": model, "search": search}


def _cache_type(module: Module) -> TensorType:
    """Return the one type of all key and value caches; Refuse for other inputs, outputs, or differing caches."""
    states: dict[tuple[int, str], Value] = {}
    for param in module.main.params:
        if found := _PAST.fullmatch(param.name):
            states[int(found[1]), found[2]] = param
        elif param.name not in _INPUTS:
            raise Refuse(f"GenAI does not know the input {param.name}")
        elif param.type.dtype != "i64" or len(param.type.shape) != 2:
            raise Refuse(f"the input {param.name} is {param.type}, GenAI gives i64[B, S]")
    layers = {layer for layer, _ in states}
    if not layers or layers != set(range(len(layers))) or len(states) != 2 * len(layers):
        raise Refuse("there is not one key cache and one value cache for each layer")
    types = {p.type for p in states.values()}
    if len(types) > 1:
        raise Refuse(f"the caches differ in shape: {', '.join(sorted(map(str, types)))}")
    (cache,) = types
    if len(cache.shape) != 4 or not (cache.shape[1].is_Integer and cache.shape[3].is_Integer):
        raise Refuse(f"a cache is {cache}, GenAI wants [B, heads, P, head size]")
    names = {r.name for r in module.main.results}
    wanted = {f"present.{layer}.{kind}" for layer, kind in states}
    if not wanted <= names:
        raise Refuse(f"the program has no output {min(wanted - names)}")
    return cache


def _logits_width(module: Module) -> int:
    """Return the width of the logits."""
    logits = next((r for r in module.main.results if r.name == "logits"), None)
    if logits is None or len(logits.type.shape) != 3 or not logits.type.shape[2].is_Integer:
        raise Refuse("the program has no output logits of the shape [B, S, vocabulary]")
    return int(logits.type.shape[2])


def _config_integer(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refuse(f"the checkpoint's config has no {name}")
    return value


def _first_or_default(value: Any, default: Any) -> Any:
    value = value[0] if isinstance(value, list) and value else value
    return default if value is None or value == [] else value
