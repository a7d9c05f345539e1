"""Paths as they are given: text that can be written down again, in moec.json and in a program."""

from __future__ import annotations

from pathlib import Path

from . import MoecError


def check_path(path: Path | str, what: str) -> Path:
    """Return a path; MoecError for one that no file system has (a NUL), or that is not UTF-8."""
    text = str(path)
    if (reason := unwritable(text)) is not None:
        raise MoecError(f"the path of {what} {reason}", where=ascii(text), todo="rename it")
    return Path(path)


def unwritable(text: str) -> str | None:
    """Return why a text cannot be a path that is written down; None if it can."""
    if "\0" in text:
        return "holds a NUL"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of a path that are no UTF-8 are halves of characters in Python
        return "is not UTF-8"
    return None
