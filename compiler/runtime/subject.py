"""The protocol of an artifact that can be compared with its source; artifacts offer the comparison, so it cannot import them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

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
