"""What every `moec` command shares: errors and exit codes, `--debug`, `--verbose` and `--quiet`, texts read and written.

Exit codes: 0 good, 1 a check failed, 2 wrong use or bad input, 70 an error inside moec, 130 interrupted,
141 the reader of the output went away.
"""

from __future__ import annotations

import logging
import os
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ..errors import MoecError, write_error
from ..errors.json_files import problem_of
from ..errors.paths import why_unwritable

if TYPE_CHECKING:
    from ..ir.notes import Note
    from ..rewrite.pipeline import PassTiming

Command = TypeVar("Command", bound=Callable[..., Any])
CHECK_FAILED, WRONG_USE, INTERNAL, INTERRUPTED, CLOSED_PIPE = 1, 2, 70, 130, 141


class Commands(click.Group):
    """A group that turns every exception into one message and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse arguments that can be no text and no path, in one place for all commands."""
        for argument in args:
            if (reason := why_unwritable(argument)) is not None:
                raise click.UsageError(f"an argument {reason}: {argument!a}")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command; errors of click itself (wrong use, --help) pass through."""
        try:
            with _quiet_libraries():
                result = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe shows here, not when Python ends
            return result
        except (click.ClickException, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            _silence_stdout()
            ctx.exit(CLOSED_PIPE)
        except Exception as error:  # the outermost place: everything is reported here, with a traceback on demand
            ctx.exit(report_error(error, debug=is_debugging(ctx)))


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silence log messages and warnings of torch, transformers and others; errors are raised."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def report_error(error: Exception, debug: bool) -> int:
    """Write one message on standard error, the traceback too with `debug`, and return the exit code."""
    if debug:
        click.echo("".join(traceback.format_exception(error)).rstrip(), err=True)
    match error:
        case MoecError():
            text, code = str(error), error.exit_code
        case click.Abort() | EOFError():
            text, code = "interrupted", INTERRUPTED
        case OSError() if error.filename is not None:
            text, code = f"{error.strerror or error}\n  at {os.fsdecode(error.filename)}", WRONG_USE
        case _:
            again = "" if debug else "\n  run the command again with --debug to see where"
            text, code = f"moec failed: {type(error).__name__}: {error}{again}", INTERNAL
    click.echo(f"error: {text}", err=True)
    return code


def _silence_stdout() -> None:
    """Point standard output at nothing, so that Python's flush at its end does not complain again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # standard output is no file (a test's buffer): there is nothing to redirect
        return


def is_debugging(ctx: click.Context) -> bool:
    """Return whether --debug was given, before or after the command's name."""
    return bool(ctx.meta.get("moec.debug"))


def given_options() -> list[str]:
    """Return the options of the command that its user wrote, by their first long name, in the order of its help."""
    context = click.get_current_context()
    written = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return [
        max(param.opts, key=len)
        for param in context.command.params
        if param.name and context.get_parameter_source(param.name) in written and param.expose_value
    ]


def is_quiet(ctx: click.Context) -> bool:
    """Return whether --quiet was given."""
    return bool(ctx.meta.get("moec.quiet"))


def is_verbose(ctx: click.Context) -> bool:
    """Return whether --verbose was given."""
    return bool(ctx.meta.get("moec.verbose"))


def say(text: object) -> None:
    """Write a line beside the result on standard error, unless --quiet was given."""
    context = click.get_current_context(silent=True)
    if context is None or not is_quiet(context):
        click.echo(text, err=True)


def _note_verbosity(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[f"moec.{param.name}"] = True
    if is_quiet(ctx) and is_verbose(ctx):
        raise click.UsageError("--quiet and --verbose ask for opposite things: leave one out")


def _note_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["moec.debug"] = True
        logging.disable(logging.NOTSET)  # until the command ends: see _quiet_libraries
        warnings.simplefilter("default")


_DEBUG = click.option(
    "--debug", is_flag=True, is_eager=True, expose_value=False, callback=_note_debug, help="Show tracebacks of errors."
)
_VERBOSE = click.option(
    "-v", "--verbose", is_flag=True, is_eager=True, expose_value=False, callback=_note_verbosity,
    help="Say every phase, with its seconds, and every pass.",
)  # fmt: skip
_QUIET = click.option(
    "-q", "--quiet", is_flag=True, is_eager=True, expose_value=False, callback=_note_verbosity,
    help="Say nothing but results and errors.",
)  # fmt: skip


def _load_plugin(_: click.Context, param: click.Parameter, files: tuple[str, ...]) -> None:
    """Run Python files of the user, which declare ops and register passes, rules and targets."""
    for file in files:
        try:
            runpy.run_path(file, run_name="moec_plugin")
        except (Exception, SystemExit) as error:
            reason = str(error) if isinstance(error, MoecError) else f"{type(error).__name__}: {error}"
            raise click.BadParameter(f"{file} cannot be run: {reason}", param=param) from error


_PLUGIN = click.option(
    "--plugin", metavar="FILE.py", multiple=True, is_eager=True, expose_value=False, callback=_load_plugin,
    help="Run a Python file that brings ops, passes, rules or targets (moec.register); repeatable.",
)  # fmt: skip


def shared_options(command: Command) -> Command:
    """Add the options of every command: --verbose, --quiet, --debug and --plugin."""
    return _VERBOSE(_QUIET(_DEBUG(_PLUGIN(command))))


json_option = click.option("--json", "as_json", is_flag=True, help="Print the data as JSON.")
device_option = click.option(
    "--device",
    metavar="NAME",
    help="What an artifact for an accelerator runs on: simulator, interpreter (Triton's), cuda or hip (compiled objects, or Triton), triton.  [default: a GPU that it is for, else the simulator]",
)


def _cap_threads(_: click.Context, __: click.Parameter, threads: int | None) -> int | None:
    """Return how many threads to compute with; say so where the machine has fewer."""
    from ..weights.memory import capped_threads

    found = capped_threads(threads)
    if found != threads:
        say(f"note: --threads {threads}: this machine runs {found} at once, which are taken")
    return found


threads_option = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", callback=_cap_threads,
    help="Compute threads, at most as many as run at once.  [default: one a core]",
)  # fmt: skip
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint folder brings along."
)


def examples_epilog(*lines: str) -> str:
    """Return an epilog for --help with examples that click does not wrap."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def byte_size(text: str, param: click.Parameter | None = None) -> int:
    """Return the bytes that a text such as 500MB, 1.5GB or 4096 says (decimal units)."""
    from ..weights.memory import parse_bytes

    try:
        return parse_bytes(text)
    except MoecError as error:
        raise click.BadParameter(f"{error.what}: {error.todo}", param=param) from error


def key_values(options: tuple[str, ...]) -> dict[str, str]:
    """Return what -D gives; several pairs may be in one option, with commas between: tp=8,ep=4."""
    single = [part for option in options for part in re.split(r",(?=[\w.]+=)", option)]
    pairs = [option.partition("=") for option in single]
    for (key, equals, _), option in zip(pairs, single, strict=True):
        if not key or not equals:
            raise click.BadParameter(f"{option!r} is not KEY=VALUE", param_hint="-D")
    return {key: value for key, _, value in pairs}


def read_text(file: str) -> str:
    """Return a UTF-8 file as text, standard input for `-`; MoecError if it cannot be read."""
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else problem_of(error)
        raise MoecError(f"the file cannot be read: {reason}", where="<stdin>" if file == "-" else file) from error


def write_text(text: str, out: str | None) -> None:
    """Write a result to a file, or to standard output without one (or with `-`); MoecError if the file cannot be."""
    if out in (None, "-"):
        click.echo(text, nl=not text.endswith("\n"))
        return
    path = Path(str(out))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise write_error(error, path) from error


def print_notes(notes: Iterable[Note]) -> None:
    """Write the notes of --why on standard error."""
    for text in dict.fromkeys(map(str, notes)):  # two functions may have the same note
        say(text)


def print_timings(timings: Iterable[PassTiming]) -> None:
    """Write what each pass took on standard error, checks included."""
    for t in timings:
        say(f"{t.seconds:8.3f} s  {t.name}{'' if t.changed else ' (changed nothing)'}")
