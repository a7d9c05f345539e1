"""The `moec` command. Standard output holds results only; everything else goes to standard error.

torch, transformers and onnxruntime are imported inside the commands that need them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from .. import __version__
from .cli_base import (
    CHECK_FAILED, Commands, debug_option, example, json_option, print_notes, progress_bar, trust_option, write_text,
)  # fmt: skip

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(
    cls=Commands,
    context_settings=SETTINGS,
    epilog=example(
        "moec compile examples/tiny-moe -o tiny",
        "moec verify tiny",
        'moec run tiny --prompt "def main():" --greedy',
    )
    + "\n\n\b\nExit codes:\n  0 good, 1 a check failed, 2 wrong use or bad input, 70 an error inside moec",
)
@click.version_option(__version__, "-V", "--version", prog_name="moec")
@debug_option
def main() -> None:
    """An ahead-of-time compiler for Mixture-of-Experts language models."""


@main.command(
    epilog=example(
        "moec compile examples/tiny-moe -o tiny --verify",
        "moec compile config-folder --stop-after moe | less",
        "moec compile program.moir --weights checkpoint-folder -o out",
    )
)
@click.argument("source")
@click.option("--target", default="cpu", show_default=True, help="What to compile for; `moec targets` lists them.")
@click.option("-o", "--out", help="The artifact folder; with --stop-after a .moir file.  [default: SOURCE-TARGET]")
@click.option("--pipeline", help="Passes instead of the target's own, as in 'cleanup,lift-moe'.")
@click.option("--dump", metavar="DIR", help="Write the IR after every pass that changed it.")
@click.option("--check", is_flag=True, help="Compare the numbers before and after every pass.")
@click.option("--verify", is_flag=True, help="Compare the artifact with the source model in transformers.")
@click.option("--stop-after", metavar="STAGE", help="Stop after graph, moe, kernel or a pass, and print the IR.")
@click.option("-D", "options", metavar="KEY=VALUE", multiple=True, help="An option of the target; repeatable.")
@click.option("--why", is_flag=True, help="Say which rules did not apply, where, and the reason.")
@click.option("--weights", metavar="DIR", help="The checkpoint folder of a .moir source.")
@trust_option
@debug_option
def compile(  # noqa: A001 - the command's name
    source: str,
    target: str,
    out: str | None,
    options: tuple[str, ...],
    why: bool,
    verify: bool,
    stop_after: str | None,
    **given: Any,
) -> None:
    """Compile SOURCE, a checkpoint folder, a .moir file or an artifact, and print the artifact's folder.

    A folder with only a config.json will do for --stop-after graph or moe.
    """
    if stop_after and verify:
        raise click.UsageError("--verify needs an artifact; --stop-after makes none")
    if out and out.endswith(".moir") and not stop_after:
        raise click.UsageError("-o names the artifact folder; add --stop-after kernel to write a .moir file")
    keys = _key_values(options)
    from . import driver

    start, notes = time.perf_counter(), []  # type: ignore[var-annotated]
    with progress_bar(f"compiling {source}") as progress:
        result: Any = driver.compile(
            source, target, None if stop_after else out, options=keys, stop_after=stop_after,
            why=notes if why else None, progress=progress, **given,
        )  # fmt: skip
    print_notes(notes)
    if stop_after:
        from .printer import print_module

        write_text(print_module(result), out)
        return
    click.echo(f"compiled in {time.perf_counter() - start:.1f} s", err=True)
    if verify:
        _finish_comparison(result.verify(), as_json=False, err=True)
    click.echo(str(result.folder))


def _key_values(options: tuple[str, ...]) -> dict[str, str]:
    pairs = [option.partition("=") for option in options]
    for (key, equals, _), option in zip(pairs, options, strict=True):
        if not key or not equals:
            raise click.BadParameter(f"{option!r} is not KEY=VALUE", param_hint="-D")
    return {key: value for key, _, value in pairs}


@main.command(
    epilog=example(
        "moec opt program.moir -p 'cleanup,lift-moe' --check",
        "moec compile model --stop-after graph | moec opt - -p lift-moe --why > moe.moir",
    )
)
@click.argument("file")
@click.option("-p", "--passes", default="", help="Passes with options, as in 'a,b{x=1}'; none only checks and prints.")
@click.option("-o", "--out", help="The file to write.  [default: standard output]")
@click.option("--dump", metavar="DIR", help="Write the IR after every pass that changed it.")
@click.option("--check", is_flag=True, help="Compare the numbers before and after every pass.")
@click.option("--why", is_flag=True, help="Say which rules did not apply, where, and the reason.")
@debug_option
def opt(file: str, passes: str, out: str | None, why: bool, **given: Any) -> None:
    """Run passes on the IR in FILE (- is standard input) and print the result."""
    from ..targets import TARGETS  # a target's own ops are known once it is imported
    from . import driver
    from .printer import print_module

    assert TARGETS
    source: Any = file
    if file == "-":
        from .parser import parse_module

        source = parse_module(click.get_text_stream("stdin").read(), "<stdin>")
    notes: list[str] = []
    module = driver.opt(source, passes, why=notes if why else None, **given)
    print_notes(notes)
    write_text(print_module(module), out)


@main.command(
    epilog=example(
        'moec run tiny --prompt "import os" --greedy --max-new-tokens 64',
        "moec run tiny --tokens 12,7,99 --seed 3 --top-p 0.9",
    )
)
@click.argument("folder", metavar="DIR")
@click.option("--prompt", help="The text to continue.")
@click.option("--tokens", help="Token ids to continue, as in 1,2,3; prints token ids.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=0), metavar="N")
@click.option("--greedy", is_flag=True, help="Take the most likely token every time.")
@click.option("--temperature", default=1.0, show_default=True, type=click.FloatRange(min=0))
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@json_option
@debug_option
def run(folder: str, prompt: str | None, tokens: str | None, as_json: bool, **settings: Any) -> None:
    """Generate with the artifact in DIR: text as it comes, then the speed on standard error."""
    if (prompt is None) == (tokens is None):
        raise click.UsageError("give one of --prompt and --tokens")
    ids = None if tokens is None else _token_ids(tokens)
    from .artifact import Artifact
    from .cli_show import generation_json, speed

    stream = None if as_json else _stream_ids() if prompt is None else _write_now
    result = Artifact.open(Path(folder)).run(prompt, tokens=ids, stream=stream, **settings)
    if as_json:
        click.echo(json.dumps(generation_json(result), indent=2))
        return
    click.echo()
    click.echo(speed(result), err=True)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of token ids such as 1,2,3", param_hint="--tokens") from None


def _write_now(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _stream_ids() -> Any:
    written = 0

    def write(token: int) -> None:
        nonlocal written
        _write_now(f",{token}" if written else str(token))
        written += 1

    return write


@main.command(
    epilog=example("moec verify tiny", "moec verify tiny --against checkpoint-folder --text notes.txt --json")
)
@click.argument("folder", metavar="DIR")
@click.option("--against", metavar="SOURCE", help="The checkpoint folder.  [default: the one it was compiled from]")
@click.option("--text", metavar="FILE", help="Measure perplexity on this text.", type=click.Path(dir_okay=False, exists=True))
@json_option
@trust_option
@debug_option
def verify(folder: str, against: str | None, text: str | None, as_json: bool, trust_remote_code: bool) -> None:
    """Compare the artifact in DIR with its source model in transformers; exit code 1 if they differ.

    Compares logits of prompts and of cached decoding, greedy tokens, and perplexity on a text.
    """
    from . import driver

    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if text is not None:
        options["text"] = Path(text).read_text(encoding="utf-8")
    _finish_comparison(driver.verify(folder, against, **options), as_json)


def _finish_comparison(comparison: Any, as_json: bool, err: bool = False) -> None:
    """Print a comparison; exit with 1 if it failed."""
    from .cli_show import comparison_json, comparison_text

    if as_json:
        click.echo(json.dumps(comparison_json(comparison), indent=2))
    else:
        click.echo(comparison_text(comparison), err=err)
    if not comparison.ok:
        click.get_current_context().exit(CHECK_FAILED)


@main.command(
    epilog=example(
        "moec inspect examples/tiny-moe",
        "moec inspect folder-with-config-json --context 32768 --json | jq .parameters",
    )
)
@click.argument("source")
@click.option("--context", type=click.IntRange(min=0), metavar="N", help="Past tokens of the decoded token.  [default: 4096]")
@json_option
@trust_option
@debug_option
def inspect(source: str, context: int | None, as_json: bool, trust_remote_code: bool) -> None:
    """Show parameters, bytes, FLOPs and KV cache per token and layer of SOURCE.

    SOURCE is a checkpoint folder (a config.json is enough), an artifact or a .moir file. Nothing is run or measured:
    every figure is counted from the IR.
    """
    from .report import inspect as report

    found = report(source, context=context, trust_remote_code=trust_remote_code)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from .cli_show import show_report

    show_report(found)


@main.command("list", epilog=example("moec list passes", "moec list ops --json"))
@click.argument("what", type=click.Choice(["passes", "ops", "rules", "families"]))
@json_option
@debug_option
def list_(what: str, as_json: bool) -> None:
    """List the passes, the ops, the rewrite rules or the checked model families."""
    from . import listing

    _show(getattr(listing, what)(), as_json)


@main.command(epilog=example("moec targets", "moec targets cpu --json"))
@click.argument("name", required=False)
@json_option
@debug_option
def targets(name: str | None, as_json: bool) -> None:
    """List the targets, or show one."""
    from . import listing

    _show(listing.targets(name), as_json)


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from .cli_show import show_rows

    show_rows(rows)


if __name__ == "__main__":
    main(prog_name="moec")
