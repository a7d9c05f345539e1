"""The runner of passes, which checks what they do; `declare.py` says what a pass is.

After every pass the runner verifies the module, its stage and the program's signature, on demand compares the numbers,
and writes a numbered dump. A failure names the pass and leaves the module before it with a command that fails again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import MoecError
from ..errors.progress import begin_phase
from ..ir.module import Module
from ..ir.notes import Note, Rewritten
from ..ir.pipelines import PassCall, Pipeline
from ..ir.stages import STAGES
from ..ops.verify import verify_module
from ..text.parser import parse_module
from ..text.printer import print_module
from .declare import PassDef, resolve_passes, stop_hint

TOLERANCE = 1e-4  # largest difference relative to the largest number before, apart from rounded weights


@dataclass(frozen=True)
class PassTiming:
    """The time of a pass with the checks after it, in seconds, and whether it changed anything."""

    name: str
    seconds: float
    changed: bool


@dataclass(frozen=True)
class Settings:
    """The settings of a run, the same for every pass; see run_pipeline."""

    target: Any = None
    check: bool = False
    dump: Path | None = None


@dataclass(frozen=True)
class Run:
    """The result of a run: the module, what the passes report, how long each took, and the module that each was given.

    Of a pass that ran twice, `given` has the later one.
    """

    module: Module
    notes: tuple[Note, ...]
    timings: tuple[PassTiming, ...]
    given: Mapping[str, Module]


def run_pipeline(
    module: Module,
    pipeline: Pipeline,
    *,
    target: Any = None,
    check: bool = False,
    dump: Path | None = None,
    stop_after: str | None = None,
    table: Mapping[str, PassDef],
) -> Run:
    """Run passes, each by name with its options, and check each one.

    `dump` is a folder for numbered modules; `stop_after` is a pass or a stage (the module as it is before a pass leaves that
    stage); `table` maps names to passes.
    MoecError (exit code 1) where a pass breaks its contract, (exit code 2) where the pipeline itself is wrong.
    """
    steps = _stop_after_stage(resolve_passes(pipeline, table), stop_after)
    settings = Settings(target, check, dump)
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / "00.load.moir").write_text(print_module(module), "utf-8")
    notes: list[Note] = []
    timings: list[PassTiming] = []
    given: dict[str, Module] = {}
    with begin_phase("pass", len(steps)) as phase:
        for number, (definition, options) in enumerate(steps, 1):
            phase.advance(number, detail=definition.name)
            given[definition.name] = module
            (module, found), timing = _run_pass(module, number, definition, options, settings)
            notes += found
            timings.append(timing)
    return Run(module, tuple(notes), tuple(timings), given)


def remaining_passes(module: Module, pipeline: Pipeline, table: Mapping[str, PassDef]) -> Pipeline:
    """Return the passes still to run; an IR file enters the pipeline at its stage."""
    if module.stage == STAGES[0]:
        return pipeline
    done = next((i for i, call in enumerate(pipeline, 1) if table[call.name].leaves == module.stage), len(pipeline))
    return pipeline[done:]


def _stop_after_stage(steps: list[tuple[PassDef, dict]], stop_after: str | None) -> list[tuple[PassDef, dict]]:
    if stop_after is None:
        return steps
    if stop_after in STAGES:
        later = STAGES[STAGES.index(stop_after) + 1 :]
        return steps[: next((i for i, (d, _) in enumerate(steps) if d.leaves in later), len(steps))]
    names = [definition.name for definition, _ in steps]
    if stop_after not in names:
        raise MoecError(
            f"cannot stop after {stop_after}: it is no stage and no pass of this pipeline",
            todo=stop_hint(stop_after, names),
        )
    last = max(i for i, name in enumerate(names) if name == stop_after)
    return steps[: last + 1]


def _run_pass(
    module: Module, number: int, definition: PassDef, options: dict, settings: Settings
) -> tuple[Rewritten, PassTiming]:
    start = time.perf_counter()
    try:
        _check_reads(module, definition)
        result, notes = definition.run(module, settings.target, **options)
    except MoecError as error:
        raise _failed_pass(error, "in", module, number, definition, options, settings) from error
    except Exception as error:  # a bug in a pass; the traceback stays as the cause
        what = f"a mistake of moec's own stopped it ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        problem = MoecError(what, todo="--debug shows where", exit_code=1)
        raise _failed_pass(problem, "in", module, number, definition, options, settings) from error
    changed = result is not module
    try:
        if changed:
            _check_result(module, result, definition, settings)
    except MoecError as error:
        pointed = _error_in_dump(error, result, number, definition, settings)
        raise _failed_pass(pointed, "found after", module, number, definition, options, settings) from error
    if changed and settings.dump is not None:
        (settings.dump / f"{number:02}.{definition.name}.moir").write_text(print_module(result), "utf-8")
    return Rewritten(result, notes), PassTiming(definition.name, time.perf_counter() - start, changed)


# --- the contract ----------------------------------------------------------------------------------------------


def _check_reads(module: Module, definition: PassDef) -> None:
    if definition.reads not in ("any", module.stage):
        raise MoecError(
            f"pass {definition.name} reads stage {definition.reads}, the module is at stage {module.stage}",
            todo="put the pass where the module is at its stage",
        )


def _check_result(before: Module, after: Module, definition: PassDef, settings: Settings) -> None:
    if not isinstance(after, Module):
        raise MoecError(f"the pass returned {type(after).__name__}, not a module", exit_code=1)
    verify_module(after)
    leaves = before.stage if definition.leaves == "any" else definition.leaves
    if after.stage != leaves:
        raise MoecError(f"the module is at stage {after.stage}, the pass leaves {leaves}", exit_code=1)
    if after.stage == "kernel" != before.stage and settings.target is not None:
        for function in after.functions:
            for op in function.ops:
                if op.name != "call" and (reason := settings.target.ops.supported(op)):
                    place = f"{op.results[0]} in @{function.name}"
                    raise MoecError(reason, place, model=", ".join(op.loc), exit_code=1)
    _check_signature(before, after, definition.states)
    if settings.check:
        from ..check.compare import compare_modules
        from ..check.rounding import compare_rounded

        (compare_rounded if definition.rounds else compare_modules)(before, after, TOLERANCE)


def _check_signature(before: Module, after: Module, restored: bool) -> None:
    """Raise MoecError where inputs or outputs changed; states may where they are stored in another way on purpose."""
    old, new = (
        [[v for v in values if not (restored and v.type.state)] for values in (m.main.params, m.main.results)]
        for m in (before, after)
    )
    if old[0] != new[0]:
        raise MoecError(f"the inputs of @main changed: {_first_difference(old[0], new[0])}", where="@main", exit_code=1)
    types = [[v.type for v in results] for _, results in (old, new)]
    if types[0] != types[1]:
        raise MoecError(f"the outputs of @main changed: {_first_difference(*types)}", where="@main", exit_code=1)


def _first_difference(old: Sequence[Any], new: Sequence[Any]) -> str:
    for a, b in zip(old, new, strict=False):
        if a != b:
            return f"{a}: {getattr(a, 'type', '')} became {b}: {getattr(b, 'type', '')}".replace(": ", " ").strip()
    return f"there were {len(old)}, there are {len(new)}"


# --- failures --------------------------------------------------------------------------------------------------


def _error_in_dump(error: MoecError, result: Module, number: int, definition: PassDef, settings: Settings) -> MoecError:
    """Return the error with line and caret in the dump of the wrong module, where its text shows the same problem."""
    if settings.dump is None or not isinstance(result, Module):
        return error
    path = settings.dump / f"{number:02}.{definition.name}.moir"
    try:
        text = print_module(result)
        path.write_text(text, "utf-8")
        parse_module(text, str(path))
    except MoecError as shown:
        return replace(error, where=shown.where, excerpt=shown.excerpt)
    except (ValueError, KeyError, AttributeError, TypeError):  # too wrong to be printed: the message alone must do
        return error
    return error


def _failed_pass(
    error: MoecError,
    found: str,
    module: Module,
    number: int,
    definition: PassDef,
    options: dict,
    settings: Settings,
) -> MoecError:
    """Return the error with the pass, and how to see it again: a file and a command, in the dump or a temporary folder."""
    exit_code = error.exit_code if found == "in" else 1
    what = f"{error.what}, {found} pass {definition.name}"
    folder = settings.dump
    if folder is None and exit_code == 2:  # wrong use, said in full by the message: leave no files behind
        return replace(error, what=what)
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="moec-reproducer-"))
    path = folder / f"{number:02}.before.moir"
    path.write_text(print_module(module), "utf-8")
    name = getattr(settings.target, "name", "")
    target = f" --target {name}" if name else ""
    rerun = f"rerun: moec opt {path} -p '{PassCall(definition.name, options)}'{target} --check"
    todo = f"{error.todo}\n  {rerun}" if error.todo else rerun
    return replace(error, what=what, todo=todo, exit_code=exit_code)
