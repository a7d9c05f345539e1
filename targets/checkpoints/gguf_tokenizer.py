"""A tokenizer of Hugging Face (tokenizer.json) as the metadata of a GGUF file: byte-level BPE, as GPT-2 has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...compiler.artifact.generation_files import find_end_tokens, read_object
from ...compiler.ir.notes import Note

_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5  # token types of llama.h
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# how texts are cut before merges -> llama.cpp's name for it (llama-vocab.cpp)
_CUTS = {_GPT2: "gpt-2", _LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


def tokenizer_metadata(folder: Path, rows: int) -> tuple[dict[str, Any], tuple[Note, ...]]:
    """Return the keys for the tokenizer of a folder with `rows` tokens, and what there is to say of it.

    A tokenizer that llama.cpp has under no name known here is left out: the file then takes and gives token ids.
    """
    given = read_object(folder, "tokenizer.json")
    model = given.get("model")
    cut = _cut_name(given)
    if not isinstance(model, Mapping) or model.get("type") != "BPE" or model.get("byte_fallback") or cut is None:
        note = Note("the tokenizer is no byte-level BPE whose cuts llama.cpp has a name for: the file has none")
        return {"tokenizer.ggml.model": "none"}, (note,)
    added = {entry["id"]: entry for entry in given.get("added_tokens") or ()}
    texts = {number: text for text, number in model["vocab"].items()} | {n: e["content"] for n, e in added.items()}
    kinds = [
        _UNUSED if n not in texts else _NORMAL if n not in added else _CONTROL if added[n].get("special") else _USER
        for n in range(rows)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": cut,
        "tokenizer.ggml.tokens": [texts.get(n, f"[PAD{n}]") for n in range(rows)], "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.add_bos_token": _adds_first(given),
    }  # fmt: skip
    config = read_object(folder, "config.json")
    ends = find_end_tokens(folder).ids
    ids = {"bos": config.get("bos_token_id"), "eos": ends[0] if ends else None, "padding": config.get("pad_token_id")}
    found |= {f"tokenizer.ggml.{name}_token_id": n for name, n in ids.items() if isinstance(n, int) and 0 <= n < rows}
    template = folder / "chat_template.jinja"
    chat = (
        template.read_text("utf-8")
        if template.is_file()
        else read_object(folder, "tokenizer_config.json").get("chat_template")
    )
    return found | ({"tokenizer.chat_template": chat} if isinstance(chat, str) else {}), ()


def _cut_name(given: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name for how a tokenizer cuts texts; None for one without bytes, or a cut that has no name."""
    cutter = given.get("pre_tokenizer") or {}
    steps = cutter.get("pretokenizers") or [cutter]
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    cuts = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    cuts += [_GPT2 for step in steps if step.get("type") == "ByteLevel" and step.get("use_regex", True)]
    return _CUTS.get(cuts[0]) if len(cuts) == 1 else None


def _adds_first(given: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer puts a special token before a text."""
    text = json.dumps(given.get("post_processor") or {})
    return '"single": [{"SpecialToken"' in text
