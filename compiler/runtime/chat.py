"""Conversations: a model's own chat template, which makes one text of the messages so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact.generation_files import SPECIAL, TOKENIZER, read_object
from ..errors import MoecError
from ..errors.json_files import find_misfit

TEMPLATE = "chat_template.jinja"
DEFAULT = "default"  # of several templates by name: the one for plain conversations
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONTENT = (str, None, [{"type": str}])
_MESSAGES = [{"role": str, "content?": _CONTENT}]


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template of a checkpoint, and the texts of the special tokens that it may write."""

    text: str
    tokens: Mapping[str, str]
    place: Path

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Return the text that the model continues with its answer; MoecError where the template refuses the messages.

        The template is run by transformers, in the sandbox that it has for templates of strangers.

        >>> artifact.chat_template.render([{"role": "user", "content": "Hello"}])  # doctest: +SKIP
        '<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n'
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = check_messages(messages)
        given: dict[str, Any] = {**self.tokens, **variables, "chat_template": self.text}
        try:
            texts = render_jinja_template([conversation], add_generation_prompt=True, **given)[0]
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            what = f"the model's chat template refuses the conversation: {error}"
            raise MoecError(
                what, where=str(self.place), todo="change the roles or the order of the messages"
            ) from error
        return str(texts[0])


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as lists of dicts; MoecError for what is no conversation."""
    found = [dict(message) if isinstance(message, Mapping) else message for message in messages]
    if not found:
        raise MoecError("the conversation has no messages", todo='give one as {"role": "user", "content": "Hello"}')
    if (place := find_misfit(found, _MESSAGES)) is not None:
        raise MoecError(
            f"messages{place} is missing or no text", todo='a message is {"role": "user", "content": "Hello"}'
        )
    return found


def load_template(folder: Path) -> ChatTemplate:
    """Return the chat template of a folder; MoecError if it has none, or none that can be read."""
    tokens = {}
    for name in (SPECIAL, TOKENIZER):  # the second one wins, as in transformers
        config = read_object(folder, name)
        for token in SPECIAL_TOKENS:
            value = config.get(token)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[token] = text
    place, found = _find_template(folder)
    if isinstance(found, list):  # several, each with a name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get(DEFAULT)
    if not isinstance(found, str) or not found.strip():
        raise MoecError(
            "the model has no chat template", where=str(folder),
            todo="continue a text with moec run --prompt; a model tuned for conversations brings a template",
        )  # fmt: skip
    return ChatTemplate(found, tokens, place)


def _find_template(folder: Path) -> tuple[Path, Any]:
    path = folder / TEMPLATE
    if path.is_file():
        try:
            return path, path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise MoecError(f"the chat template cannot be read: {reason}", where=str(path)) from error
    for name in ("chat_template.json", TOKENIZER):
        if (found := read_object(folder, name).get("chat_template")) is not None:
            return folder / name, found
    return folder, None
