"""Requests that wait together run as one batch, in a thread of its own.

Every request keeps its own settings and random draws, so its tokens are those that it would get alone, as far as the runtime's numbers do
not depend on how many rows a step has. Requests that arrive while a batch runs wait for its end.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from ...errors import MoecError
from ..generate import END, Runner, Sampling, generate_rows
from ..tokenizer import TextStream, Tokenizer

TIME = "time"  # why a sequence ended, beside those of generate.py
GONE = "the request was given up"


@dataclass(frozen=True)
class Limits:
    """What a server takes: waiting requests, rows of a batch, seconds of a request, bytes of its body, tokens of its answer."""

    queue: int = 64
    batch: int = 16
    seconds: float = 600.0
    body: int = 1 << 20
    tokens: int = 4096


@dataclass(frozen=True)
class Piece:
    """What a request is told: new text, in the end why it stopped and how many tokens were made, or an error."""

    text: str = ""
    stopped: str = ""
    tokens: int = 0
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """A request in the queue. `deliver` is called from the thread of the batches."""

    tokens: Sequence[int]
    sampling: Sampling
    stops: tuple[str, ...]
    deliver: Callable[[Piece], None]
    deadline: float = float("inf")  # as time.monotonic counts
    cancelled: threading.Event = field(default_factory=threading.Event)


class QueueFullError(Exception):
    """As many requests wait as may."""


class Batches:
    """The queue of requests to a session, and the thread that runs them.

    `padded` says whether prompts of several lengths may share a batch.
    """

    def __init__(
        self, session: Runner, tokenizer: Tokenizer, eos: Collection[int], padded: bool, limits: Limits
    ) -> None:
        self._session, self._tokenizer, self._eos = session, tokenizer, frozenset(eos)
        self._padded, self._limits = padded, limits
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.running = 0  # rows of the batch that runs
        self._thread = threading.Thread(target=self._run, name="moec batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Put a request into the queue; QueueFullError where it has no room."""
        with self._changed:
            if len(self._waiting) >= self._limits.queue:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Give up what waits and end the thread when its batch is done."""
        with self._changed:
            self._closed = True
            for job in self._waiting:
                job.cancelled.set()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed and not self._waiting:
                    return
                batch = self._take_batch()
            if batch:
                self.running = len(batch)
                self._run_batch(batch)
                self.running = 0

    def _take_batch(self) -> list[Job]:
        """Take the request that waits longest, and in their order those that may run beside it."""
        batch: list[Job] = []
        left: list[Job] = []
        for job in self._waiting:
            if job.cancelled.is_set() or time.monotonic() > job.deadline:
                job.deliver(Piece(error=MoecError("the request waited for too long", todo="try again later")))
            elif len(batch) < self._limits.batch and self._fit_together([*batch, job]):
                batch.append(job)
            else:
                left.append(job)
        self._waiting = deque(left)
        return batch

    def _fit_together(self, jobs: Sequence[Job]) -> bool:
        """Return whether every request gets as many tokens in one batch as alone: a short prompt is padded to the longest."""
        lengths = [len(job.tokens) for job in jobs]
        if len(jobs) == 1:
            return True
        if not self._padded:
            return len(set(lengths)) == 1
        context = self._session.context
        alone = [min(job.sampling.max_new_tokens, context + 1 - n) for job, n in zip(jobs, lengths, strict=True)]
        return max(alone) <= context + 1 - max(lengths)

    def _run_batch(self, jobs: Sequence[Job]) -> None:
        streams = [TextStream(self._tokenizer, job.stops) for job in jobs]
        late: set[int] = set()

        def forward(row: int, token: int) -> bool:
            job, stream = jobs[row], streams[row]
            if token not in self._eos and (text := stream.push(token)):
                job.deliver(Piece(text))
            if time.monotonic() > job.deadline:
                late.add(row)
            return stream.stopped or row in late or job.cancelled.is_set()

        try:
            found = generate_rows(
                self._session, [job.tokens for job in jobs], [job.sampling for job in jobs], eos=self._eos,
                on_token=forward,
            )  # fmt: skip
        except Exception as error:  # the thread has to live on; every request of the batch is told
            for job in jobs:
                job.deliver(Piece(error=error))
            return
        for row, job in enumerate(jobs):
            rest = streams[row].finish()
            stopped = TIME if row in late and found.stopped[row] != END else found.stopped[row]
            job.deliver(Piece(rest, stopped, len(found.tokens[row])))
