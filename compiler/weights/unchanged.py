"""Detect files that changed since they were opened: a download or a training run may write to them meanwhile.

What is compared is what the system says of a file (which one it is, how long, when it was last written) and the headers;
a compile of half old and half new weights would look like any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import MoecError

Stamp = tuple[int, int, int, int]
_TODO = "compile it again when nothing writes to the checkpoint any more"


@dataclass(frozen=True)
class Opened:
    """Files as they were when they were opened, and how the sha256 of their headers is made again."""

    stamps: Mapping[Path, Stamp]
    fingerprint: str
    again: Callable[[], str]

    def check(self) -> None:
        """Raise MoecError for a file that was replaced, removed or written to since."""
        for file, stamp in self.stamps.items():
            try:
                same = stamp_of(file) == stamp
            except OSError as error:
                what = f"{file.name} went away while it was compiled: {error.strerror}"
                raise MoecError(what, str(file), todo=_TODO) from error
            if not same:
                raise MoecError(f"{file.name} was changed while it was compiled", str(file), todo=_TODO)
        try:
            found = self.again()
        except MoecError as error:
            raise MoecError(
                f"the checkpoint was changed while it was compiled: {error.what}", error.where, todo=_TODO
            ) from error
        if found != self.fingerprint:
            where = str(next(iter(self.stamps)).parent)
            raise MoecError("config.json, the index or a header was changed while it was compiled", where, todo=_TODO)


def stamp_of(file: Path | int) -> Stamp:
    """Return what tells a file, by its path or an open descriptor, from itself before it was written to."""
    found = file.stat() if isinstance(file, Path) else os.fstat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
