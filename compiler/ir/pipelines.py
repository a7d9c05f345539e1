"""A pipeline: passes by name with their options, and its text, as `--pipeline` takes it and moec.json keeps it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from lark import Token

from .literals import read_attributes
from .syntax import Source, parse_text, refuse_deep_nesting

if TYPE_CHECKING:
    from .types import Attr


@dataclass(frozen=True)
class PassCall:
    """A pass of a pipeline by its name, with the options that are given; its text is `quantize{group=32, layers=""}`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={option_text(value)}" for key, value in sorted(self.options.items()))
        return f"{self.name}{{{inside}}}" if inside else self.name


Pipeline: TypeAlias = tuple[PassCall, ...]

LOWER = "lower"  # the pass that every target has: its own lowering


def parse_pipeline(text: str) -> Pipeline:
    """Return the passes of a text such as `a,b-c{x=1,y=int4}` with their options."""
    source = Source(text, "<pipeline>")

    def names(token: Token, alone: bool) -> Attr:
        if not alone:
            raise source.error("an option is a number, a name, a list, or a text in quotes", token)
        return str(token)

    with refuse_deep_nesting(source):
        steps = parse_text("pipeline", source)
        return tuple(PassCall(str(name), read_attributes(options, source, names)) for name, options in steps)


def print_pipeline(pipeline: Pipeline) -> str:
    """Return the text of a pipeline."""
    return ",".join(map(str, pipeline))


def option_text(value: Any) -> str:
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


def put_before(pipeline: Pipeline, names: Collection[str], *added: PassCall) -> Pipeline:
    """Return the pipeline with passes added before the first one of these names, at its end if it has none of them."""
    place = next((i for i, call in enumerate(pipeline) if call.name in names), len(pipeline))
    return (*pipeline[:place], *added, *pipeline[place:])


def put_behind(pipeline: Pipeline, added: PassCall) -> Pipeline:
    """Return the pipeline with a pass at its end, if it has none of that name."""
    return pipeline if added.name in [call.name for call in pipeline] else (*pipeline, added)


def with_caches(pipeline: Pipeline, names: Collection[str], call: PassCall | None) -> Pipeline:
    """Return the pipeline with one pass that stores caches, at its end, instead of those of these names."""
    return (*(c for c in pipeline if c.name not in names), *((call,) if call else ()))


def with_lowering(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with the lowering, at its end if it has none."""
    return put_behind(pipeline, PassCall(LOWER))


def with_options(pipeline: Pipeline, name: str, **options: Any) -> Pipeline:
    """Return the pipeline with options set for the passes of a name."""
    return tuple(PassCall(c.name, {**c.options, **options}) if c.name == name else c for c in pipeline)
