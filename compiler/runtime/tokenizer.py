"""Text to tokens and back, from an artifact's own files; nothing is downloaded and no code of a checkpoint is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MoecError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# classes of transformers that take tokenizer.json as it is; other classes may change it while loading
PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
REPLACEMENT = "\ufffd"
KEPT = 8  # tokens of context that stay in front of new ones: some decoders treat the first token differently


@dataclass(frozen=True)
class Tokenizer:
    """`encode` gives the ids of a text, with the special tokens the model expects; `decode` leaves those out."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder; MoecError if it has none or the one it has cannot be read."""
    if not any((folder / name).is_file() for name in FILES):
        raise MoecError(
            "the folder has no tokenizer", where=str(folder), todo="give token ids instead of a text (--tokens 1,2,3)"
        )
    if _is_plain(folder):
        return _from_json(folder / "tokenizer.json")
    return _from_transformers(folder)


def _is_plain(folder: Path) -> bool:
    """Return whether tokenizer.json says everything, so that transformers (seconds to import) is not needed."""
    if not (folder / "tokenizer.json").is_file():
        return False
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise MoecError(f"tokenizer_config.json is not JSON: {error}", where=str(path)) from None
    return isinstance(config, dict) and config.get("tokenizer_class") in PLAIN_CLASSES


def _from_json(path: Path) -> Tokenizer:
    import tokenizers

    try:
        found = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise MoecError(f"the tokenizer cannot be read: {error}", where=str(path)) from error
    found.no_padding()
    found.no_truncation()
    return Tokenizer(lambda text: found.encode(text).ids, lambda ids: found.decode(list(ids), skip_special_tokens=True))


def _from_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise MoecError(
            f"transformers cannot load the tokenizer: {error}",
            where=str(folder),
            todo="give token ids instead of a text (--tokens 1,2,3)",
        ) from error
    return Tokenizer(
        lambda text: list(found(text, truncation=False, verbose=False)["input_ids"]),
        lambda ids: str(found.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)),
    )


class TextStream:
    """Turns tokens into text as they come. Whole characters only: byte-level tokens may end inside of one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that were handed out

    def push(self, token: int) -> str:
        """Add a token and return the text that is complete now, maybe none."""
        self._window.append(token)
        text = self._decode(self._window)
        # an unfinished character decodes to at most three replacement characters (one for each byte)
        whole = len(text)
        while whole > len(text) - 3 and text[:whole].endswith(REPLACEMENT):
            whole -= 1
        new = text[self._shown : whole]
        self._shown = max(self._shown, whole)
        if len(self._window) > 4 * KEPT and whole == len(text):
            self._shorten(text)
        return new

    def finish(self) -> str:
        """Return what was held back: a character that the model left unfinished."""
        rest = self._decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return rest

    def _shorten(self, text: str) -> None:
        tail = self._window[-KEPT:]
        kept = self._decode(tail)
        if text.endswith(kept):  # else the tail begins inside a character, or reads differently by itself: try later
            self._window, self._shown = tail, len(kept)
