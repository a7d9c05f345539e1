"""Checks an output folder and a request before the source is imported, which takes seconds to minutes.

Whether it can be put where it is wanted, whether the disk has room for it, and whether the files that travel with it can be
read.
"""

from __future__ import annotations

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from ..errors import MoecError
from ..errors.hub import hub_name
from ..errors.paths import check_path
from .atomic import check_replaceable
from .generation_files import find_end_tokens, find_sampling

WEIGHTS = ("*.safetensors", "*.gguf")
MOST_WORKERS = 1024
# of the checkpoint's bytes that an artifact takes at least: towers that are left out and few bits both make it smaller
LEAST_PLAIN, LEAST_QUANTIZED = 0.5, 1 / 16


def check_output(final: Path) -> None:
    """Raise MoecError unless a folder can be made at `final`, or the artifact there be replaced."""
    final = Path(os.path.realpath(check_path(final, "the output")))
    check_replaceable(final)
    parent = _nearest_existing(final.parent)
    if not parent.is_dir():
        raise MoecError(f"{parent.name} is a file, not a folder", str(parent), todo="choose another output folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MoecError(f"nothing can be written in {parent}", str(final), todo="choose another output folder")


def check_room(final: Path, wanted: int) -> None:
    """Raise MoecError unless the disk has room for an artifact of so many bytes."""
    free = shutil.disk_usage(_nearest_existing(Path(os.path.realpath(final)).parent)).free
    if wanted > free:
        what = f"the artifact takes {wanted / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB left"
        raise MoecError(what, str(final), todo="free some space, choose another disk, or store weights in fewer bits")


def check_dump(folder: Path) -> Path:
    """Return the folder; MoecError unless dumps can be written into it."""
    place = _nearest_existing(check_path(folder, "the dumps"))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise MoecError("no dumps can be written there", str(folder), todo="choose another folder")
    return folder


def check_text(file: Path) -> None:
    """Raise MoecError unless a file is there and holds something."""
    try:
        size = check_path(file, "the calibration text").stat().st_size
        empty = size == 0 or not file.is_file()
    except OSError as error:
        raise MoecError(f"cannot read the calibration text: {error.strerror}", where=str(file)) from error
    if empty:
        raise MoecError("the calibration text is empty, or no file", where=str(file), todo="name a text file")


def check_folder(folder: Path) -> None:
    """Raise MoecError for files of a checkpoint that say in a wrong way how to generate."""
    find_sampling(folder)
    find_end_tokens(folder)


def least_bytes(source: Path, quantized: bool) -> int:
    """Return how many bytes an artifact of a checkpoint takes at least; 0 for a source that does not say."""
    files = [source] if source.is_file() else [f for pattern in WEIGHTS for f in source.glob(pattern) if f.is_file()]
    stored = sum(f.stat().st_size for f in files if f.suffix != ".moir")
    return int(stored * (LEAST_QUANTIZED if quantized else LEAST_PLAIN))


def _nearest_existing(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_places(source: Path, out: Path, *, writes: bool, quantized: bool) -> None:
    """Raise MoecError for files beside a source that do not read, and for an output that cannot be written."""
    if source.is_dir():
        check_folder(source)
    if writes:
        check_output(out)
        check_room(out, least_bytes(source, quantized))


def output_folder(
    out: Path | str | None, source: Path | str, target: str, quantize: str | None, budget: str | None
) -> Path:
    """Return the artifact's folder: the one asked for, or one named by the source, the target and the formats."""
    if out is not None:
        return Path(out)
    path = Path(source)
    if path.exists() or not hub_name(source):
        name = path.resolve().name if path.is_dir() else path.stem
    else:
        name = str(source).partition("/")[2].replace("/", "-")
    asked = Path(quantize).stem if quantize and quantize.endswith(".json") else quantize or ""
    formats = re.sub(r"[^\w.]+", "-", f"{asked}-{budget}" if budget else asked)[:60].strip("-")
    return Path("-".join(part for part in (name, target, formats) if part))


def check_workers(given: str | int | None) -> None:
    """Raise MoecError for what names no workers, and where the extra that reaches them is not installed."""
    if given is None:
        return
    workers = str(given)
    if not workers.startswith(("tcp://", "tls://")) and not (workers.isdecimal() and 1 <= int(workers) <= MOST_WORKERS):
        todo = f"the address of a Dask scheduler (tcp://HOST:PORT), or a number of local processes up to {MOST_WORKERS}"
        raise MoecError(f"{workers!r} names no workers", "--workers", todo=todo)
    if find_spec("distributed") is None:
        raise MoecError("workers need Dask distributed, which is not installed", todo="pip install 'moec[workers]'")
