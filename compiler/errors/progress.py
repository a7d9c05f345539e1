"""How far a long command is: phases that a watcher is told of, and that the one logger `moec` records.

Phases are importing, pass, measuring, calibrating, writing, verifying and so on. The command shows them as a bar or as lines
(compiler/cli/progress.py); a program that uses moec as a library reads the records: `logging.getLogger("moec")` has one at
level INFO at the end of every phase, with its seconds, and one at level DEBUG for each step within.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

LOGGER = logging.getLogger("moec")


@dataclass(frozen=True)
class Progress:
    """A moment of a command: its phase, how much of it is done, of how much (None: not known), in which unit.

    `detail` says what is worked on, such as a pass by its name. `seconds` is None until the phase has ended.
    """

    phase: str
    done: int = 0
    total: int | None = None
    unit: str = ""
    detail: str = ""
    seconds: float | None = None

    def __str__(self) -> str:
        """Return it as one line: `pass 3 of 19 (fuse-norm)`, `writing: 1.2 of 3.4 GB`."""
        detail = f" ({self.detail})" if self.detail else ""
        if self.seconds is not None:
            return f"{self.phase}{detail}: {self.seconds:.2f} s"
        if not self.total or not self.done:
            return f"{self.phase}{detail}"
        if self.unit == "bytes":
            return f"{self.phase}{detail}: {bytes_of(self.done, self.total)}"
        unit = f": {self.unit}" if self.unit else ""
        return f"{self.phase}{unit} {self.done} of {self.total}{detail}"


Watcher: TypeAlias = Callable[[Progress], None]
_watcher: ContextVar[Watcher | None] = ContextVar("moec-watcher", default=None)


class Phase:
    """A phase that is under way; `advance` may be called from any thread."""

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        """Begin it; whoever watches the context that begins it is told."""
        self.total = total
        self._name, self._unit, self._steps = name, unit, 0
        self._watcher, self._start = _watcher.get(), time.perf_counter()
        self.advance(0)

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None:
        """Say how much is done, and of how much where that was not known before."""
        self.total = self.total if total is None else total
        self._tell(Progress(self._name, done, self.total, self._unit, detail))

    def step(self, detail: str = "") -> None:
        """Say that one more is done."""
        self._steps += 1
        self.advance(self._steps, detail=detail)

    def end(self) -> None:
        """Say that it has ended, and how long it took."""
        seconds = time.perf_counter() - self._start
        self._tell(Progress(self._name, unit=self._unit, seconds=seconds), logging.INFO)

    def _tell(self, progress: Progress, level: int = logging.DEBUG) -> None:
        LOGGER.log(level, "%s", progress)
        if self._watcher is not None:
            self._watcher(progress)


@contextmanager
def begin_phase(name: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
    """Begin a phase, and end it with the block; one that fails has no end."""
    phase = Phase(name, total, unit)
    yield phase
    phase.end()


@contextmanager
def watch_progress(watcher: Watcher) -> Iterator[None]:
    """Call a function with a Progress whenever a phase that began within the block begins, advances and ends.

    >>> with moec.watch_progress(print):  # doctest: +SKIP
    ...     moec.compile("examples/tiny-moe", out="tiny")
    importing
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def bytes_of(done: int, total: int) -> str:
    """Return bytes of bytes in the unit that suits the whole: `1.2 of 3.4 GB`."""
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if total >= s), ("kB", 1e3))
    return f"{done / scale:.1f} of {total / scale:.1f} {unit}"
