"""Checkpoints and artifacts that lie elsewhere, by fsspec URL (`s3://bucket/model`, `gs://...`, `memory://...`).

A source is copied to a temporary folder, which lives as long as the process (TMPDIR says where); an artifact is made in one and
put in place with its manifest last, so that no reader takes a part of it for the whole.
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import MoecError
from .atomic import MARK

_URL = re.compile(r"[a-z][a-z0-9+.-]+:(:[a-z]|//)")


def is_url(place: Any) -> TypeGuard[str]:
    """Return whether a place is a URL and no path."""
    return isinstance(place, str) and _URL.match(place) is not None


def near_folder(url: str) -> Path:
    """Return a copy of a folder or a file at a URL; MoecError where there is none, or it cannot be read."""
    near = near_place(url)
    with _reworded(url, "read"):
        files, path = _open_url(url)
        if not files.exists(path):
            raise MoecError("the source does not exist", where=url, todo="give the URL of a folder or of a .gguf file")
        if files.isfile(path):
            files.get_file(path, str(near))
            return near
        near.mkdir()
        for name in files.find(path):
            inside = near / name[len(path.rstrip("/")) :].lstrip("/")
            inside.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(name, str(inside))
    return near


def near_place(url: str) -> Path:
    """Return a path in a new temporary folder, named as the URL ends."""
    folder = Path(tempfile.mkdtemp(prefix="moec-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / (url.rstrip("/").rpartition("/")[2] or "model")


def check_remote(url: str) -> None:
    """Raise MoecError for a URL at which something lies that moec did not write."""
    with _reworded(url, "written"):
        files, path = _open_url(url)
        if files.exists(path) and files.find(path) and not files.exists(f"{path}/{MARK}"):
            raise MoecError(
                f"there is something that moec did not write (it has no {MARK})", url, todo="choose another URL"
            )


def publish_folder(folder: Path, url: str) -> None:
    """Put an artifact at a URL, in place of one that is there; its manifest comes last."""
    with _reworded(url, "written"):
        files, path = _open_url(url)
        before = set(files.find(path)) if files.exists(path) else set()
        if files.exists(f"{path}/{MARK}"):
            files.rm_file(f"{path}/{MARK}")
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        for name in [*(n for n in names if n != MARK), MARK]:
            files.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
            files.put_file(str(folder / name), f"{path}/{name}")
        for old in before:
            if old[len(path) :].lstrip("/") not in names:
                files.rm_file(old)


def _open_url(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    return files, path.rstrip("/")


@contextmanager
def _reworded(url: str, what: str) -> Iterator[None]:
    """Raise MoecError for what a file system raises: those of clouds have exceptions of their own."""
    try:
        yield
    except MoecError:
        raise
    except ImportError as error:
        raise MoecError(
            f"nothing here reads such URLs: {error}", where=url, todo="install the package that it names"
        ) from error
    except Exception as error:
        raise MoecError(f"the URL cannot be {what}: {error or type(error).__name__}", where=url) from error
