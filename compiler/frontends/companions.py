"""The files that travel with a model's weights into an artifact: its configs and its tokenizer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MoecError
from ..errors.hub import check_link
from ..errors.paths import check_path

GENERATION = "generation_config.json"
CONFIGS = ("config.json", GENERATION)
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# the ends of a text, of a turn and of a message; llama.cpp stops at each of them
GGUF_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def read_companions(folder: Path, names: tuple[str, ...] = (*CONFIGS, *TOKENIZER)) -> dict[str, bytes]:
    """Return the files of those names that a folder has; MoecError for one that is a link to somewhere else."""
    files = [folder / name for name in names if (folder / name).is_file()]
    for file in files:
        check_link(file)
    return {file.name: file.read_bytes() for file in files}


def live_companions(model: Any, tokenizer: Any = None) -> dict[str, bytes]:
    """Return what a live transformers model has instead of files: its config, its generation config, and its tokenizer.

    `tokenizer` is one of transformers or a folder; without one it is that of the folder which the model was loaded from,
    if that is still there.
    """
    config = json.loads(model.config.to_json_string(use_diff=True))
    if not config.get("architectures"):
        config["architectures"] = [type(model).__name__]
    found = {"config.json": _json_bytes(config)}
    if getattr(model, "generation_config", None) is not None:
        found[GENERATION] = _json_bytes(json.loads(model.generation_config.to_json_string(use_diff=True)))
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


def gguf_companions(metadata: Mapping[str, Any], rows: int, file: Path) -> dict[str, bytes]:
    """Return a generation config with the end tokens that a GGUF file's metadata names; nothing where one lies beside it.

    MoecError for an end token that is not one of the `rows` of the embedding.
    """
    if (file.parent / GENERATION).is_file():
        return {}
    ends: list[int] = []
    for key in GGUF_ENDS:
        number = metadata.get(key)
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < rows:
            what = f"{key} is {number!r}, and the tokens are 0 to {rows - 1}"
            raise MoecError(what, where=str(file), todo="convert the model again")
        ends.append(number)
    return {GENERATION: _json_bytes({"eos_token_id": list(dict.fromkeys(ends))})} if ends else {}


def _json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
