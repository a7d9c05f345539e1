"""The user's cache: what takes long to make and may be wanted again, below $XDG_CACHE_HOME or ~/.cache."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def cache_folder() -> Path:
    """Return moec's folder in the user's cache, which may not be there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))  # of the XDG rules: a path that is not absolute does not count
    return (cache if cache.is_absolute() else _home() / ".cache") / "moec"


def _home() -> Path:
    """Return the user's home; where there is none a place that nothing can be kept in: another user could write elsewhere."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull)


def keep_file(path: Path, content: bytes) -> None:
    """Write a file of the cache, whole or not at all; a cache that cannot be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        beside.write_bytes(content)
        beside.replace(path)
    except OSError:
        return
