"""Which of transformers' architectures a config.json means, and folders that hold an adapter in place of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import MoecError

# model_type -> the one whose code and weights it shares, for configs that name no architecture
ALIASES = {"kimi_k2": "deepseek_v3"}


def known_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with model_types that transformers knows, in its parts too.

    A model_type that is unknown means the architecture that `architectures` names: tools and vendors rename the one and
    keep the other. What has no such name stays as it is.
    """
    from transformers import CONFIG_MAPPING

    found = {key: known_config(value) if isinstance(value, dict) else value for key, value in raw.items()}
    own = raw.get("model_type")
    if isinstance(own, str) and own not in CONFIG_MAPPING:
        named = _by_architecture(raw.get("architectures"), "text_config" in raw) or ALIASES.get(own)
        if named in CONFIG_MAPPING:
            found["model_type"] = named
    for key in ("dtype", "torch_dtype"):  # as programs spell it; what `auto` means, the weights say
        if isinstance(raw.get(key), str):
            found[key] = raw[key].removeprefix("torch.")
        if found.get(key) == "auto":
            del found[key]
    return found


def _by_architecture(architectures: Any, whole: bool) -> str | None:
    """Return the model_type of a class of transformers; of two, that of the whole model or of the model of text."""
    from transformers.models.auto import modeling_auto as auto

    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    tables = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    for name in names:
        types = [type_ for table in tables for type_, known in table.items() if known == name]
        if types:
            return min(types, key=lambda type_: (type_.endswith("_text") == whole, len(type_)))
    return None


def refuse_adapter(folder: Path) -> None:
    """Raise MoecError for a folder with an adapter: the program would be the model without it."""
    file = folder / "adapter_config.json"
    weights = next((f for f in sorted(folder.glob("adapter_model*")) if f.suffix in (".safetensors", ".bin")), None)
    if not file.is_file() and weights is None:
        return
    base = _base_of(file)
    beside = (folder / "config.json").is_file()
    what = "the folder holds an adapter (LoRA or the like) beside a model" if beside else "the folder holds an adapter"
    merge = "merge it into the model it was trained for (merge_and_unload() of peft, then save_pretrained)"
    raise MoecError(
        f"{what}{'' if beside else ' (LoRA or the like), not a model'}",
        where=str(file if file.is_file() else weights),
        todo=f"{merge}{f': {base}' if base else ''}"
        + (", or remove it to compile the model without it" if beside else ""),
    )


def _base_of(file: Path) -> str:
    """Return the name of the model that an adapter was trained for, as far as the file says it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return base[:200] if isinstance(base, str) else ""
