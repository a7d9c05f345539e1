"""The streaming read bandwidth of this machine's memory: what bounds a decode step, whoever computes it."""

from __future__ import annotations

import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

LARGEST = 1 << 30  # bytes that are read: more than caches hold
PASSES = 3


class StreamReader:
    """Memory that all threads read from its beginning to its end, each a part.

    It lies in large pages where the system has them, as the weights of moec's own kernels do.
    """

    def __init__(self, threads: int, size: int | None = None) -> None:
        """Take the memory: by default a gigabyte, or an eighth of what is free."""
        wanted = min(LARGEST, (free_memory() or LARGEST * 8) // 8) if size is None else size
        memory = mmap.mmap(-1, wanted // (threads * 64) * threads * 64)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        numbers = np.frombuffer(memory, np.int64)
        numbers[:] = 1  # pages of zeros that nobody has written may all be the same one
        self._parts = np.array_split(numbers, threads)
        self._pool = ThreadPoolExecutor(threads)
        self.bytes = numbers.nbytes
        self.read_rate()  # starts the threads

    def read_rate(self) -> float:
        """Return bytes a second, the best of a few passes: adding up integers takes less time than reading them."""
        seconds = []
        for _ in range(PASSES):
            start = time.perf_counter()
            list(self._pool.map(np.add.reduce, self._parts))
            seconds.append(time.perf_counter() - start)
        return self.bytes / min(seconds)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def free_memory() -> int | None:
    """Return the bytes that a process may still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
