"""Passes and the runner that checks what they do.

A pass is a function `(module, target, *, options)` (or `(module, target, why, *, options)` where it notes what its
rules refuse) under `@pass_`: name, help, options and contract all come from the definition. After every pass the
runner verifies the module, its stage and the program's signature, on demand compares the numbers, and writes a
numbered dump. A failure names the pass and leaves the module before it with a command that fails again.
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import MoecError
from ..ir.module import STAGES, Module
from ..ops.verify import verify
from ..text.parser import parse_module
from ..text.printer import print_module
from .rules import Why

TOLERANCE = 1e-4  # largest difference relative to the largest number before, apart from rounded weights


@dataclass(frozen=True)
class Option:
    """A keyword of a pass: its type (and None where that is allowed) and its default."""

    name: str
    type: type
    optional: bool
    default: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.type.__name__} = {spell(self.default)}"


@dataclass(frozen=True)
class PassDef:
    """A pass with its contract; `reads` and `leaves` are stages, or `any` for a pass that keeps the stage.

    `judge` raises MoecError for options that no module makes good; they are judged before the first pass runs.
    """

    name: str
    doc: str
    function: Callable[..., Module]
    reads: str
    leaves: str
    rounds: bool
    options: Mapping[str, Option]
    notes: bool
    judge: Callable[..., None] | None = None

    def __call__(self, module: Module, target: Any = None, why: Why = None, **options: Any) -> Module:
        """Run the pass, options checked, nothing else."""
        converted = self.convert(options)
        if self.notes:
            return self.function(module, target, why, **converted)
        return self.function(module, target, **converted)

    def convert(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options as the types that the pass declares; MoecError for one that it does not have."""
        converted = {name: self._convert(name, value) for name, value in given.items()}
        if self.judge is not None:
            self.judge(**{**{o.name: o.default for o in self.options.values()}, **converted})
        return converted

    def _convert(self, name: str, value: Any) -> Any:
        known = "; ".join(map(str, self.options.values())) or "none"
        if name not in self.options:
            raise MoecError(f"pass {self.name} has no option {name}", todo=f"its options: {known}")
        option = self.options[name]
        match value:
            case None | "none" if option.optional:
                return None
            case bool() if option.type is bool:
                return value
            case "true" | "false" if option.type is bool:
                return value == "true"
            case str() | int() | float() if option.type is str and not isinstance(value, bool):
                return str(value)
            case str() | int() | float() if option.type in (int, float) and not isinstance(value, bool):
                number = _number(value, option.type)
                if number is not None:
                    return number
        raise MoecError(
            f"option {name} of pass {self.name} is {spell(value)}, not {_article(option.type.__name__)}",
            todo=f"its options: {known}",
        )


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _number(value: str | int | float, type: type) -> int | float | None:
    try:
        return type(value) if isinstance(value, str) or type(value) == value else None
    except (ValueError, OverflowError):
        return None


def pass_(
    *, reads: str = "any", leaves: str | None = None, rounds: bool = False, judge: Callable[..., None] | None = None
) -> Callable[[Callable[..., Module]], PassDef]:
    """Declare a pass; `leaves` is `reads` unless given, `rounds` says that it stores weights in fewer bits, and `judge`
    takes all options and raises MoecError for wrong ones."""

    def declare(function: Callable[..., Module]) -> PassDef:
        signature = inspect.signature(function, eval_str=True)
        name = function.__name__.rstrip("_").replace("_", "-")
        options = {
            p.name: _option(name, p) for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY
        }
        doc = inspect.cleandoc(function.__doc__ or "")
        notes = "why" in signature.parameters
        return PassDef(name, doc, function, reads, leaves or reads, rounds, options, notes, judge)

    return declare


def _option(owner: str, parameter: inspect.Parameter) -> Option:
    kind, optional = parameter.annotation, False
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        rest = [t for t in typing.get_args(kind) if t is not types.NoneType]
        kind, optional = rest[0], True
        if len(rest) != 1:
            kind = object
    if kind not in (int, float, bool, str) or parameter.default is parameter.empty:
        raise TypeError(f"option {parameter.name} of pass {owner} must be int, float, bool or str, with a default")
    return Option(parameter.name, kind, optional, parameter.default)


def spell(value: Any) -> str:
    """Return an option's value as it is written on the command line."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case str():
            bare = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) and value not in ("true", "false", "inf", "nan")
            return value if bare else json.dumps(value)
    return repr(value)


def spell_pass(name: str, options: Mapping[str, Any]) -> str:
    """Return a pass as it is written on the command line: `quantize{group=32, scheme=int4}`."""
    inside = ", ".join(f"{key}={spell(value)}" for key, value in sorted(options.items()))
    return f"{name}{{{inside}}}" if inside else name


# --- the runner ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PassTiming:
    """How long a pass took, in seconds, without and with the checks after it, and whether it changed anything."""

    name: str
    seconds: float
    checked_seconds: float
    changed: bool


@dataclass(frozen=True)
class Settings:
    """What holds for every pass of a run; see run_pipeline."""

    target: Any = None
    check: bool = False
    dump: Path | None = None
    why: Why = None
    kernel_op: Callable[[str], bool] | None = None
    source_hint: str = ""


def run_pipeline(
    module: Module,
    passes: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    target: Any = None,
    check: bool = False,
    dump: Path | None = None,
    why: Why = None,
    stop_after: str | None = None,
    table: Mapping[str, PassDef],
    kernel_op: Callable[[str], bool] | None = None,
    source_hint: str = "",
    given: dict[str, Module] | None = None,
) -> tuple[Module, list[PassTiming]]:
    """Run passes, each by name with its options, and check each one; return the module and the timings.

    `dump` is a folder for numbered modules; `why` collects notes of rules that did not apply; `stop_after` is a pass
    or a stage (the module as it is before a pass leaves that stage); `table` maps names to passes; `kernel_op` says
    which ops the target has at the stage kernel; `source_hint` names the source in errors; `given` is filled with the
    module that each pass was given (the last time that it ran).
    MoecError (exit code 1) where a pass breaks its contract, (exit code 2) where the pipeline itself is wrong.
    """
    steps = _until(resolve(passes, table), stop_after)
    settings = Settings(target, check, dump, why, kernel_op, source_hint)
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / "00.load.moir").write_text(print_module(module), "utf-8")
    timings: list[PassTiming] = []
    for number, (definition, options) in enumerate(steps, 1):
        if given is not None:
            given[definition.name] = module
        module, timing = _run_pass(module, number, definition, options, settings)
        timings.append(timing)
    return module, timings


def resolve(
    passes: Sequence[tuple[str, Mapping[str, Any]]], table: Mapping[str, PassDef]
) -> list[tuple[PassDef, dict[str, Any]]]:
    """Return passes with their options as they take them; MoecError for what is wrong with either."""
    definitions = [(_look_up(name, table), options) for name, options in passes]
    return [(definition, definition.convert(options)) for definition, options in definitions]


def _look_up(name: str, table: Mapping[str, PassDef]) -> PassDef:
    if name not in table:
        near = get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise MoecError(f"there is no pass {name}", todo=f"{hint}`moec list passes` shows them")
    return table[name]


def _until(steps: list[tuple[PassDef, dict]], stop_after: str | None) -> list[tuple[PassDef, dict]]:
    if stop_after is None:
        return steps
    if stop_after in STAGES:
        later = STAGES[STAGES.index(stop_after) + 1 :]
        return steps[: next((i for i, (d, _) in enumerate(steps) if d.leaves in later), len(steps))]
    names = [definition.name for definition, _ in steps]
    if stop_after not in names:
        raise MoecError(
            f"cannot stop after {stop_after}: it is no stage and no pass of this pipeline",
            todo=_stop_hint(stop_after, names),
        )
    last = max(i for i, name in enumerate(names) if name == stop_after)
    return steps[: last + 1]


def _stop_hint(name: str, passes: Sequence[str]) -> str:
    near = get_close_matches(name, (*STAGES, *passes), n=1)
    return f"{f'did you mean {near[0]}? ' if near else ''}stages: {', '.join(STAGES)}"


def check_stop(name: str, table: Mapping[str, PassDef]) -> None:
    """Raise MoecError for a name that is no stage and no pass at all."""
    if name not in STAGES and name not in table:
        what = f"cannot stop after {name}: it is no stage and no pass"
        raise MoecError(what, todo=_stop_hint(name, list(table)))


def _run_pass(
    module: Module, number: int, definition: PassDef, options: dict, settings: Settings
) -> tuple[Module, PassTiming]:
    start = time.perf_counter()
    try:
        _check_reads(module, definition)
        result = definition(module, settings.target, settings.why, **options)
    except MoecError as error:
        raise _failure(error, "in", module, number, definition, options, settings) from error
    except Exception as error:  # a bug in a pass; the traceback stays as the cause
        problem = MoecError("a mistake of moec's own stopped it", todo="--debug shows where", exit_code=1)
        raise _failure(problem, "in", module, number, definition, options, settings) from error
    seconds = time.perf_counter() - start
    changed = result is not module
    try:
        if changed:
            _check_result(module, result, definition, settings)
    except MoecError as error:
        pointed = _point(error, result, number, definition, settings)
        raise _failure(pointed, "found after", module, number, definition, options, settings) from error
    if changed and settings.dump is not None:
        (settings.dump / f"{number:02}.{definition.name}.moir").write_text(print_module(result), "utf-8")
    return result, PassTiming(definition.name, seconds, time.perf_counter() - start, changed)


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
    verify(after)
    leaves = before.stage if definition.leaves == "any" else definition.leaves
    if after.stage != leaves:
        raise MoecError(f"the module is at stage {after.stage}, the pass leaves {leaves}", exit_code=1)
    if after.stage == "kernel" and settings.kernel_op is not None:
        for function in after.functions:
            for op in function.ops:
                if op.name != "call" and not settings.kernel_op(op.name):
                    place = f"{op.results[0]} in @{function.name}"
                    raise MoecError(f"the target has no {op.name}", place, model=", ".join(op.loc), exit_code=1)
    _check_signature(before, after)
    if settings.check:
        from ..check.compare import compare_modules
        from ..check.rounding import compare_rounded

        (compare_rounded if definition.rounds else compare_modules)(before, after, TOLERANCE)


def _check_signature(before: Module, after: Module) -> None:
    old, new = before.main, after.main
    if old.params != new.params:
        raise MoecError(
            f"the inputs of @main changed: {_differing(old.params, new.params)}", where="@main", exit_code=1
        )
    if old.types != new.types:
        raise MoecError(f"the outputs of @main changed: {_differing(old.types, new.types)}", where="@main", exit_code=1)


def _differing(old: Sequence[Any], new: Sequence[Any]) -> str:
    for a, b in zip(old, new, strict=False):
        if a != b:
            return f"{a}: {getattr(a, 'type', '')} became {b}: {getattr(b, 'type', '')}".replace(": ", " ").strip()
    return f"there were {len(old)}, there are {len(new)}"


# --- failures --------------------------------------------------------------------------------------------------


def _point(error: MoecError, result: Module, number: int, definition: PassDef, settings: Settings) -> MoecError:
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


def _failure(
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
    if settings.source_hint:
        what += f" of {settings.source_hint}"
    folder = settings.dump
    if folder is None and exit_code == 2:  # wrong use, said in full by the message: leave no files behind
        return replace(error, what=what)
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="moec-reproducer-"))
    path = folder / f"{number:02}.before.moir"
    path.write_text(print_module(module), "utf-8")
    name = getattr(settings.target, "name", "")
    target = f" --target {name}" if name else ""
    rerun = f"rerun: moec opt {path} -p '{spell_pass(definition.name, options)}'{target} --check"
    todo = f"{error.todo}\n  {rerun}" if error.todo else rerun
    return replace(error, what=what, todo=todo, exit_code=exit_code)
