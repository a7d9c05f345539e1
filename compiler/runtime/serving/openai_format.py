"""What the OpenAI routes take and give: bodies of requests judged, answers, pieces of streams and errors as JSON values."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import MoecError
from ...errors.json_files import find_misfit
from ..artifact import Artifact
from ..generate import Sampling, check_sampling

CHAT, COMPLETION = "chat.completion", "text_completion"
_NUMBER = (int, float, None)
_BODY = {
    "model?": (str, None), "max_tokens?": (int, None), "max_completion_tokens?": (int, None), "temperature?": _NUMBER,
    "top_p?": _NUMBER, "top_k?": (int, None), "seed?": (int, None), "stop?": (str, [str], None), "stream?": (bool, None),
    "stream_options?": ({"include_usage?": (bool, None)}, None), "n?": (int, None),
}  # fmt: skip
# what would change the answer and is not done: refused unless it has the value that changes nothing
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1), "best_of": (None, 1), "logprobs": (None, False), "top_logprobs": (None, 0), "echo": (None, False),
    "suffix": (None, ""), "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "logit_bias": (None, {}),
    "tools": (None, []), "functions": (None, []), "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
}  # fmt: skip
MAX_STOPS = 16


class RefusedError(Exception):
    """A request that is answered with an error: its status, message and the field that is wrong."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field

    def body(self) -> dict[str, Any]:
        """Return the error as the OpenAI routes have it."""
        return error_body(self.status, str(self), self.field)


@dataclass(frozen=True)
class Asked:
    """A request that was judged. `kind` is CHAT or COMPLETION."""

    kind: str
    tokens: Sequence[int]
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    usage: bool


def read_request(body: Any, kind: str, artifact: Artifact, model: str, context: int, most: int) -> Asked:
    """Return what a body asks for; RefusedError for what is wrong with it or not supported.

    `most` bounds the tokens of an answer, which is also what a body gets that names no number.
    """
    if not isinstance(body, dict):
        raise RefusedError(400, "the body is not a JSON object")
    if (place := find_misfit(body, _BODY)) is not None:
        raise RefusedError(400, f"{place} has a value of a wrong type", place)
    if body.get("model") not in (None, model):
        raise RefusedError(404, f"there is no model {body['model']!r:.80}; this server has {model!r}", "model")
    for name, plain in _UNSUPPORTED.items():
        if not any(body.get(name) == value for value in plain):
            raise RefusedError(400, f"{name} is not supported", name)
    stop = body.get("stop") or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops) or len(stops) > MAX_STOPS:
        raise RefusedError(400, f"stop takes up to {MAX_STOPS} texts, none of them empty", "stop")
    try:
        tokens = _read_prompt(body, kind, artifact)
        sampling = _read_sampling(body, artifact, most)
    except MoecError as error:
        raise RefusedError(400, error.what) from error
    if len(tokens) > context:
        raise RefusedError(400, f"the prompt has {len(tokens)} tokens, the model's context {context}", "messages")
    usage = bool((body.get("stream_options") or {}).get("include_usage"))
    return Asked(kind, tokens, sampling, stops, bool(body.get("stream")), usage)


def _read_prompt(body: Mapping[str, Any], kind: str, artifact: Artifact) -> list[int]:
    if kind == CHAT:
        if not isinstance(body.get("messages"), list):
            raise RefusedError(400, "messages is missing", "messages")
        return artifact.chat_tokens(body["messages"])
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    vocabulary = artifact.manifest["vocabulary"]
    if isinstance(prompt, str):
        tokens = artifact.tokenizer.encode(prompt)
    elif isinstance(prompt, list) and find_misfit(prompt, [int]) is None:
        tokens = prompt
    else:
        raise RefusedError(400, "prompt is no text and no list of token ids; one prompt a request", "prompt")
    if not tokens or not all(0 <= token < (vocabulary or 1 << 31) for token in tokens):
        raise RefusedError(400, "the prompt has no tokens, or one that the model has not", "prompt")
    return tokens


def _read_sampling(body: Mapping[str, Any], artifact: Artifact, most: int) -> Sampling:
    own = artifact.sampling()
    given = {key: body[key] for key in ("temperature", "top_p", "top_k") if body.get(key) is not None}
    wanted = body.get("max_completion_tokens") or body.get("max_tokens")
    if wanted is not None and wanted < 1:
        raise RefusedError(400, "max_tokens is less than 1", "max_tokens")
    seed = body["seed"] & (2**63 - 1) if body.get("seed") is not None else secrets.randbits(63)
    found = Sampling(min(wanted or most, most), **{**own, **given}, seed=(seed, 0))
    check_sampling(found)
    return found


class Writer:
    """Writes the answers to one request."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        self._head = {
            "id": f"{'chatcmpl' if asked.kind == CHAT else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def answer(self, text: str, stopped: str, tokens: int) -> dict[str, Any]:
        """Return a whole answer."""
        content = {"message": {"role": "assistant", "content": text}} if self._asked.kind == CHAT else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason(stopped)}
        return {**self._head, "object": self._asked.kind, "choices": [choice], "usage": self.usage(tokens)}

    def chunk(self, text: str | None, stopped: str = "", first: bool = False) -> dict[str, Any]:
        """Return a piece of a stream: text, or with `stopped` its end."""
        delta = {**({"role": "assistant"} if first else {}), **({} if text is None else {"content": text})}
        content = {"delta": delta} if self._asked.kind == CHAT else {"text": text or ""}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason(stopped) if stopped else None}
        return self._piece([choice], None)

    def last_chunk(self, tokens: int) -> dict[str, Any]:
        """Return the piece of a stream that counts tokens."""
        return self._piece([], self.usage(tokens))

    def _piece(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._asked.kind == CHAT else COMPLETION
        counted = {"usage": usage} if self._asked.usage else {}
        return {**self._head, "object": kind, "choices": choices, **counted}

    def usage(self, tokens: int) -> dict[str, int]:
        """Return the tokens of prompt and answer."""
        prompt = len(self._asked.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def finish_reason(stopped: str) -> str:
    """Return why a sequence ended as the OpenAI routes say it."""
    return "stop" if stopped in ("end token", "stop text") else "length"


def error_body(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """Return an error as the OpenAI routes have it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}
