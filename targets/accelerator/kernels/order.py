"""The order in which the points of a matrix kernel's grid run, which decides what the cache still holds when it is needed.

Column by column a tile's rows stay in the cache and the whole weight passes it once for every tile of rows. With some
tiles of rows side by side the weight passes once for all of them, and their rows have to stay.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from ..tile.builder import Builder


def tile_axes(b: Builder, columns: str, tiles: str, group: int) -> None:
    """Add the grid's axes `column` and `tile`, in groups of `group` tiles; some tiles of the last one may not exist."""
    if group == 1:
        b.grid("column", columns)
        b.grid("tile", tiles)
        return
    b.grid("beside", group)
    b.grid("column", columns)
    b.grid("panel", f"cdiv({tiles}, {group})")
    b.let("tile", f"panel * {group} + beside")


def axis_of_tiles(group: int, tiles: float) -> dict[str, float]:
    """Return how many points of the axis that runs over tiles do something when so many tiles do, as `count` expects it."""
    return {"tile": tiles} if group == 1 else {"panel": max(tiles / group, 1.0)}


def tiles_that_exist(b: Builder, condition: str, group: int) -> AbstractContextManager[None]:
    """Run what is added only for tiles that exist: in groups some of the last one may not."""
    return nullcontext() if group == 1 else b.when(condition)
