"""The commands that run an artifact: generate with it, compare it with its source."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from .base import (
    CHECK_FAILED,
    debug_option,
    device_option,
    examples_epilog,
    is_debugging,
    json_option,
    print_notes,
    progress_bar,
    read_text,
)


@click.command(
    epilog=examples_epilog(
        'moec run tiny --prompt "import os" --greedy --max-new-tokens 64',
        "moec run tiny --tokens 12,7,99 --seed 3 --top-p 0.9",
        "moec run layer --inputs x.npz --outputs y.npz",
    )
)
@click.argument("folder", metavar="DIR")
@click.option("--prompt", help="The text to continue.")
@click.option("--tokens", help="Token ids to continue, as in 1,2,3; prints token ids.")
@click.option("--inputs", metavar="FILE", help="Arrays (.npz) to call a program with that is no language model.")
@click.option("--outputs", metavar="FILE", help="Where to write its results (.npz).")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=0), metavar="N")
@click.option("--greedy", is_flag=True, help="Take the most likely token every time.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy.  [default: the model's own setting]")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from the likeliest tokens of this mass."
)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from this many of the likeliest tokens.")
@click.option("--seed", type=click.IntRange(min=0), help="The draw's seed.  [default: 0]")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Compute threads.  [default: one a core]")
@click.option(
    "--accuracy",
    type=click.Choice(["fast", "exact"]),
    help="Beside quantized weights: int8 activations (fast), or f32 (exact).  [default: as compiled]",
)
@device_option
@click.option("--check-files", is_flag=True, help="Compare the sha256 of every file with moec.json first.")
@json_option
@debug_option
def run(
    folder: str, prompt: str | None, tokens: str | None, inputs: str | None, outputs: str | None, as_json: bool,
    seed: int | None, threads: int | None, accuracy: str | None, check_files: bool, device: str | None, **settings: Any,
) -> None:  # fmt: skip
    """Generate with an artifact, or call it.

    Text is printed as it comes, then the speed on standard error. Without options a model samples as its generation_config.json has it, or takes the most likely token. A program that is no language model is called with the arrays of --inputs.
    """
    if [prompt, tokens, inputs].count(None) != 2:
        raise click.UsageError("give one of --prompt, --tokens and --inputs")
    if outputs is not None and inputs is None:
        raise click.UsageError("--outputs is for what --inputs gives")
    if inputs is not None:
        options = {"threads": threads, "accuracy": accuracy, "device": device}
        return _call_program(Path(folder), inputs, outputs, as_json, check_files, options)
    ids = None if tokens is None else _token_ids(tokens)
    from ..runtime.artifact import Artifact

    artifact = Artifact.open(Path(folder), check=check_files)
    from .show import end_notes, generation_json, ran_on, speed_line

    draws = any(value is not None for value in (seed, settings["top_p"], settings["top_k"]))
    if draws and settings["temperature"] is None and not artifact.sampling()["temperature"]:
        settings["temperature"] = 1.0  # who names a seed or a top-p wants to draw
    streams = {} if as_json else {"on_token": _stream_ids()} if prompt is None else {"on_text": _stream_text}
    session = artifact.session(threads=threads, accuracy=accuracy, device=device)
    result = artifact.run(prompt, tokens=ids, seed=seed or 0, session=session, **streams, **settings)
    if as_json:
        click.echo(json.dumps(generation_json(result), indent=2))
        return
    click.echo()
    click.echo(speed_line(result) + ran_on(session), err=True)
    if is_debugging(click.get_current_context()) and (computes := getattr(session, "kernels", "")):
        click.echo(f"quantized layers: {computes}", err=True)
    print_notes(end_notes(artifact.end_tokens))


def _call_program(
    folder: Path, inputs: str, outputs: str | None, as_json: bool, check: bool, options: Mapping[str, Any]
) -> None:
    """Call a program with the arrays of a file, and print or write what it gives."""
    from ..runtime.artifact import Artifact
    from ..runtime.calls import bind_arrays, read_arrays, write_arrays

    artifact = Artifact.open(folder, check=check)
    arrays = bind_arrays(artifact.manifest, (), read_arrays(Path(inputs)))
    found = artifact.session(**options).call(arrays)
    if outputs is not None:
        write_arrays(Path(outputs), found)
    if as_json:
        click.echo(json.dumps({name: array.tolist() for name, array in found.items()}))
    elif outputs is None:
        for name, array in found.items():
            click.echo(f"{name} {array.dtype}{list(array.shape)}\n{array}")


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of token ids such as 1,2,3", param_hint="--tokens") from None


def _stream_text(_: int, text: str) -> None:
    click.echo(text, nl=False)


def _stream_ids() -> Callable[[int, int], None]:
    """Return a function that prints token ids as `--tokens` takes them."""
    separator = ""

    def write(_: int, token: int) -> None:
        nonlocal separator
        click.echo(f"{separator}{token}", nl=False)
        separator = ","

    return write


@click.command(
    epilog=examples_epilog("moec verify tiny", "moec verify tiny --against checkpoint-folder --text notes.txt --json")
)
@click.argument("folder", metavar="DIR")
@click.option("--against", metavar="SOURCE", help="The checkpoint folder.  [default: the one it was compiled from]")
@click.option("--text", metavar="FILE", help="A text to measure on.  [default: a sample of prose and Python]")
@click.option(
    "--text-tokens",
    type=click.IntRange(min=2),
    metavar="N",
    help="How many tokens of the text to measure on.  [default: 2000; 200 in a simulator]",
)
@click.option("--accuracy", type=click.Choice(["fast", "exact"]), help="As in `moec run`.  [default: as compiled]")
@device_option
@json_option
@debug_option
def verify(
    folder: str, against: str | None, text: str | None, text_tokens: int | None, accuracy: str | None,
    device: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare an artifact with its source model.

    First the sha256 of every file is compared with moec.json. The source runs in transformers; the exit code is 1 if the two differ. Compares logits of prompts and of cached decoding, greedy tokens, and the predictions on a text: KL divergence, top-1 agreement, perplexity. The figures are kept in moec.json.
    """
    written = None if text is None else read_text(text)
    from .. import driver

    with progress_bar(f"verifying {folder}", unit="parts") as progress:
        comparison, notes = driver.measure(
            folder,
            against,
            text=written,
            tokens=text_tokens,
            accuracy=accuracy,
            device=device,
            progress=progress,
        )
    print_notes(notes)
    if as_json:
        click.echo(json.dumps(comparison.to_dict(), indent=2))
    else:
        click.echo("\n".join(comparison.lines()))
    if not comparison.passed:
        click.get_current_context().exit(CHECK_FAILED)
