"""Measures how fast an artifact runs: prefill and decode by length and batch, and where the time goes.

A prefill is that of a whole prompt. A decode step takes one token of each sequence of a batch behind so many past ones; the
past is computed once, and every repeat goes on from there. Tokens are random, so that routing is not that of one text.
The bytes of a step are counted from the program. Before every repeat the streaming read of the same machine is measured,
by as many threads: a decode step cannot take less time than reading its bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ...targets import TARGETS, declare_kernel_ops
from ...targets.cpu.run.session import usable_cores
from ...targets.session import OpTime
from ..errors import MoecError
from ..errors.progress import begin_phase
from ..ir.notes import Note
from ..weights.memory import capped_threads
from .bench_result import DEFAULT, SLOW, Bench, Measured, OpShare, Plan, Point, Profile, Spread
from .generate import run_prefill
from .stream import StreamReader, free_memory

if TYPE_CHECKING:
    from ..cost.count import Costs
    from ..cost.parts import ModelParts
    from ..ir.module import Module
    from .artifact import Artifact

WARM_TOKENS = 16  # of the prefill that nothing is measured of
CACHE_COPIES = 3  # of the caches, that a decode holds at most: buffers that grow, and those that a repeat goes on from


def bench_artifact(
    artifact: Artifact, *, prompts: Sequence[int] | None = None, pasts: Sequence[int] | None = None,
    batches: Sequence[int] | None = None, steps: int | None = None, repeats: int | None = None, ops: bool = True,
    threads: int | None = None, **options: Any,
) -> Bench:  # fmt: skip
    """Measure an artifact; what is not given is as in bench_result.DEFAULT, shortened to the model's context.

    `ops` also says where the time goes, for which the artifact is opened once more. `options` are those of the session.
    MoecError for what the model cannot be asked for.
    """
    threads = capped_threads(threads) or usable_cores()
    program = _Program(artifact)
    session = artifact.session(threads=threads, **options)
    plan = _plan_for(session, program, prompts, pasts, batches, steps, repeats)
    _check_memory(program, plan, session)
    reader = StreamReader(threads) if getattr(session, "in_host_memory", False) else None
    points, profiled = plan.points, plan.profiled if ops else ()
    runs, chip = getattr(session, "runs", ""), not getattr(session, "slow", False)
    streams: list[float] = []
    measured = []
    try:
        with begin_phase("measuring", len(points), "point") as phase:
            for point in points:
                seconds, read = _Steps(session, plan, point).repeated(reader)
                streams += read
                measured.append(_measured(point, plan, program, chip, seconds, read))
                phase.step()
    finally:
        if reader:
            reader.close()
    profiles = []
    if profiled:
        del session  # two copies of the weights would take twice the memory
        profiles = list(_profiles(artifact, program, plan, threads=threads, **options))
    return Bench(
        str(artifact.folder), artifact.target, runs, chip, threads, plan, Spread.of(streams) if streams else None,
        tuple(measured), tuple(profiles), program.notes,
    )  # fmt: skip


# --- what is asked for ---------------------------------------------------------------------------------------------


def _plan_for(
    session: Any, program: _Program, prompts: Sequence[int] | None, pasts: Sequence[int] | None,
    batches: Sequence[int] | None, steps: int | None, repeats: int | None,
) -> Plan:  # fmt: skip
    """Return what is measured; MoecError for what is outside of the model's sizes."""
    usual = SLOW if getattr(session, "slow", False) else DEFAULT
    plan = replace(
        usual, batches=tuple(batches or usual.batches), repeats=usual.repeats if repeats is None else repeats
    )
    room = session.context - 1  # decode takes a step that is not measured
    plan = replace(plan, steps=max(1, min(usual.steps, room - 1)) if steps is None else steps)
    _check_numbers("--steps", (plan.steps,), room - 1, f"the model's context is {session.context} tokens")
    _check_numbers("--repeats", (plan.repeats,), None, "")
    _check_numbers("--batch", plan.batches, program.most_rows, "the program takes no more sequences")
    longest = {"--prompt": session.context, "--past": room - plan.steps}
    chosen = []
    for name, given, default in (("--prompt", prompts, usual.prompts), ("--past", pasts, usual.pasts)):
        if given is None:
            given = tuple(dict.fromkeys(min(n, longest[name]) for n in default))
        after = f", of which {plan.steps + 1} are for the steps" if name == "--past" else ""
        _check_numbers(name, given, longest[name], f"the model's context is {session.context} tokens{after}")
        chosen.append(tuple(given))
    return replace(plan, prompts=chosen[0], pasts=chosen[1])


def _check_numbers(name: str, numbers: Iterable[int], most: int | None, why: str) -> None:
    for number in numbers:
        if number < 1:
            raise MoecError(f"{name} is {number}", todo="give 1 or more")
        if most is not None and number > most:
            raise MoecError(f"{name} is {number}: {why}", todo=f"give at most {most}")


def _check_memory(program: _Program, plan: Plan, session: Any) -> None:
    """Raise MoecError where the caches of the largest decode do not fit into this machine's memory."""
    free = free_memory()
    if not getattr(session, "in_host_memory", False) or free is None or not plan.pasts:
        return
    batch, past = max(plan.batches), max(plan.pasts)
    needed = CACHE_COPIES * batch * program.costs.at(program.costs.total.state_bytes, past + plan.steps)
    if needed > free:
        from ..cost.report import bytes_text

        what = f"decoding {batch} sequences behind {past} tokens takes {bytes_text(needed)} for caches"
        raise MoecError(f"{what}, {bytes_text(free)} are free", todo="give a smaller --batch or --past")


class _Program:
    """The program of an artifact, and what is counted and predicted of it."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.target = TARGETS.get(artifact.target)
        self._unpredicted: list[str] = []

    @cached_property
    def module(self) -> Module:
        """The program."""
        from ..text.parser import parse_module

        declare_kernel_ops(*([self.target] if self.target else []))
        path = self.artifact.folder / "program.moir"
        try:
            return parse_module(path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise MoecError(f"the program cannot be read: {error.strerror}", where=str(path)) from error

    @cached_property
    def costs(self) -> Costs:
        """What it reads."""
        from ..cost.count import module_costs

        return module_costs(self.module)

    @cached_property
    def parts(self) -> ModelParts:
        """Which parts of the model its ops are of."""
        from ..cost.parts import model_parts

        return model_parts(self.module)

    @property
    def most_rows(self) -> int:
        """How many sequences it takes."""
        return int(self.artifact.manifest["dims"].get("B", (1, 1))[1])

    @property
    def notes(self) -> tuple[Note, ...]:
        """What was not predicted, and why."""
        return tuple(Note(f"a step is not predicted: {reason}") for reason in dict.fromkeys(self._unpredicted))

    def predict(self, point: Point) -> dict[str, Any] | None:
        """Return the prediction of a point's step by the figures of the chip; None for what is not known by figures."""
        if self.target is None or self.target.predict is None:
            return None
        new, past = (point.tokens, 0) if point.kind == "prefill" else (1, point.tokens)
        try:
            return self.target.predict(self.module, batch=point.batch, new=new, past=past, devices=1)
        except MoecError as error:
            self._unpredicted.append(error.what)
            return None


# --- times ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Steps:
    """The steps of one point on a session, on random tokens."""

    session: Any
    plan: Plan
    point: Point

    def repeated(self, reader: StreamReader | None) -> tuple[list[float], list[float]]:
        """Return the seconds of each repeat, of a decode those of one step, and the streaming read before each."""
        once = self.prepared()
        seconds, streams = [], []
        for _ in range(self.plan.repeats):
            streams += [reader.read_rate()] if reader else []
            seconds.append(once()[0])
        return seconds, streams

    def prepared(self) -> Callable[[], tuple[float, int, int]]:
        """Return a function that runs once: seconds, and when it began and ended as time.monotonic_ns() counts."""
        if self.point.kind == "prefill":
            ids = self._tokens(self.point.tokens)
            if not getattr(self.session, "slow", False):
                self._prefill(self._tokens(WARM_TOKENS)[:, : self.point.tokens])
                self._prefill(ids)  # what a step of this size takes of memory is there from now on
            return lambda: _timed(lambda: self._prefill(ids), 1)
        states = self._prefill(self._tokens(self.point.tokens))
        return lambda: self._decode(states)

    def _tokens(self, count: int) -> np.ndarray:
        generator = np.random.default_rng([self.point.tokens, count])
        return generator.integers(0, self.session.vocabulary, (self.point.batch, count))

    def _prefill(self, ids: np.ndarray) -> Any:
        """Run prompts and return their states."""
        positions = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
        return run_prefill(self.session, ids, np.ones_like(ids), positions)[1]

    def _decode(self, states: Any) -> tuple[float, int, int]:
        """Time the steps behind one that is not timed, in which caches are copied: the states stay for the next repeat."""
        ids, past = self._tokens(self.plan.steps + 1), self.point.tokens

        def step(number: int) -> None:
            nonlocal states
            mask = np.ones((self.point.batch, past + number + 1), np.int64)
            positions = np.full((self.point.batch, 1), past + number)
            _, states = self.session.step(ids[:, number : number + 1], mask, positions, states, last=1)

        step(0)

        def steps() -> None:
            for number in range(1, self.plan.steps + 1):
                step(number)

        return _timed(steps, self.plan.steps)


def _timed(run: Callable[[], Any], steps: int) -> tuple[float, int, int]:
    """Run; return the seconds of a step, and when it all began and ended."""
    start = time.monotonic_ns()
    run()
    end = time.monotonic_ns()
    return (end - start) / 1e9 / steps, start, end


def _measured(
    point: Point, plan: Plan, program: _Program, chip: bool, seconds: Sequence[float], streams: Sequence[float]
) -> Measured:
    """Return what is known of a point by the times of its repeats."""
    predicted = program.predict(point)
    tokens = point.batch * (point.tokens if point.kind == "prefill" else 1)
    rate = Spread.of([tokens / s for s in seconds])
    found = Measured(point, Spread.of(seconds), rate, predicted=predicted["time"] if predicted else None)
    if point.kind == "prefill":
        return found
    if predicted:
        weights, states = predicted["bytes"]["weights"], predicted["bytes"]["states"]
        share = predicted["bandwidth_share"] * predicted["time"] / found.seconds.median
        return replace(found, weights=weights, states=states, share=share if chip else None)
    # a step is in the middle of those that are measured
    weights, states = program.costs.step_bytes(point.batch, point.tokens + plan.steps // 2)
    pairs = [(weights + states) / s / stream for s, stream in zip(seconds, streams, strict=False)]
    return replace(found, weights=weights, states=states, share=median(pairs) if pairs else None)


# --- where the time goes -------------------------------------------------------------------------------------------


def _profiles(artifact: Artifact, program: _Program, plan: Plan, **options: Any) -> Iterator[Profile]:
    """Open the artifact so that it times its ops, and yield where the time of each profiled point goes."""
    session: Any = artifact.session(profiling=True, **options)
    taken = []
    with begin_phase("timing ops", len(plan.profiled), "point") as phase:
        for point in plan.profiled:
            taken.append((point, _Steps(session, plan, point).prepared()()))
            phase.step()
    events = session.events()
    for point, (seconds, start, end) in taken:
        steps = plan.steps if point.kind == "decode" else 1
        within = [event for event in events if start <= event.start < end]
        yield Profile(point, seconds, tuple(_shares(within, program.parts, steps)))


def _shares(events: Iterable[OpTime], parts: ModelParts, steps: int) -> Iterator[OpShare]:
    """Yield what runs of each op took of a step, the longest of each part first."""
    grouped: dict[tuple[str, str], list[OpTime]] = {}
    for event in events:
        grouped.setdefault((parts.part_of(event.modules), event.name), []).append(event)
    for (part, name), group in sorted(grouped.items(), key=lambda item: -sum(e.seconds for e in item[1])):
        predicted = [e.predicted for e in group if e.predicted is not None]
        yield OpShare(
            part, name, sum(e.seconds for e in group) / steps, len(group) / steps,
            sum(predicted) / steps if len(predicted) == len(group) else None,
        )  # fmt: skip
