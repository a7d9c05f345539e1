"""The text of a pipeline, as `--pipeline` takes it and moec.json keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark import Token

from .syntax import Source, attributes, read, shallow

if TYPE_CHECKING:
    from .types import Attr


def parse_pipeline(text: str) -> list[tuple[str, dict[str, Attr]]]:
    """Return the passes of a text such as `a,b-c{x=1,y=int4}` with their options."""
    source = Source(text, "<pipeline>")

    def names(token: Token, alone: bool) -> str:
        if not alone:
            raise source.error("an option is a number, a name, a list, or a text in quotes", token)
        return str(token)

    with shallow(source):
        return [(str(name), attributes(options, source, names)) for name, options in read("pipeline", source)]
