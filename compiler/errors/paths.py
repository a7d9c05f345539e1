"""Paths as they are given: text that can be written down again, in moec.json and in a program."""

from __future__ import annotations

from pathlib import Path

from . import MoecError
from .hub import find_cached, hub_name


def check_path(path: Path | str, what: str) -> Path:
    """Return a path; MoecError for one that no file system has (a NUL), or that is not UTF-8."""
    text = str(path)
    if (reason := why_unwritable(text)) is not None:
        raise MoecError(f"the path of {what} {reason}", where=ascii(text), todo="rename it")
    return Path(path)


def check_source(source: Path | str) -> Path:
    """Return the path of a source, that of a model on the Hub in the local cache; MoecError for one that holds nothing to import."""
    path = check_path(source, "the source")
    if path.suffix in (".moir", ".pt2", ".onnx") and not path.is_dir():
        try:
            path.open("rb").close()
        except OSError as error:
            raise MoecError(f"cannot read the file: {error.strerror}", where=str(source)) from None
        return path
    if not path.is_dir() and not (path.suffix == ".gguf" and path.is_file()):
        if not path.exists() and (name := hub_name(source)):
            if (cached := find_cached(source)) is not None:
                return cached
            todo = f"give a checkpoint folder, or fetch the model: moec compile {source} --download, or hf download {name[0]}"
            raise MoecError("the source is neither here nor in the Hugging Face cache", str(source), todo=todo)
        what = "is a file of no known kind" if path.exists() else "does not exist"
        raise MoecError(
            f"the source {what}", str(source), todo="give a checkpoint folder, or a .gguf, .onnx, .pt2 or .moir file"
        )
    return path


def find_source(name: str, near: Path) -> Path | None:
    """Return a source by the name that an artifact or a program in the folder `near` has of it; None if it is not found.

    It is looked for from here, from that folder and from those above it, and in the cache of the Hub.
    """
    places = (Path(), *(near.absolute() / "any").parents)
    return next((found for place in places if (found := place / name).exists()), None) or find_cached(name)


def why_unwritable(text: str) -> str | None:
    """Return why a text cannot be a path that is written down; None if it can."""
    if "\0" in text:
        return "holds a NUL"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of a path that are no UTF-8 are halves of characters in Python
        return "is not UTF-8"
    return None
