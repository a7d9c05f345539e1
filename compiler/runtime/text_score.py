"""Scores an artifact on a text: divergence from the source's predictions, equal top-1 tokens, perplexity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .generate import Runner, left_pad

TYPICAL = 0.75  # the share of tokens that "most" means
ROWS = 32  # rows of logits that are widened to float64 at once


@dataclass(frozen=True)
class TextScore:
    """Predictions on a text: KL(source || artifact) in nats, share of equal top-1 tokens, perplexity of both.

    `top1_bf16` is the share of top-1 tokens that equal those of the source in bf16, where that was asked.
    """

    text: str
    tokens: int
    kl_mean: float
    kl_max: float
    top1: float
    perplexity: float
    reference_perplexity: float
    kl_most: float = 0.0  # the divergence that three quarters of the tokens do not exceed
    top1_bf16: float | None = None


def score_text(
    runner: Runner,
    reference: Runner,
    windows: Sequence[np.ndarray],
    name: str = "",
    tick: Callable[[int], None] | None = None,
    bf16: Runner | None = None,
) -> TextScore:
    """Compare next-token distributions on windows of tokens, each read from its own start.

    With `bf16`, the source in bf16, its top-1 tokens are compared too.
    """
    kl: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    reference_losses: list[np.ndarray] = []
    equal = equal_bf16 = 0
    for number, window in enumerate(windows, 1):
        ids, mask, positions = left_pad([window])
        ours = runner.step(ids, mask, positions, None)[0][0]
        theirs = reference.step(ids, mask, positions, None)[0][0]
        if bf16 is not None:
            other = bf16.step(ids, mask, positions, None)[0][0]
            equal_bf16 += int((ours.argmax(axis=-1) == other.argmax(axis=-1))[: len(window) - 1].sum())
        for start in range(0, len(window) - 1, ROWS):
            rows = slice(start, min(start + ROWS, len(window) - 1))
            following = np.asarray(window[rows.start + 1 : rows.stop + 1])
            q, p = log_softmax(ours[rows]), log_softmax(theirs[rows])
            kl.append(_kl_divergence(p, q))
            losses.append(-q[np.arange(len(following)), following])
            reference_losses.append(-p[np.arange(len(following)), following])
            equal += int((q.argmax(axis=-1) == p.argmax(axis=-1)).sum())
        if tick:
            tick(number)
    divergence = np.concatenate(kl)
    return TextScore(
        name, len(divergence), float(divergence.mean()), float(divergence.max()), equal / len(divergence),
        _perplexity_of_losses(losses), _perplexity_of_losses(reference_losses), float(np.quantile(divergence, TYPICAL)),
        None if bf16 is None else equal_bf16 / len(divergence),
    )  # fmt: skip


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities that logits [..., V] stand for, as f64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def _kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL(p || q) in nats of log-probabilities, row by row; tokens without probability add nothing."""
    shares = np.exp(p)
    terms = np.zeros_like(p)
    np.subtract(p, q, where=shares > 0, out=terms)
    return np.maximum((shares * terms).sum(axis=-1), 0)


def _perplexity_of_losses(losses: Sequence[np.ndarray]) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(np.concatenate(losses).mean()))
