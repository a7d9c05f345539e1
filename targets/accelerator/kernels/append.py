"""The kernel of nn.cache_append: new tokens are written behind those of a cache where it lies, which nothing copies."""

from __future__ import annotations

from dataclasses import dataclass

from ..tile.builder import Builder, Layout
from ..tile.tiles import Program
from .choices import RowTile


@dataclass(frozen=True)
class Appended:
    """A cache [lead, C, width] with room for C tokens, and new ones [lead, S, width]; `lead` is a size in B."""

    lead: str
    width: int
    dtype: str = "bf16"


def append_kernel(p: Appended, t: RowTile, layout: Layout) -> Program:
    """Write the new tokens to slots P .. P + S - 1 of the cache; the other slots are not touched."""
    b = Builder("append", layout, "present[:, P:P + S] = new; the cache lies where it lay")
    b.scalar("B", "S", "P", "C")
    b.grid("tile", f"cdiv(S, {t.m})")
    b.grid("column", f"cdiv({p.width}, {t.n})")
    b.grid("row", p.lead)
    b.tensor("new", p.dtype, p.lead, "S", p.width)
    b.tensor("present", p.dtype, p.lead, "C", p.width, role="output")
    b.let("token", f"tile * {t.m} + arange({t.m})")
    b.let("j", f"column * {t.n} + arange({t.n})")
    b.let("there", f"(token < S)[:, None] & (j < {p.width})[None, :]", (t.m, t.n), "bool")
    b.load("tokens", "new", ["row", "token[:, None]", "j[None, :]"], "there", shape=(t.m, t.n))
    b.store("present", ["row", "(P + token)[:, None]", "j[None, :]"], "tokens", "there")
    return b.program()
