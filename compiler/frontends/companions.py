"""The files that travel with a model's weights into an artifact: its configs and its tokenizer."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ..errors import MoecError
from ..errors.paths import check_path

CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def read_companions(folder: Path, names: tuple[str, ...] = (*CONFIGS, *TOKENIZER)) -> dict[str, bytes]:
    """Return the files of those names that a folder has."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def live_companions(model: Any, tokenizer: Any = None) -> dict[str, bytes]:
    """Return what a live transformers model has instead of files: its config, its generation config, and its tokenizer.

    `tokenizer` is one of transformers or a folder; without one it is that of the folder which the model was loaded from,
    if that is still there.
    """
    config = json.loads(model.config.to_json_string(use_diff=True))
    if not config.get("architectures"):
        config["architectures"] = [type(model).__name__]
    found = {"config.json": _json(config)}
    if getattr(model, "generation_config", None) is not None:
        found["generation_config.json"] = _json(json.loads(model.generation_config.to_json_string(use_diff=True)))
    if tokenizer is None:
        source = Path(getattr(model, "name_or_path", "") or ".")
        return found | (read_companions(source, TOKENIZER) if source != Path() else {})
    if isinstance(tokenizer, (str, Path)):
        files = read_companions(check_path(tokenizer, "the tokenizer"), TOKENIZER)
        if not files:
            raise MoecError("the folder has no tokenizer", where=str(tokenizer), todo="name the folder that holds it")
        return found | files
    if not hasattr(tokenizer, "save_pretrained"):
        kind = type(tokenizer).__name__
        raise MoecError(f"a tokenizer cannot be a {kind}", todo="give one of transformers, or a folder")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return found | read_companions(Path(folder), TOKENIZER)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
