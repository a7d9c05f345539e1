"""The data file of an artifact: tensors appended one after the other, never whole in memory.

Tiles are read, computed and written by a pool of threads, each at its place in the file, so that the bytes do not
depend on timing. What a stopped compile wrote is not made again (`journal.py`). The parts of a quantized weight (codes, scales, zero points) are made of one pass over its numbers.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self

import torch

from ..errors import write_error
from ..formats.table import format_of
from ..ir.recipes import Recipe, Step
from .evaluate import evaluate_recipe, row_major
from .heap import keep_freed_memory
from .journal import Journal
from .memory import TILE_BYTES, usable_threads
from .rows import encode_rows
from .sources.source import Box, ElsewhereSource, WeightSource
from .steps.quantized import is_part, row_tiles
from .steps.table import step
from .tiles import tile_boxes

# Tensors of a page or more start on a page, so that a runtime can map them; small ones on a cache line.
PAGE, LINE = 4096, 64
_HASHED_AT_ONCE = 4 << 20


class TiledFile:
    """A file whose tensors are written a tile at a time, with the sha256 of what was written. A context manager.

    `size` is where it ends; who writes sets it. Memory in use is about IN_USE tiles for each thread of the pool.
    """

    def __init__(
        self, path: Path, progress: Callable[[int], None] | None = None, threads: int | None = None
    ) -> None:  # fmt: skip
        """Create the file. `progress` is told the number of bytes written so far, after each tile."""
        self.path = path
        self.size = 0
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        self._digest = hashlib.sha256()
        self._hashed: Future[None] | None = None
        self._journal = Journal(path)
        self._jobs = 0
        try:
            anew = 0 if self._journal.begun else os.O_TRUNC
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | anew | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(error, path) from error
        self._threads = threads or usable_threads()
        keep_freed_memory()
        self._pool = _quiet_pool(self._threads)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="moec-sha256")

    @property
    def sha256(self) -> str:
        """The hex digest of the file's content so far."""
        if self._hashed is not None:
            self._hashed.result()
        return self._digest.hexdigest()

    def run(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Do jobs in the pool, a few ahead; wait for all, then let the hash follow. The first error is raised."""
        pending: deque[Future[None]] = deque()
        try:
            for job in jobs:
                pending.append(self._pool.submit(self._run_job, self._jobs, job))
                self._jobs += 1
                if len(pending) > self._threads + 1:
                    pending.popleft().result()
            while pending:
                pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
        self._hashed = self._hasher.submit(self._hash_up_to, self.size)

    def _run_job(self, number: int, job: Callable[[], None]) -> None:
        """Do a job, or count the bytes that it has written before the compile was stopped."""
        self._count_bytes(self._journal.run_job(number, job, self._descriptor))

    def write(self, offset: int, chunk: memoryview) -> None:
        """Write bytes at a place of the file; MoecError when the disk is full or writing fails."""
        done = 0
        try:
            while done < len(chunk):
                done += os.pwrite(self._descriptor, chunk[done:], offset + done)
        except OSError as error:
            raise write_error(error, self.path) from error
        self._journal.note_write(offset, chunk)
        self._count_bytes(done)

    def _count_bytes(self, done: int) -> None:
        with self._lock:
            self._done += done
            if self._progress and done:
                self._progress(self._done)

    def close(self) -> None:
        """Close the file; `sha256` and `size` stay readable."""
        self._pool.shutdown(cancel_futures=True)
        self._hasher.shutdown()
        self._journal.close()
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                os.close(descriptor)
            except OSError as error:
                raise write_error(error, self.path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hash_up_to(self, end: int) -> None:
        """Read back what was written last, which the system still has in memory, gaps as the zeros that they are."""
        position = self._position
        if os.fstat(self._descriptor).st_size < end:  # an empty tensor at the end
            os.ftruncate(self._descriptor, end)
        while position < end:
            chunk = os.pread(self._descriptor, min(_HASHED_AT_ONCE, end - position), position)
            self._digest.update(chunk)
            position += len(chunk)
        self._position = position

    _position = 0  # up to where the file is hashed; only the hashing thread changes it


class DataFile(TiledFile):
    """A file that tensors are appended to, by one thread."""

    def __init__(
        self,
        path: Path,
        tile_bytes: int = TILE_BYTES,
        progress: Callable[[int], None] | None = None,
        threads: int | None = None,
    ) -> None:
        """Create the file. `progress` is told the number of bytes written so far, after each tile."""
        super().__init__(path, progress, threads)
        self._tile_bytes = tile_bytes
        self._written: dict[tuple[Recipe, int], tuple[int, int]] = {}
        self._sources: list[WeightSource] = []  # kept, so that no id in the keys above is used twice

    def append(self, recipe: Recipe, source: WeightSource) -> tuple[int, int]:
        """Write what a bound recipe makes and return its (offset, length) in bytes.

        The same recipe on the same source is written once; later calls return the first place. The parts of one
        quantized weight are written together at the first of them. Raises MoecError when the disk is full or writing
        fails, and what reading the source raises.
        """
        if self._key(recipe, source) not in self._written:
            if all(source is not known for known in self._sources):
                self._sources.append(source)
            if is_part(recipe):
                self._append_parts(recipe, source)
            else:
                (offset,) = self._reserve([recipe], source)
                position = 0
                jobs = []
                for box in tile_boxes(recipe.type, self._tile_bytes):
                    jobs.append(partial(self._tile, recipe, source, box, offset + position))
                    position += _box_elements(box) * recipe.type.bits // 8
                self.run(jobs)
        return self._written[self._key(recipe, source)]

    # --- one weight ------------------------------------------------------------------------------------------------

    def _key(self, recipe: Recipe, source: WeightSource) -> tuple[Recipe, int]:
        return recipe, id(source)

    def _append_parts(self, part: Step, source: WeightSource) -> None:
        """Write all parts of a quantized weight, a tile of its rows at a time."""
        quantized = part.items[0]
        assert isinstance(quantized, Step)
        names = format_of(quantized.type.dtype).part_names
        offsets = dict(zip(names, self._reserve([step(name, quantized) for name in names], source), strict=True))
        jobs, first = [], 0
        for box in row_tiles(quantized, self._tile_bytes):
            jobs.append(partial(self._rows, quantized, source, box, first, offsets))
            first += _box_elements(box)
        self.run(jobs)

    def _reserve(self, recipes: list[Recipe], source: WeightSource) -> list[int]:
        """Reserve a range at the end of the file for each recipe; the hash follows as soon as it is written."""
        offsets = []
        for recipe in recipes:
            length = int(recipe.type.bytes)
            offset = self.size + -self.size % (PAGE if length >= PAGE else LINE)
            self._written[self._key(recipe, source)] = (offset, length)
            self.size = offset + length
            offsets.append(offset)
        return offsets

    def _tile(self, recipe: Recipe, source: WeightSource, box: Box, offset: int) -> None:
        # row-major bytes; numpy knows no bf16 or float8, hence the view as bytes
        self.write(offset, evaluate_recipe(recipe, source, box).reshape(-1).view(torch.uint8).numpy().data)

    def _rows(self, quantized: Step, source: WeightSource, box: Box, first: int, offsets: dict[str, int]) -> None:
        for name, part in encode_rows(quantized, source, box).items():
            flat = row_major(part.contiguous().reshape(_box_elements(box), -1)).view(torch.uint8)
            self.write(offsets[name] + first * flat.shape[1], flat.reshape(-1).numpy().data)


def tile_threads(source: WeightSource) -> int | None:
    """Return how many tiles of a source to work on at once; None for as many as this process has threads."""
    return source.threads if isinstance(source, ElsewhereSource) else None


def _box_elements(box: Box) -> int:
    count = 1
    for start, stop in box:
        count *= stop - start
    return count


def _quiet_pool(threads: int) -> ThreadPoolExecutor:
    """Return a pool in whose threads torch uses no further threads.

    With them, every small copy waits at a barrier for threads that the hash and the disk keep from running; it took
    up to five times as long. torch keeps the number for each thread, but hands the last one set to threads that have
    not asked yet: hence the question before setting it, and the caller's own number set again.
    """
    started = threading.Barrier(threads)

    def one() -> None:
        started.wait()  # so that each of the threads does this once
        torch.get_num_threads()
        torch.set_num_threads(1)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="moec-tiles")
    for future in [pool.submit(one) for _ in range(threads)]:
        future.result()
    torch.set_num_threads(before)
    return pool
