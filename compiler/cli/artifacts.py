"""The commands that run an artifact: generate with it, compare it with its source."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .base import (
    CHECK_FAILED,
    Command,
    device_option,
    examples_epilog,
    given_options,
    is_debugging,
    json_option,
    print_notes,
    read_text,
    say,
    shared_options,
    threads_option,
)
from .progress import show_progress

if TYPE_CHECKING:
    from ..runtime.artifact import Artifact

_GENERATION_OPTIONS = (
    click.option("--stop", "stops", metavar="TEXT", multiple=True, help="Stop in front of this text; repeatable."),
    click.option("--greedy", is_flag=True, help="Take the most likely token every time."),
    click.option(
        "--temperature", type=click.FloatRange(min=0), help="0 is greedy.  [default: the model's own setting]"
    ),
    click.option(
        "--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from the likeliest tokens of this mass."
    ),
    click.option("--top-k", type=click.IntRange(min=1), help="Draw from this many of the likeliest tokens."),
    click.option("--seed", type=click.IntRange(min=0), help="The draw's seed.  [default: 0]"),
    threads_option,
    click.option(
        "--accuracy",
        type=click.Choice(["fast", "exact"]),
        help="Beside quantized weights: int8 activations (fast), or f32 (exact).  [default: as compiled]",
    ),
    device_option,
)


_OF_LANGUAGE_MODELS = (
    "--max-new-tokens", "--stop", "--greedy", "--temperature", "--top-p", "--top-k", "--seed", "--record-routing",
)  # fmt: skip


def generation_options(command: Command) -> Command:
    """Add the options of every command that generates: how tokens are drawn, where it stops, what computes."""
    for option in reversed(_GENERATION_OPTIONS):
        command = option(command)
    return command


def drawing_settings(artifact: Artifact, seed: int | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of artifact.run; who names a seed, a top-p or a top-k wants to draw."""
    draws = any(value is not None for value in (seed, settings["top_p"], settings["top_k"]))
    if settings["greedy"] and (draws or settings["temperature"]):
        raise click.UsageError("--greedy draws nothing: leave out --seed, --temperature, --top-p and --top-k")
    found = {**settings, "seed": seed or 0}
    if draws and settings["temperature"] is None and not artifact.sampling()["temperature"]:
        found["temperature"] = 1.0
    return found


@click.command(
    epilog=examples_epilog(
        'moec run tiny --prompt "import os" --greedy --max-new-tokens 64',
        'moec run tiny --chat --system "Answer in one line." --prompt "What is an expert?"',
        "moec run tiny --prompt-file - --stop '```' < prompt.txt",
        "moec run tiny --tokens 12,7,99 --seed 3 --top-p 0.9",
        "moec run layer --inputs x.npz --outputs y.npz",
    )
)
@click.argument("folder", metavar="DIR")
@click.option("--prompt", help="The text to continue.")
@click.option(
    "--prompt-file", metavar="FILE", help="A file with the text, - for standard input; its last line break is left out."
)
@click.option("--chat", is_flag=True, help="The prompt is a message: answer it, with the model's own chat template.")
@click.option("--system", metavar="TEXT", help="With --chat: the system message in front of it.")
@click.option("--tokens", help="Token ids to continue, as in 1,2,3; prints token ids.")
@click.option("--inputs", metavar="FILE", help="Arrays (.npz) to call a program with that is no language model.")
@click.option("--outputs", metavar="FILE", help="Where to write its results (.npz).")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=0), metavar="N")
@generation_options
@click.option(
    "--record-routing", metavar="FILE", help="Write how often each expert was chosen, for `moec plan --routing`."
)
@click.option("--check-files", is_flag=True, help="Compare the sha256 of every file with moec.json first.")
@json_option
@shared_options
def run(
    folder: str, prompt: str | None, prompt_file: str | None, chat: bool, system: str | None, tokens: str | None,
    inputs: str | None, outputs: str | None, as_json: bool, seed: int | None, threads: int | None,
    accuracy: str | None, check_files: bool, device: str | None, stops: tuple[str, ...], record_routing: str | None, **settings: Any,
) -> None:  # fmt: skip
    """Generate with an artifact, or call it.

    Text is printed as it comes, then on standard error the speed and why it stopped. Without options a model samples as its generation_config.json has it, or takes the most likely token. A program that is no language model is called with the arrays of --inputs.
    """
    if [prompt, prompt_file, tokens, inputs].count(None) != 3:
        raise click.UsageError("give one of --prompt, --prompt-file, --tokens and --inputs")
    if outputs is not None and inputs is None:
        raise click.UsageError("--outputs is for what --inputs gives")
    if chat and (tokens is not None or inputs is not None):
        raise click.UsageError("--chat answers a text: give --prompt or --prompt-file")
    if system is not None and not chat:
        raise click.UsageError("--system belongs to --chat")
    if inputs is not None:
        drawn = [name for name in given_options() if name in _OF_LANGUAGE_MODELS]
        if drawn:
            raise click.UsageError(f"{drawn[0]} is for language models: --inputs calls a program once")
    if inputs is not None:
        options = {"threads": threads, "accuracy": accuracy, "device": device}
        return _call_program(Path(folder), inputs, outputs, as_json, check_files, options)
    ids = None if tokens is None else _token_ids(tokens)
    if prompt_file is not None:
        prompt = read_text(prompt_file).removesuffix("\n")
    from ..runtime.artifact import Artifact

    artifact = Artifact.open(folder, check=check_files)
    from .show import end_notes, generation_json, speed_line

    if chat:
        first = [] if system is None else [{"role": "system", "content": system}]
        ids, prompt = artifact.chat_tokens([*first, {"role": "user", "content": prompt}]), None
    streams = {} if as_json else {"on_token": _stream_ids()} if tokens is not None else {"on_text": stream_text}
    settings = drawing_settings(artifact, seed, settings)
    session = artifact.session(threads=threads, accuracy=accuracy, device=device)
    result = artifact.run(prompt, tokens=ids, stop=stops, session=session, **streams, **settings)
    if record_routing is not None:
        from .routing import record_routing as record

        record(artifact, artifact.with_prompts(result, prompt, ids), record_routing)
    if as_json:
        click.echo(json.dumps(generation_json(result), indent=2))
        return
    click.echo()
    say(speed_line(result, session))
    if is_debugging(click.get_current_context()) and (computes := getattr(session, "kernels", "")):
        say(f"quantized layers: {computes}")
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


def stream_text(_: int, text: str) -> None:
    """Print text as it comes."""
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
@click.option("--layers", is_flag=True, help="Compare what the program's ops compute with every module of the source.")
@json_option
@shared_options
def verify(
    folder: str, against: str | None, text: str | None, text_tokens: int | None, accuracy: str | None,
    device: str | None, layers: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compare an artifact with its source model.

    First the sha256 of every file is compared with moec.json. The source runs in transformers; the exit code is 1 if the two differ. Compares logits of prompts and of cached decoding, greedy tokens, and the predictions on a text: KL divergence, top-1 agreement, perplexity. The figures are kept in moec.json.

    --layers interprets the program of the artifact, whatever the runtime, and names the first op that is too far from the module that it comes from.
    """
    if layers:
        if any(value is not None for value in (text, text_tokens, accuracy, device)):
            raise click.UsageError("--layers interprets the program: leave out --text, --accuracy and --device")
        from .bisect import verify_layers

        return verify_layers(Path(folder), against, as_json)
    written = None if text is None else read_text(text)
    from ..runtime.measure import measure

    with show_progress():
        comparison, notes = measure(
            folder,
            against,
            text=written,
            tokens=text_tokens,
            accuracy=accuracy,
            device=device,
        )
    print_notes(notes)
    if as_json:
        click.echo(json.dumps(comparison.to_dict(), indent=2))
    else:
        click.echo("\n".join(comparison.lines()))
    if not comparison.passed:
        click.get_current_context().exit(CHECK_FAILED)
