"""The protocol of an artifact that can be compared with its source, and where that is; artifacts offer the comparison, so it cannot import them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors.paths import find_source
from .tokenizer import Tokenizer


class Compiled(Protocol):
    """An artifact as `compare.verify` sees it."""

    @property
    def folder(self) -> Path:
        """The artifact's folder."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The content of moec.json."""
        ...

    @property
    def lossy(self) -> bool:
        """Whether a pass changed its numbers."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Its text to tokens."""
        ...

    def session(self, **options: Any) -> Any:
        """Return a runner of the target."""
        ...


def recorded_source(artifact: Compiled) -> str:
    """Return the source that an artifact was compiled from, where it is found now; its name in moec.json where it is not."""
    name = str(artifact.manifest["source"].get("name", ""))
    return str(find_source(name, artifact.folder) or name) if name else ""
