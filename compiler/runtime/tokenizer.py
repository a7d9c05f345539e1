"""Text to tokens and back, from an artifact's own files; nothing is downloaded and no code of a checkpoint is run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import MoecError
from ..errors.json_files import read_json

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# classes of transformers that take tokenizer.json as it is; other classes may change it while loading
PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
REPLACEMENT = "\ufffd"
KEPT = 8  # tokens of context that stay in front of new ones: some decoders treat the first token differently


@dataclass(frozen=True)
class Tokenizer:
    """`encode` gives the ids of a text, with the special tokens the model expects; `decode` leaves those out.

    `encode(text, special=False)` adds none: a chat template writes them itself.
    """

    encode: Callable[..., list[int]]
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
    config = read_json(path) if path.is_file() else {}
    return config.get("tokenizer_class") in PLAIN_CLASSES


def _from_json(path: Path) -> Tokenizer:
    import tokenizers

    with _reword_errors("the tokenizer cannot be read", path), _silence_stderr():
        found = tokenizers.Tokenizer.from_file(str(path))
        found.no_padding()
        found.no_truncation()

    def encode(text: str, special: bool = True) -> list[int]:
        with _reword_errors("the tokenizer cannot read the text", path):
            return found.encode(text, add_special_tokens=special).ids

    def decode(ids: Sequence[int]) -> str:
        with _reword_errors("the tokenizer cannot write the tokens", path):
            return found.decode(list(ids), skip_special_tokens=True)

    return Tokenizer(encode, decode)


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Keep a panic of Rust from writing its own report on standard error; it is raised here all the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@contextmanager
def _reword_errors(what: str, path: Path) -> Iterator[None]:
    """Reword what the libraries raise: any Exception, and panics of Rust, which are no Exception at all."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = (
            str(error).strip().splitlines()
            if isinstance(error, (ValueError, OSError)) or type(error) is Exception
            else []
        )
        reason = lines[0] if lines else "its files are damaged, or of another version"
        todo = "download it again, or give token ids instead of a text (--tokens 1,2,3)"
        raise MoecError(f"{what}: {reason}", where=str(path), todo=todo) from error


def _from_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    with _reword_errors("transformers cannot load the tokenizer", folder):
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def encode(text: str, special: bool = True) -> list[int]:
        with _reword_errors("the tokenizer cannot read the text", folder):
            taken = found(text, truncation=False, verbose=False, add_special_tokens=special)
            return list(taken["input_ids"])

    def decode(ids: Sequence[int]) -> str:
        with _reword_errors("the tokenizer cannot write the tokens", folder):
            return str(found.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return Tokenizer(encode, decode)


class TextStream:
    """Turns tokens into text as they come. Whole characters only: byte-level tokens may end inside of one.

    The text ends in front of the first of `stops`; `stopped` says that one came. What may be the beginning of one is
    held back until it is known.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if not all(stops):
            raise MoecError("a stop text is empty", todo="leave it out")
        self._decode = tokenizer.decode
        self._stops = tuple(stops)
        self._held = ""  # text that may be the beginning of a stop text
        self.stopped = False
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that were handed out

    def push(self, token: int) -> str:
        """Add a token and return the text that is complete now, maybe none."""
        return self._until_stop(self._complete_text(token))

    def _until_stop(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.stopped = bool(found)
        beginnings = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        whole = min(found) if found else len(text) - max(beginnings, default=0)
        self._held = text[whole:]
        return text[:whole]

    def _complete_text(self, token: int) -> str:
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
        """Return what was held back: a character that the model left unfinished, the beginning of a stop text."""
        rest = self._until_stop(self._decode(self._window)[self._shown :])
        if not self.stopped:
            rest += self._held
        self._window, self._shown, self._held = [], 0, ""
        return rest

    def _shorten(self, text: str) -> None:
        tail = self._window[-KEPT:]
        kept = self._decode(tail)
        if text.endswith(kept):  # else the tail begins inside a character, or reads differently by itself: try later
            self._window, self._shown = tail, len(kept)
