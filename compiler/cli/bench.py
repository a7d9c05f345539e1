"""`moec bench`: how fast an artifact runs, as tables that fit 80 columns or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .base import device_option, examples_epilog, json_option, print_notes, shared_options, threads_option
from .progress import show_progress

if TYPE_CHECKING:
    from ..runtime.bench_result import Bench, Measured, OpShare, Profile

SMALL = 0.005  # share of a step below which ops of a part are shown together


def _numbers(context: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Return the numbers that an option lists, each once."""
    if text is None:
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 16,512", context, param) from None


@click.command(
    epilog=examples_epilog(
        "moec bench tiny",
        "moec bench tiny --prompt 128,512 --past 16,1024 --batch 1,4,8 --repeats 9",
        "moec bench tiny --json --no-ops | jq .decode",
    )
)
@click.argument("folder", metavar="DIR")
@click.option(
    "--prompt", "prompts", metavar="N,...", callback=_numbers, help="Tokens of the prefills.  [default: 16,512]"
)
@click.option(
    "--past", "pasts", metavar="N,...", callback=_numbers,
    help="Past tokens of the decode steps.  [default: 16,1024,4096]",
)  # fmt: skip
@click.option("--batch", "batches", metavar="N,...", callback=_numbers, help="Sequences of a step.  [default: 1]")
@click.option("--steps", type=int, metavar="N", help="Decode steps of a repeat.  [default: 32]")
@click.option("--repeats", type=int, metavar="N", help="Repeats, of which the median counts.  [default: 5]")
@threads_option
@click.option("--accuracy", type=click.Choice(["fast", "exact"]), help="As in `moec run`.  [default: as compiled]")
@device_option
@click.option("--ops/--no-ops", default=True, help="Say where the time goes, which opens the model once more.")
@json_option
@shared_options
def bench(folder: str, as_json: bool, **asked: Any) -> None:
    """Measure how fast an artifact runs.

    Prefill and decode by length and batch, medians with their spread; the bytes that a decode step reads, as the program says, and what share of the streaming read bandwidth they are, which is measured by the same threads between the repeats; where the time goes, by op, with what timing each op adds to it. In a simulator, where little is measured unasked, times are no speed: the predicted ones stand beside.

    Lengths left out are as far as the model's context goes.
    """
    from ..runtime.artifact import Artifact

    artifact = Artifact.open(Path(folder))
    from ..runtime.bench import bench_artifact

    with show_progress():
        found = bench_artifact(artifact, **asked)
    print_notes(found.notes)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show_bench(found)


def show_bench(found: Bench) -> None:
    """Print what was measured as tables."""
    from .table import make_table, print_parts, stdout_console

    console = stdout_console()
    print_parts(console, *_heading(found))
    for kind, columns in (("prefill", _PREFILL), ("decode", _DECODE)):
        rows = [m for m in found.measured if m.point.kind == kind]
        chosen = [c for c in columns if any(c[1](m) for m in rows)]
        cells = [[cell(m) for _, cell in chosen] for m in rows]
        print_parts(console, "", kind, make_table([(title, True) for title, _ in chosen], cells))
    for profile in found.profiles:
        print_parts(console, "", *_profile_lines(profile))


def _heading(found: Bench) -> list[str]:
    runs = f", on {found.runs}" if found.runs else f", {found.threads} thread{'s' * (found.threads > 1)}"
    repeats = f"{found.plan.repeats} repeat{'s' * (found.plan.repeats > 1)}"
    lines = [f"{found.folder}: target {found.target}{runs}", f"medians of {repeats} (smallest..largest)"]
    if not found.chip:
        lines.append(f"times are those of {found.runs}, not the speed of a chip")
    if found.stream:
        s = found.stream
        read = f"{s.median / 1e9:.1f} GB/s ({s.min / 1e9:.1f}..{s.max / 1e9:.1f})"
        lines.append(f"streaming read of the memory by as many threads: {read}")
    return lines


def _rate_text(m: Measured) -> str:
    return f"{_number_text(m.rate.median)} ({_number_text(m.rate.min)}..{_number_text(m.rate.max)})"


def _predicted_text(m: Measured) -> str:
    return "" if m.predicted is None else _number_text(m.predicted * 1e3)


def _bytes_text(m: Measured) -> str:
    return "" if m.weights is None or m.states is None else _number_text((m.weights + m.states) / m.point.batch / 1e6)


_PREFILL: tuple[tuple[str, Callable[[Measured], str]], ...] = (
    ("tokens", lambda m: f"{m.point.tokens:,}"), ("batch", lambda m: str(m.point.batch)), ("tokens/s", _rate_text),
    ("ms", lambda m: _number_text(m.seconds.median * 1e3)), ("predicted\nms", _predicted_text),
)  # fmt: skip
_DECODE: tuple[tuple[str, Callable[[Measured], str]], ...] = (
    ("past", lambda m: f"{m.point.tokens:,}"), ("batch", lambda m: str(m.point.batch)), ("tokens/s", _rate_text),
    ("ms\na step", lambda m: _number_text(m.seconds.median * 1e3)), ("predicted\nms", _predicted_text),
    ("MB a\ntoken", _bytes_text), ("band-\nwidth", lambda m: "" if m.share is None else f"{m.share:.0%}"),
)  # fmt: skip


def _number_text(number: float) -> str:
    """Return a number with three digits, more in front of the point."""
    digits = 0 if number >= 100 else 1 if number >= 10 else 2 if number >= 1 else 3 if number >= 0.1 else 4
    return f"{number:,.{digits}f}"


def _profile_lines(profile: Profile) -> list[Any]:
    """Return where the time of a point goes: a title and a table, the ops of each part of the model below it."""
    from .table import make_table

    point = profile.point
    what = f"decode behind {point.tokens:,} tokens" if point.kind == "decode" else f"prefill of {point.tokens:,} tokens"
    title = f"where the time goes: {what}, batch {point.batch}"
    columns = [("", False), ("runs", True), ("ms", True), ("share", True)]
    if any(op.predicted is not None for op in profile.ops):  # for all tokens that the kernel is for, see kernels.json
        columns.append(("predicted ms", True))
    rows = []
    by_part: dict[str, list[OpShare]] = {}
    for op in profile.ops:
        by_part.setdefault(op.part, []).append(op)
    for part, ops in sorted(by_part.items(), key=lambda item: -sum(op.seconds for op in item[1])):
        rows.append(_share_row(part, ops, profile.seconds))
        large = [op for op in ops if op.seconds >= SMALL * profile.seconds]
        rows += [_share_row(f"  {op.name}", [op], profile.seconds) for op in large]
        if small := [op for op in ops if op.seconds < SMALL * profile.seconds]:
            rows.append(_share_row(f"  {len(small)} more" if large else f"  {len(small)} ops", small, profile.seconds))
    between = profile.seconds - sum(op.seconds for op in profile.ops)
    rows.append(("between them", "", _number_text(between * 1e3), f"{between / profile.seconds:.1%}", ""))
    return [title, make_table(columns, [row[: len(columns)] for row in rows])]


def _share_row(name: str, ops: Sequence[OpShare], whole: float) -> tuple[str, ...]:
    seconds, runs = sum(op.seconds for op in ops), sum(op.runs for op in ops)
    predicted = [op.predicted for op in ops if op.predicted is not None]
    text = _number_text(sum(predicted) * 1e3) if len(predicted) == len(ops) else ""
    return (name, f"{runs:,.0f}", _number_text(seconds * 1e3), f"{seconds / whole:.1%}", text)
