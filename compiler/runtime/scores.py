"""What a model says of given tokens: logits after each one, and their probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...targets.session import check_tokens
from ..errors import MoecError
from .generate import Runner, left_pad
from .text_score import ROWS, log_softmax


def iterate_logits(session: Runner, tokens: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the logits f32[rows, vocabulary] after the tokens of a row, a few rows at a time; MoecError for no tokens."""
    if not len(tokens):
        raise MoecError("there are no tokens", todo="give at least one")
    check_tokens(tokens, session.vocabulary)
    ids, mask, positions = left_pad([tokens])
    states = None
    for start in range(0, len(tokens), ROWS):
        end = min(start + ROWS, len(tokens))
        logits, states = session.step(ids[:, start:end], mask[:, :end], positions[:, start:end], states)
        yield logits[0]


def score_tokens(session: Runner, tokens: Sequence[int]) -> np.ndarray:
    """Return the logarithm of each token's probability after those before it, f64[tokens - 1]."""
    following = np.array([*tokens[1:], 0])
    found = []
    start = 0
    for logits in iterate_logits(session, tokens):
        rows = np.arange(len(logits))
        found.append(log_softmax(logits)[rows, following[start : start + len(logits)]])
        start += len(logits)
    return np.concatenate(found)[:-1]
