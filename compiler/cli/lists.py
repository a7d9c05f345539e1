"""`moec list` and `moec targets`: what there is, and what is known of it."""

from __future__ import annotations

import json
from typing import Any

import click

from .base import CHECK_FAILED, examples_epilog, json_option, key_values, say, shared_options, write_text
from .completion import complete_listed, complete_targets
from .progress import show_progress


@click.command(
    "list", epilog=examples_epilog("moec list passes", "moec list ops moe.experts", "moec list rules --json")
)
@click.argument("what", type=click.Choice(["passes", "ops", "rules", "families", "formats", "systems"]))
@click.argument("name", required=False, shell_complete=complete_listed)
@json_option
@shared_options
def list_(what: str, name: str | None, as_json: bool) -> None:
    """List passes, ops, rules, model families, stored formats or systems.

    With NAME all that is known of one is shown. Families are those that the tests check; any causal LM of the installed transformers may be compiled.
    """
    from . import listing

    rows = getattr(listing, f"list_{what}")()
    if name is None:
        return show_list([listing.short_row(row) for row in rows], as_json)
    row = listing.find_row(what, rows, name)
    if as_json:
        return show_list([row], as_json)
    from .table import show_row

    show_row(row)


@click.command(
    epilog=examples_epilog(
        "moec targets",
        "moec targets cpu --probe -o capabilities.json",
        "moec targets ascend-950dt -D variant=36",
        "moec targets my-chip.toml -D memory.dram.bandwidth=2.0TB/s --json",
    )
)
@click.argument("name", required=False, shell_complete=complete_targets)
@click.option("-D", "options", metavar="KEY=VALUE", multiple=True, help="A figure of an accelerator; repeatable.")
@click.option("--probe", is_flag=True, help="Try what the target's runtime does, and compare it with the record.")
@click.option("--quick", is_flag=True, help="With --probe: right or wrong only, no speeds.")
@click.option("-o", "--out", metavar="FILE", help="With --probe: write what was found as a record.")
@json_option
@shared_options
def targets(
    name: str | None, options: tuple[str, ...], probe: bool, quick: bool, out: str | None, as_json: bool
) -> None:
    """List the targets, or show one.

    Of an accelerator every figure is shown with its grade and source, and what is unknown. NAME may be a TOML file of your own. -D sets a figure, as in memory.gm.bandwidth=2.0TB/s, or chooses a bin, as in variant=28.

    --probe runs every operator variant of the record on the installed runtime against its reference. The exit code is 1 if one that is recorded as right is not.
    """
    from . import listing

    if options and (name is None or probe):
        raise click.UsageError("-D belongs to the name of an accelerator")
    if not probe:
        if quick or out:
            raise click.UsageError("--quick and -o belong to --probe")
        shown = listing.accelerator_profile(name, key_values(options)) if name else None
        if shown is None:
            rows = listing.list_targets(name)
            if options:
                raise click.UsageError(f"-D sets figures of an accelerator, and {name} is none")
            if name is None and not as_json:  # a pipeline is long: it stands beside its one target
                rows = [{"name": row["name"], "doc": row["doc"]} for row in rows]
            return show_list(rows, as_json)
        if as_json:
            return show_list([shown], as_json)
        from .profile import show_profile

        return show_profile(shown)
    if name is None:
        raise click.UsageError("--probe needs the name of a target")
    with show_progress():
        found = listing.probe_target(name, quick)
    if out:
        write_text(found.text, out)
    if out != "-":
        show_list(found.rows, as_json)
    say(found.made_with)
    for line in found.differences:
        say(line)
    if found.lost:
        click.get_current_context().exit(CHECK_FAILED)


def show_list(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from .table import show_rows

    show_rows(rows)
