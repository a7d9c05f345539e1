"""Generation with any runner: left-padded batches, prefill in parts, greedy or sampled, stop at end of sequence."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...targets.session import check_tokens
from ..errors import MoecError

PREFILL_TOKENS = 512  # of all rows together in one step: bounds the logits (tokens * vocabulary * 4 bytes)
WARM_UP = 4  # decode steps that no rate counts: buffers are taken, caches fill
CANDIDATES = 1024  # logits that are sorted first for top-p; the whole vocabulary only if they do not suffice


class Runner(Protocol):
    """One step of a language model, whatever runs it. States are the runner's own; None starts a sequence."""

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has an embedding for: ids are below it."""

    @property
    def context(self) -> int:
        """The most tokens that a sequence may have."""

    def step(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        states: Any = None,
        last: int = 0,
    ) -> tuple[np.ndarray, Any]:
        """Take i64[B, S], i64[B, P + S], i64[B, S] and return logits f32[B, S, V] with the next states.

        With `last` above 0 the logits of that many tokens at the end suffice: f32[B, last, V].
        """


# why a sequence ended
END, LENGTH, CONTEXT, STOP = "end token", "max-new-tokens", "context", "stop text"


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one sequence are drawn, by a generator of its own that `seed` starts, and how many at most."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: tuple[int, ...] = (0, 0)


class PromptCache:
    """What a generation leaves for the next one of the same conversation: the tokens that were run, and their states."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._tokens: list[int] = []
        self._states: Any = None

    def take(self, tokens: Sequence[Sequence[int]]) -> tuple[int, Any]:
        """Return how many tokens of a prompt need not be run again, with their states, and forget them: a step changes them."""
        held, states = self._tokens, self._states
        self._tokens, self._states = [], None
        if len(tokens) == 1 and len(held) < len(tokens[0]) and held == list(tokens[0][: len(held)]):
            return len(held), states
        return 0, None

    def put(self, tokens: Sequence[Sequence[int]], states: Any) -> None:
        """Keep the states of one row of tokens."""
        if len(tokens) == 1:
            self._tokens, self._states = list(tokens[0]), states


@dataclass(frozen=True)
class Generation:
    """New tokens of each row (with the end-of-sequence token where there was one), their text, and the times taken.

    `stopped` says why each row ended: at an end token, at a stop text, after the tokens asked for (max-new-tokens) or at
    the end of the model's context.
    """

    tokens: list[list[int]]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    text: list[str] | None = None
    stopped: tuple[str, ...] = ()
    measured: tuple[int, float] = (0, 0.0)  # tokens and seconds of the decode steps after a warm-up

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second, all rows together."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens a second, all rows together, after a warm-up of a few steps; 0 where there were not more."""
        count, seconds = self.measured
        return count / seconds if seconds else 0.0


def left_pad(prompts: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return input_ids, attention_mask (1 = token) and position_ids (0 at padding), all i64[B, longest]."""
    width = max(map(len, prompts))
    ids = np.zeros((len(prompts), width), np.int64)
    mask = np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        if len(prompt):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
    return ids, mask, np.maximum(mask.cumsum(axis=1) - 1, 0)


def generate(
    session: Runner,
    tokens: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    greedy: bool = False,
    eos: Collection[int] = frozenset(),
    seed: int = 0,
    on_token: Callable[[int, int], object] | None = None,
    cache: PromptCache | None = None,
) -> Generation:
    """Continue every row of `tokens` by up to `max_new_tokens` tokens.

    `greedy` or a temperature of 0 takes the most likely token; else a row draws from its own generator, so that what
    it draws depends on `seed` and the row's number only. The rest is as in `generate_rows`.
    """
    temperature = 0.0 if greedy else temperature
    rows = [Sampling(max_new_tokens, temperature, top_k, top_p, (seed, row)) for row in range(len(tokens))]
    return generate_rows(session, tokens, rows, eos=eos, on_token=on_token, cache=cache)


def generate_rows(
    session: Runner,
    tokens: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    *,
    eos: Collection[int] = frozenset(),
    on_token: Callable[[int, int], object] | None = None,
    cache: PromptCache | None = None,
) -> Generation:
    """Continue every row of `tokens` as one batch, each with settings of its own; `on_token` may end a row by True.

    The rest is as in `iterate_rows`.
    """
    steps = iterate_rows(session, tokens, samplings, eos=eos, cache=cache)
    try:
        row, token = next(steps)
        while True:
            row, token = steps.send(on_token is not None and on_token(row, token) is True)
    except StopIteration as end:
        return end.value


def iterate_rows(
    session: Runner,
    tokens: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    *,
    eos: Collection[int] = frozenset(),
    cache: PromptCache | None = None,
) -> Generator[tuple[int, int], bool | None, Generation]:
    """Yield the row and the token as each comes, and return the whole in the end.

    What `cache` holds of the beginning of a single row is not run again, and it holds that row afterwards.

    A row ends after a token of `eos`, after its number of tokens, and where True is sent for one of its tokens; all rows end
    where the longest fills the context. Raises MoecError for settings that mean nothing, for a prompt that is longer than the
    context and for logits that are not numbers.
    """
    _check_prompts(tokens)
    for sampling in samplings:
        check_sampling(sampling)
    check_tokens((token for row in tokens for token in row), session.vocabulary)
    found: list[list[int]] = [[] for _ in tokens]
    stopped = ["" if sampling.max_new_tokens else LENGTH for sampling in samplings]
    if all(stopped):
        return Generation(found, 0, 0.0, 0.0, stopped=tuple(stopped))
    generators = [np.random.default_rng(sampling.seed) for sampling in samplings]
    start = time.perf_counter()
    ids, mask, positions = left_pad(tokens)
    past, states = cache.take(tokens) if cache else (0, None)
    logits, states = run_prefill(session, ids, mask, positions, past, states)
    begun = time.perf_counter()
    following, one = positions[:, -1:] + 1, np.ones((len(tokens), 1), np.int64)
    chosen = [0] * len(tokens)
    warm, warm_tokens = begun, 0
    for done in itertools.count():
        for row, sampling in enumerate(samplings):
            if stopped[row]:
                continue  # what it is given from here on is not read
            chosen[row] = token = sample_token(
                logits[row], generators[row], sampling.temperature, sampling.top_k, sampling.top_p
            )
            found[row].append(token)
            ended = yield row, token
            if token in eos:
                stopped[row] = END
            elif ended:
                stopped[row] = STOP
            elif len(found[row]) >= sampling.max_new_tokens:
                stopped[row] = LENGTH
            elif mask.shape[1] >= session.context:
                stopped[row] = CONTEXT
        if all(stopped):
            break
        if done == WARM_UP:
            warm, warm_tokens = time.perf_counter(), sum(map(len, found))
        mask = np.concatenate([mask, one], axis=1)
        step, states = session.step(np.array(chosen, np.int64)[:, None], mask, following, states, last=1)
        logits, following = step[:, -1], following + 1
    end, new = time.perf_counter(), sum(map(len, found))
    if cache:
        cache.put([[*row, *own[:-1]] for row, own in zip(tokens, found, strict=True)], states)
    measured = (new - warm_tokens, end - warm) if warm_tokens else (0, 0.0)
    return Generation(
        found, sum(map(len, tokens)) - past, begun - start, end - begun, stopped=tuple(stopped), measured=measured
    )


def run_prefill(
    session: Runner, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: int = 0, states: Any = None
) -> tuple[np.ndarray, Any]:
    """Run a padded batch of prompts in parts, from the `past` tokens on that `states` hold; return the logits f32[B, V]
    of the last tokens and the states."""
    logits = None
    part = max(1, PREFILL_TOKENS // len(ids))
    for start in range(past, ids.shape[1], part):
        end = min(start + part, ids.shape[1])
        logits, states = session.step(ids[:, start:end], mask[:, :end], positions[:, start:end], states, last=1)
    assert logits is not None  # prompts are not empty
    return logits[:, -1], states


def sample_token(
    logits: np.ndarray, rng: np.random.Generator, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> int:
    """Return the token that is drawn from logits [V]; the first of the largest at temperature 0."""
    if not np.isfinite(logits.max()):  # the maximum of anything with a NaN is NaN
        raise MoecError("the model's logits are not finite numbers", exit_code=1)
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = np.arange(len(weights)) if top_k is None else _largest_indices(weights, top_k)
    kept = weights[order]
    if top_p < 1:
        order = _nucleus_indices(weights, order, top_p * kept.sum())
        kept = weights[order]
    sums = kept.cumsum()
    drawn = int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))
    return int(order[min(drawn, len(order) - 1)])


def _largest_indices(weights: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` largest weights, largest first."""
    if count < len(weights):
        found = np.argpartition(-weights, count - 1)[:count]
    else:
        found = np.arange(len(weights))
    return found[np.argsort(-weights[found], kind="stable")]


def _nucleus_indices(weights: np.ndarray, order: np.ndarray, mass: float) -> np.ndarray:
    """Return the fewest of the largest weights among `order` that reach `mass` together."""
    for count in (CANDIDATES, len(order)):
        found = order[_largest_indices(weights[order], count)]
        sums = weights[found].cumsum()
        if sums[-1] >= mass:
            return found[: int(np.searchsorted(sums, mass)) + 1]
    return found


def _check_prompts(tokens: Sequence[Sequence[int]]) -> None:
    if not tokens or not all(len(row) for row in tokens):
        raise MoecError("the prompt has no tokens", todo="give at least one token in every row")


def check_sampling(sampling: Sampling) -> None:
    """Raise MoecError for settings that mean nothing."""
    if sampling.max_new_tokens < 0:
        raise MoecError(f"the number of new tokens is {sampling.max_new_tokens}", todo="give 0 or more")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise MoecError(f"the temperature is {sampling.temperature}", todo="give 0 (greedy) or a positive number")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise MoecError(f"top-k is {sampling.top_k}", todo="give 1 or more, or leave it out")
    if not 0 < sampling.top_p <= 1:
        raise MoecError(f"top-p is {sampling.top_p}", todo="give a number above 0 and up to 1")
