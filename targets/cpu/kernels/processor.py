"""Tells what moec's kernels find of the processor that this runs on, and how they split their work for it."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .library import compile_library, find_compiler, this_platform


def describe_processor() -> dict[str, Any]:
    """Return the instruction sets, caches and splits of moec's kernels on this processor, by asking their library.

    It is compiled if it was not before; where that cannot be, `none` says why.
    """
    place, compiler = this_platform(), find_compiler()
    if place is None or compiler is None:
        reason = "the package ziglang is not installed" if place else "moec has none for this platform"
        return {"none": reason}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps a library that is loaded
        path = Path(folder) / place.file
        path.write_bytes(compile_library(place, compiler))
        library = ctypes.CDLL(str(path))
        numbers = (ctypes.c_int64 * 8)()
        library.moec_profile(numbers)
        count, *caches, tile_from, tile_rows, task_bytes, tasks = numbers
        return {
            "instruction_sets": list(_names_of_sets(library)),
            "runs": next(_names_of(library.moec_kernels), None),
            "processors": count,
            "cache_bytes": [size for size in caches if size],
            "rows_of_a_tile": tile_rows,
            "tiles_from_rows_of_activations": tile_from or None,
            "bytes_of_a_task_that_streams": task_bytes,
            "tasks_of_a_processor": tasks,
        }


def _names_of_sets(library: ctypes.CDLL) -> Iterator[str]:
    index = 0
    while names := list(_names_of(library.moec_kernels_found, index)):
        yield from names
        index += 1


def _names_of(function: Any, *arguments: int) -> Iterator[str]:
    """Yield the text that a function of the library returns, unless it is NULL."""
    function.restype = ctypes.c_char_p
    if (name := function(*arguments)) is not None:
        yield name.decode()
