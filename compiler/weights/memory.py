"""Divide a memory limit: how large tiles of weights may be, and how many threads work on some at once."""

from __future__ import annotations

import os
import re

from ..errors import MoecError

# Measured on two cores: with smaller tiles threads wait for the interpreter, larger ones are no faster.
TILE_BYTES = 8 << 20
SMALLEST_TILE = 64 << 10
IN_USE = 10  # times the size of a tile that one thread uses at most: what was read, f32, codes, the search's values
MEMORY_LIMIT = 10**9  # bytes in use for tiles, by default


def parse_bytes(text: str | int) -> int:
    """Return the bytes that a text such as 500MB, 1.5GB or 4096 says (decimal units); MoecError for another text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)B?", str(text).strip())
    if not found:
        raise MoecError(f"{text!r} is not a size", todo="give one such as 500MB or 1.5GB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def tile_bytes(limit: int) -> int:
    """Return the size of tiles with which all threads together use at most `limit` bytes; MoecError if none does."""
    threads = usable_threads()
    wanted = limit // (IN_USE * threads)
    if wanted < SMALLEST_TILE:
        least = -(-SMALLEST_TILE * IN_USE * threads // 10**6)
        raise MoecError(f"{limit} bytes are too few to work in", todo=f"give a memory limit of at least {least}MB")
    return min(TILE_BYTES, wanted)


def capped_threads(threads: int | None) -> int | None:
    """Return a number of threads, at most those that this process may run at once: more would wait for each other."""
    return threads if threads is None else min(threads, usable_threads())


def usable_threads() -> int:
    """Return how many threads this process may run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
