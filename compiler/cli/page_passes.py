"""What each pass did to a program, run again for a page: how long it took, and the lines that it changed."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MoecError
from ..ir.pipelines import parse_pipeline

if TYPE_CHECKING:
    from ..ir.module import Module
    from ..ir.pipelines import Pipeline

MOST = 500_000  # characters of all differences on a page
LONGEST = 400  # characters of a line


@dataclass(frozen=True)
class PassStep:
    """A pass that was run: its seconds, the program's ops after it, and the lines before and after, few around each change."""

    name: str
    seconds: float
    ops: int
    changed: bool
    lines: tuple[str, ...]


def run_steps(module: Module, manifest: Mapping[str, Any], source: str) -> tuple[list[PassStep], str]:
    """Run the passes that made a program again; return what each did, and why there are none to show.

    Of an artifact these are the passes of its moec.json on its source, of another source those that every target runs.
    """
    from ...targets import declare_kernel_ops, open_target
    from ...targets.target import FUSED
    from ..driver import passes_for
    from ..errors.paths import find_source
    from ..frontends.load import load

    target = open_target(manifest.get("target", "cpu"), {})
    declare_kernel_ops(target)
    passes: Pipeline = FUSED
    if manifest:
        name = str(manifest["source"].get("name", ""))
        found = find_source(name, Path(source)) if name and not name.startswith("python:") else None
        if found is None:
            return [], f"The source {name or 'of this artifact'} is not there: no pass can be run again."
        try:
            module = load(str(found)).module
        except MoecError as error:
            return [], f"The source cannot be read: {error.what}."
        passes = parse_pipeline(manifest["pipeline"])
    if module.stage != "graph":
        return [], f"The program is at stage {module.stage}: the passes are behind it."
    return _steps_of(module, passes, target, passes_for(target)), ""


def _steps_of(module: Module, passes: Pipeline, target: Any, table: Mapping[str, Any]) -> list[PassStep]:
    from ..rewrite.pipeline import run_pipeline

    with tempfile.TemporaryDirectory(prefix="moec-page-") as folder:
        run = run_pipeline(module, passes, target=target, dump=Path(folder), table=table)
        text = (Path(folder) / "00.load.moir").read_text("utf-8")
        changes = max(1, sum(timing.changed for timing in run.timings))
        steps = []
        for number, timing in enumerate(run.timings, 1):
            before = text
            if timing.changed:
                text = (Path(folder) / f"{number:02}.{timing.name}.moir").read_text("utf-8")
            lines = _changed_lines(before, text, MOST // changes) if timing.changed else ()
            steps.append(PassStep(timing.name, timing.seconds, _count_ops(text), timing.changed, lines))
    return steps


def _count_ops(text: str) -> int:
    """Return the statements of a program's text: a layer that repeats counts once, and so do calls that count up."""
    return sum(line.startswith("  %") for line in text.splitlines())


def _changed_lines(before: str, after: str, most: int) -> tuple[str, ...]:
    """Return the difference of two texts as lines that begin with -, + or a space; those that are too many are counted."""
    found = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=2))[2:]
    return _cut_lines([line if len(line) <= LONGEST else line[: LONGEST - 4] + " ..." for line in found], most)


def _cut_lines(lines: Sequence[str], most: int) -> tuple[str, ...]:
    kept, total = 0, 0
    while kept < len(lines) and total + len(lines[kept]) <= most:
        total += len(lines[kept])
        kept += 1
    left = len(lines) - kept
    return (*lines[:kept], *([f"@@ {left} more lines: moec compile SOURCE --dump DIR writes all @@"] if left else []))
