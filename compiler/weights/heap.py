"""Whether memory that was freed stays with the process, to be used again, or goes back to the system at once.

The first is faster: the system clears every page that it hands out. The second holds a limit. glibc keeps freed blocks of
up to 32 MB in its heap, and torch asks for aligned ones, for which a gap that an equal block has left is too small: up to
version 2.37 glibc looks for one that is larger by the alignment (its bug 14581). Where blocks of a few MB come and go for
minutes, with small ones between them that stay, the heap grows without an end: by 10 MB a second in a calibration.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LARGEST_KEPT = 32 << 20  # bytes; glibc has larger blocks mapped one by one in any case
_LARGEST_IN_HEAP = 256 << 10  # bytes, while memory goes back: blocks of fewer leave no gaps worth counting
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as in malloc.h
_HEADER = 1 << 20  # bytes, more than glibc puts around a block


def keep_freed_memory() -> None:
    """Make tiles reuse memory that earlier ones freed, unless memory goes back just now.

    glibc maps large blocks one by one until it sees one freed; from then on it keeps blocks of up to that size, and
    twice as many bytes in all, to hand them out again (mallopt(3), M_MMAP_THRESHOLD). Elsewhere this does nothing.
    """
    torch.empty(LARGEST_KEPT - _HEADER, dtype=torch.uint8)


@contextmanager
def returning_freed_memory(wanted: bool = True) -> Iterator[None]:
    """Return large blocks to the system when they are freed, until the block ends; does nothing without glibc."""
    library = ctypes.CDLL(None) if wanted else None
    if library is None or not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
    library.mallopt(_TRIM_THRESHOLD, _LARGEST_IN_HEAP)
    library.malloc_trim(ctypes.c_size_t(0))  # what earlier work has left
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, LARGEST_KEPT)
        library.mallopt(_TRIM_THRESHOLD, 2 * LARGEST_KEPT)
