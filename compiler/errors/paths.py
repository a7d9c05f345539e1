"""Paths as they are given: text that can be written down again, in moec.json and in a program."""

from __future__ import annotations

from pathlib import Path

from . import MoecError


def check_path(path: Path | str, what: str) -> Path:
    """Return a path; MoecError for one that no file system has (a NUL), or that is not UTF-8."""
    text = str(path)
    if (reason := why_unwritable(text)) is not None:
        raise MoecError(f"the path of {what} {reason}", where=ascii(text), todo="rename it")
    return Path(path)


def check_source(source: Path | str) -> Path:
    """Return the path of a source; MoecError for one that holds nothing to import."""
    path = check_path(source, "the source")
    if path.suffix in (".moir", ".pt2") and not path.is_dir():
        try:
            path.open("rb").close()
        except OSError as error:
            raise MoecError(f"cannot read the file: {error.strerror}", where=str(source)) from None
        return path
    if path.suffix == ".onnx":
        raise MoecError("ONNX files are not read yet", where=str(source), todo="give the checkpoint folder")
    if not path.is_dir() and not (path.suffix == ".gguf" and path.is_file()):
        what = "is a file of no known kind" if path.exists() else "does not exist"
        raise MoecError(f"the source {what}", str(source), todo="give a checkpoint folder, a .gguf or a .moir file")
    return path


def why_unwritable(text: str) -> str | None:
    """Return why a text cannot be a path that is written down; None if it can."""
    if "\0" in text:
        return "holds a NUL"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of a path that are no UTF-8 are halves of characters in Python
        return "is not UTF-8"
    return None
