"""Shows how far a command is: a bar on a terminal, plain lines elsewhere, both with rates and an estimate of what is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from ..errors.progress import Progress, Watcher, watch_progress
from .base import is_quiet, is_verbose

EVERY = 60.0  # seconds between the lines of a file or a pipe; a command that is done earlier writes none
WARM_UP = 1.0  # seconds of a phase that no rate counts: files are opened, threads begin
MEASURED = 2.0  # seconds that a rate is taken over at least


class Rate:
    """How fast a phase advances, from what it did after a warm-up."""

    def __init__(self) -> None:
        """Begin without any measurement."""
        self._begun: float | None = None
        self._from: tuple[float, int] | None = None

    def figures(self, progress: Progress, now: float) -> str:
        """Take a step, and return what is known: `25 %, 340.0 MB/s, 27 s left`; the rate only when it can be trusted."""
        if self._begun is None:
            self._begun = now
        if self._from is None and now - self._begun >= WARM_UP and progress.done:
            self._from = (now, progress.done)
        if not progress.total or not progress.unit:  # passes take as long as they like
            return ""
        found = [f"{100 * progress.done / progress.total:.0f} %"]
        start, before = self._from or (now, progress.done)
        if now - start >= MEASURED and progress.done > before:
            rate = (progress.done - before) / (now - start)
            if progress.unit == "bytes":
                found.append(f"{rate / 1e6:.1f} MB/s")
            found.append(f"{duration_text((progress.total - progress.done) / rate)} left")
        return ", ".join(found)


def duration_text(seconds: float) -> str:
    """Return seconds for people: `27 s`, `3:05 min`, `2:10 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02} h"


class Lines:
    """Writes a line now and then; `verbose`, one at every beginning and end of a phase and at every named step as well."""

    def __init__(self, write: Callable[[str], None], verbose: bool, clock: Callable[[], float]) -> None:
        """Begin to count the seconds to the first line."""
        self._write, self._verbose, self._clock = write, verbose, clock
        self._last = clock()
        self._phase, self._detail, self._rate = "", "", Rate()

    def __call__(self, progress: Progress) -> None:
        """Take a moment of the command."""
        now = self._clock()
        if progress.seconds is not None:
            self._phase = ""
            if self._verbose:
                self._write(str(progress))
            return
        begins = progress.phase != self._phase
        if begins:
            self._phase, self._rate = progress.phase, Rate()
        figures = self._rate.figures(progress, now)
        named = self._verbose and progress.detail not in ("", self._detail)
        self._detail = progress.detail
        if (begins and self._verbose) or named or now - self._last >= EVERY:
            self._last = now
            self._write(f"{progress}, {figures}" if figures and progress.done else str(progress))


@contextmanager
def show_progress() -> Iterator[None]:
    """Show the phases within the block on standard error: as a bar on a terminal, else as lines; not at all with --quiet."""
    context = click.get_current_context()
    if is_quiet(context):
        yield
    elif sys.stderr.isatty() and not is_verbose(context):
        with _moving_bar() as watcher, watch_progress(watcher):
            yield
    else:
        lines = Lines(lambda text: click.echo(text, err=True), is_verbose(context), time.monotonic)
        with watch_progress(lines):
            yield


@contextmanager
def _moving_bar() -> Iterator[Watcher]:
    """Yield a watcher that moves one bar, which is gone in the end."""
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    text = TextColumn("{task.description}", markup=False)
    columns = (
        SpinnerColumn(),
        text,
        BarColumn(bar_width=20),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, figures="")
        phase, rate = "", Rate()

        def move(progress: Progress) -> None:
            nonlocal phase, rate
            if progress.seconds is not None:
                phase = ""
                return
            if progress.phase != phase:
                phase, rate = progress.phase, Rate()
                bar.reset(task, total=None, figures="")
            figures = rate.figures(progress, time.monotonic())
            bar.update(task, description=str(progress), completed=progress.done, total=progress.total, figures=figures)

        yield move
