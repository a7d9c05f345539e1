"""`moec run --record-routing FILE`: how often the tokens of a generation chose each expert, for `moec plan --routing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import MoecError
from .base import write_text

if TYPE_CHECKING:
    from ..runtime.artifact import Artifact


def record_routing(artifact: Artifact, rows: Sequence[Sequence[int]], file: str) -> None:
    """Write how often each expert is chosen for rows of tokens; MoecError where the source of the artifact is not there."""
    from ...targets.serving.routing import routing_text
    from ..driver import fused_module
    from ..frontends.load import load
    from ..runtime.routing import count_routing
    from ..runtime.subject import recorded_source

    source = recorded_source(artifact)
    if not isinstance(source, str) or not source or source.startswith("python:"):
        raise MoecError(
            "the artifact does not name a source folder, whose program tells how experts are chosen",
            str(artifact.folder),
        )
    loaded = load(source)
    counts = count_routing(fused_module(loaded.module), loaded.need_weights(), rows)
    write_text(routing_text(source, sum(map(len, rows)), counts), file)
