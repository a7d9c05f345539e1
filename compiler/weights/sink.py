"""The data file of an artifact: tensors appended one after the other, never whole in memory."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from ..atomic import write_error
from ..ir import DTYPE_BITS
from ..recipes import Recipe
from .pull import pull, tiles
from .sources import WeightSource

T = TypeVar("T")

# Measured on two cores: larger tiles are no faster, and up to ten times their size is in use at once.
TILE_BYTES = 4 << 20
# Tensors of a page or more start on a page, so that a runtime can map them; small ones on a cache line.
PAGE, LINE = 4096, 64
_AHEAD = 2  # tiles that are prepared while one is written


class DataFile:
    """A file that tensors are appended to, with the sha256 of what was written. A context manager.

    Tiles are prepared by a second thread and written in order by the caller's, so the bytes do not depend on timing.
    One thread appends; memory in use is about `_AHEAD` + 2 tiles, whatever the size of a tensor.
    """

    def __init__(self, path: Path, tile_bytes: int = TILE_BYTES, progress: Callable[[int], None] | None = None) -> None:
        """Create the file. `progress` is told the number of bytes written so far, after each tile."""
        self.path = path
        self.size = 0
        self._tile_bytes = tile_bytes
        self._progress = progress
        self._digest = hashlib.sha256()
        self._written: dict[tuple[str, int], tuple[int, int]] = {}
        self._sources: list[WeightSource] = []  # kept, so that no id in the keys above is used twice
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(error, path) from error
        self._worker = _quiet_pool()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="moec-sha256")

    @property
    def sha256(self) -> str:
        """The hex digest of the file's content so far."""
        return self._digest.hexdigest()

    def append(self, recipe: Recipe, source: WeightSource) -> tuple[int, int]:
        """Write what a bound recipe makes and return its (offset, length) in bytes.

        The same recipe on the same source is written once; later calls return the first place. Raises MoecError when
        the disk is full or writing fails, and what reading the source raises.
        """
        # repr and not ==, which takes the literals 0.0, -0.0 and False for the same number
        key = (repr(recipe), id(source))
        if key not in self._written:
            jobs = (partial(_bytes, recipe, source, box) for box in tiles(recipe.type, self._tile_bytes))
            length = recipe.type.elements * DTYPE_BITS[recipe.type.dtype] // 8
            self._written[key] = self.append_chunks(int(length), _in_order(self._worker, jobs))
            if all(source is not known for known in self._sources):
                self._sources.append(source)
        return self._written[key]

    def append_chunks(self, length: int, chunks: Iterable[memoryview]) -> tuple[int, int]:
        """Write chunks that are `length` bytes together, aligned, and return (offset, length)."""
        alignment = PAGE if length >= PAGE else LINE
        self._write(memoryview(bytes(-self.size % alignment)))
        offset = self.size
        for chunk in chunks:
            self._write(chunk)
            if self._progress:
                self._progress(self.size)
        if self.size - offset != length:
            raise ValueError(f"{self.size - offset} bytes were written for a tensor of {length} bytes")
        return offset, length

    def close(self) -> None:
        """Close the file; `sha256` and `size` stay readable."""
        self._worker.shutdown(cancel_futures=True)
        self._hasher.shutdown()
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                os.close(descriptor)
            except OSError as error:
                raise write_error(error, self.path) from error

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, chunk: memoryview) -> None:
        # hashing takes as long as writing and both leave the interpreter lock: done at the same time
        hashed = self._hasher.submit(self._digest.update, chunk)
        done = 0
        try:
            while done < len(chunk):
                done += os.write(self._descriptor, chunk[done:])
        except OSError as error:
            raise write_error(error, self.path) from error
        finally:
            hashed.result()
        self.size += done


def _quiet_pool() -> ThreadPoolExecutor:
    """Return a pool of one thread in which torch uses no further threads.

    With them, every small copy waits at a barrier for threads that the hash and the disk keep from running; it took
    up to five times as long. torch keeps the number for each thread, but hands the last one set to threads that have
    not asked yet: hence the question before setting it, and the caller's own number set again.
    """

    def one() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, thread_name_prefix="moec-tiles")
    pool.submit(one).result()
    torch.set_num_threads(before)
    return pool


def _bytes(recipe: Recipe, source: WeightSource, box: tuple[tuple[int, int], ...]) -> memoryview:
    """Return the row-major bytes of a box; numpy knows no bf16 or float8, hence the view as bytes."""
    return pull(recipe, source, box).reshape(-1).view(torch.uint8).numpy().data


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], T]]) -> Iterator[T]:
    """Yield the results of jobs in their order, with a few of them running ahead."""
    pending: deque[Future[T]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
