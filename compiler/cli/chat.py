"""`moec chat`: a conversation in a terminal, or a line a message from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from ..errors import MoecError
from .artifacts import drawing_settings, generation_options, stream_text
from .base import examples_epilog, print_notes, report_error, say, shared_options

CLEAR, EXIT = "/clear", "/exit"


@click.command(
    epilog=examples_epilog(
        "moec chat tiny",
        'moec chat tiny --system "Answer in one line." --max-new-tokens 200',
        "moec chat tiny --greedy < messages.txt",
    )
)
@click.argument("folder", metavar="DIR")
@click.option("--system", metavar="TEXT", help="The system message in front of the conversation.")
@click.option("--max-new-tokens", default=1024, show_default=True, type=click.IntRange(min=1), metavar="N")
@generation_options
@shared_options
def chat(
    folder: str, system: str | None, seed: int | None, threads: int | None, accuracy: str | None, device: str | None,
    stops: tuple[str, ...], **settings: Any,
) -> None:  # fmt: skip
    """Talk with a model that was tuned for conversations, with its own chat template.

    Every line is a message. /clear begins a new conversation, /exit or the end of the input ends it.
    """
    from ..runtime.artifact import Artifact
    from ..runtime.generate import PromptCache
    from .show import end_notes, stop_reason

    artifact = Artifact.open(Path(folder))
    settings = drawing_settings(artifact, seed, settings)
    artifact.chat_template  # noqa: B018 - a model without one is refused before it is loaded
    session = artifact.session(threads=threads, accuracy=accuracy, device=device)
    print_notes(end_notes(artifact.end_tokens))
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages, cache = list(opening), PromptCache()
    for line in _read_messages():
        if line == CLEAR:
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": line})
        try:
            tokens = artifact.chat_tokens(messages)
            if len(tokens) > session.context:
                what = f"the conversation has {len(tokens)} tokens, the model's context {session.context}"
                raise MoecError(what, todo=f"{CLEAR} begins a new one")
            found = artifact.run(
                tokens=tokens, stop=stops, on_text=stream_text, session=session, cache=cache, **settings
            )
        except MoecError as error:
            if not sys.stdin.isatty():
                raise
            report_error(error, debug=False)
            messages.pop()
            continue
        click.echo()
        if found.stopped[0] not in ("end token", "stop text"):
            say(f"({stop_reason(found.stopped[0])})")
        messages.append({"role": "assistant", "content": "".join(found.text or ())})


def _read_messages() -> Iterator[str]:
    """Yield the lines that are typed or piped in, empty ones left out, up to the end or /exit."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):  # not on Windows: lines are then edited as the terminal does it
            import readline  # noqa: F401 - input() edits lines with it
    while True:
        try:
            line = (input("> ") if terminal else next(sys.stdin)).strip()
        except (EOFError, StopIteration):
            return
        except UnicodeDecodeError:
            raise MoecError("standard input is not UTF-8", where="<stdin>") from None
        if line == EXIT:
            return
        if line:
            yield line
