"""Cut a tensor into boxes, each small enough to be worked on at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ..ir.types import TensorType
from .sources.source import Box, full_box

# a tile is cut at multiples of this where it can be, so that blocks and quantization groups stay whole
_GRAIN = 128


def tile_boxes(type_: TensorType, limit_bytes: int) -> Iterator[Box]:
    """Yield boxes that cover a tensor in row-major order, each contiguous and of at most `limit_bytes`.

    An element counts as at least 4 bytes, since most steps pass through float32. A box has at least one element.
    A tensor without elements has no boxes, a scalar has the box `()`.
    """
    sizes = type_.sizes
    if 0 in sizes:
        return
    room = max(1, limit_bytes // max(4, -(-type_.bits // 8)))
    axis, inner = len(sizes), 1  # the axes from `axis` on are taken whole; together they have `inner` elements
    while axis and inner * sizes[axis - 1] <= room:
        axis -= 1
        inner *= sizes[axis]
    if axis == 0:
        yield full_box(sizes)
        return
    length = room // inner
    if length > _GRAIN:
        length -= length % _GRAIN
    for outer in itertools.product(*map(range, sizes[: axis - 1])):
        for start in range(0, sizes[axis - 1], length):
            cut_axis = (start, min(start + length, sizes[axis - 1]))
            yield (*((i, i + 1) for i in outer), cut_axis, *full_box(sizes[axis:]))
