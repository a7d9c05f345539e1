"""What the files of a checkpoint say about generating: how to draw tokens, and which tokens end a sequence.

Fine-tuned checkpoints often name the end of a turn in one file and the end of a text in another; whoever stops at one of
them only runs on through the other. So a sequence ends at every token that any of the files names. One case differs: a
generation_config.json that names none leaves the end to config.json, and the tokenizer's is asked if that names none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MoecError
from ..errors.json_files import find_misfit, read_json

GENERATION, CONFIG = "generation_config.json", "config.json"
TOKENIZER, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
# where the numbers of end tokens stand, and where their texts do: a file and the keys on the way
END_IDS = (
    (GENERATION, ("eos_token_id",)),
    (CONFIG, ("eos_token_id",)),
    (CONFIG, ("text_config", "eos_token_id")),
    (CONFIG, ("thinker_config", "text_config", "eos_token_id")),
)
END_TEXTS = ((TOKENIZER, ("eos_token",)), (SPECIAL, ("eos_token",)))
_IDS = (None, int, [int])
_TEXTS = (None, str, {"content": str})
_NUMBER = (int, float, None)
_SAMPLING = {
    "do_sample?": (bool, None), "temperature?": _NUMBER, "top_p?": _NUMBER, "top_k?": (int, None),
    "repetition_penalty?": _NUMBER,
}  # fmt: skip


@dataclass(frozen=True)
class EndTokens:
    """The ids of all end tokens, and the texts of those that the tokenizer's files do not number."""

    ids: tuple[int, ...]
    unknown: tuple[str, ...] = ()


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """Return the object in a file of a folder; an empty one where there is no such file."""
    path = folder / name
    return read_json(path) if path.is_file() else {}


def find_end_tokens(folder: Path) -> EndTokens:
    """Return the end tokens that the files of a checkpoint or an artifact name; MoecError for a value of a wrong type."""
    found: list[int] = []
    for value in _values_at(folder, END_IDS, _IDS, "a token id or a list of them"):
        found += value if isinstance(value, list) else [value]
    if found and (folder / GENERATION).is_file() and read_object(folder, GENERATION).get("eos_token_id") is None:
        return EndTokens(_distinct_ids(found))
    unknown = []
    for value in _values_at(folder, END_TEXTS, _TEXTS, "a text"):
        text = value["content"] if isinstance(value, dict) else value
        number = token_id(folder, text) if text else -1
        if number is None:
            unknown.append(text)
        else:
            found.append(number)
    return EndTokens(_distinct_ids(found), tuple(dict.fromkeys(unknown)))


def _distinct_ids(found: list[int]) -> tuple[int, ...]:
    """Return ids in their order, each once; -1 stands for no id and is left out."""
    return tuple(dict.fromkeys(n for n in found if n >= 0))


def _values_at(folder: Path, places: tuple[tuple[str, tuple[str, ...]], ...], shape: Any, wanted: str) -> Iterator[Any]:
    """Yield the values at the places, nulls left out."""
    for name, keys in places:
        value: Any = read_object(folder, name)
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if find_misfit(value, shape) is not None:
            raise MoecError(f"{'.'.join(keys)} of {name} is not {wanted}: {value!r:.80}", where=str(folder / name))
        if value is not None:
            yield value


def token_id(folder: Path, text: str) -> int | None:
    """Return the id of a token by its text, as the tokenizer's files number it; None if they do not.

    tokenizer.json, which is large, is opened last.
    """
    for table in _token_tables(folder):
        number = table.get(text)
        if isinstance(number, int) and not isinstance(number, bool):
            return number
    return None


def _token_tables(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield tables from the texts of tokens to their ids."""
    added = read_object(folder, TOKENIZER).get("added_tokens_decoder")
    if isinstance(added, dict):
        numbered = [
            (n, entry) for n, entry in added.items() if isinstance(entry, dict) and re.fullmatch(r"[0-9]{1,9}", n)
        ]
        yield {str(entry.get("content")): int(n) for n, entry in numbered}
    yield read_object(folder, "added_tokens.json")
    tokenizer = read_object(folder, "tokenizer.json")
    entries = tokenizer.get("added_tokens")
    if isinstance(entries, list):
        yield {str(entry.get("content")): entry.get("id") for entry in entries if isinstance(entry, dict)}
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield vocabulary
    elif isinstance(vocabulary, list):  # Unigram: a token's place is its id
        yield {str(entry[0]): i for i, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    yield read_object(folder, "vocab.json")


def find_sampling(folder: Path) -> dict[str, Any]:
    """Return temperature, top_k and top_p as generation_config.json wants them; MoecError for what cannot be drawn by."""
    config = read_object(folder, GENERATION)
    place = find_misfit(config, _SAMPLING)
    if place is None and config.get("do_sample"):
        place = _out_of_range(config)
    if place is not None:
        what = f"{place} of {GENERATION} cannot be {config[place]!r:.80}"
        raise MoecError(what, where=str(folder / GENERATION), todo="correct it or remove it")
    if not config.get("do_sample"):
        return {"temperature": 0.0, "top_k": None, "top_p": 1.0}
    values = {"temperature": config.get("temperature"), "top_p": config.get("top_p")}
    defaults = {key: 1.0 if value is None else float(value) for key, value in values.items()}
    return {**defaults, "top_k": config.get("top_k") or None}


def _out_of_range(config: Mapping[str, Any]) -> str | None:
    """Return the key whose number means nothing."""
    temperature, top_p, top_k = (config.get(key) for key in ("temperature", "top_p", "top_k"))
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        return "temperature"
    if top_p is not None and not 0 < top_p <= 1:
        return "top_p"
    return "top_k" if top_k is not None and top_k < 0 else None
