"""What a shell completes: names of targets, formats, passes, and of what `moec list` lists."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem


def complete_targets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the targets whose names begin so, and for a path the files of chips."""
    from ...targets import TARGETS

    if "/" in incomplete or incomplete.endswith(".toml"):
        return [CompletionItem(incomplete, type="file")]
    return _beginning_with(TARGETS, incomplete)


def complete_formats(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the formats whose names begin as the last part of what is typed: `experts=int4,head=in`."""
    from ..formats.table import FORMAT_NAMES, INTEGER_BITS
    from ..quantize.options import ROLES

    names = [*(f"int{bits}" for bits in INTEGER_BITS), *(n.replace("_gN", "_g64") for n in FORMAT_NAMES)]
    before = incomplete[: max(incomplete.rfind(","), incomplete.rfind("=")) + 1]
    if not before.endswith("="):
        names += ["auto", "keep", *(f"{role}=" for role in ROLES)]
    return [CompletionItem(before + item.value) for item in _beginning_with(names, incomplete[len(before) :])]


def complete_passes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the passes whose names begin as the last one of what is typed: `cleanup,lift`."""
    from ...passes import PASSES

    before = incomplete[: incomplete.rfind(",") + 1]
    return [CompletionItem(before + item.value) for item in _beginning_with(PASSES, incomplete[len(before) :])]


def complete_listed(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of what `moec list WHAT` lists."""
    from . import listing

    rows: listing.Rows = getattr(listing, f"list_{ctx.params['what']}", list)()
    return _beginning_with([row["name"] for row in rows], incomplete)


def _beginning_with(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
