"""`moec inspect`: what a program holds, reads and computes, in the terminal or as a page."""

from __future__ import annotations

import json

import click

from ..errors.paths import check_source
from ..formats.caches import BITS
from .base import examples_epilog, json_option, key_values, shared_options, trust_option, write_text
from .completion import complete_formats, complete_targets


@click.command(
    epilog=examples_epilog(
        "moec inspect examples/tiny-moe",
        "moec inspect folder-with-config-json --context 32768 --json | jq .parameters",
        "moec inspect folder-with-config-json --target nvidia-b200 --batch 64",
        "moec inspect folder-with-config-json --quantize int4 --target cpu",
        "moec inspect examples/tiny-moe --html tiny.html",
    )
)
@click.argument("source")
@click.option(
    "--context", type=click.IntRange(min=0), metavar="N", help="Past tokens of the decoded token.  [default: 4096]"
)
@click.option(
    "--target",
    metavar="NAME",
    shell_complete=complete_targets,
    help="Predict a step on an accelerator; `moec targets` lists them.",
)
@click.option(
    "--quantize",
    metavar="SPEC",
    shell_complete=complete_formats,
    help="As `moec compile` takes it: bytes, fit and speed in one line.  [target: cpu]",
)
@click.option("--kv", type=click.Choice(["auto", *BITS]), help="As `moec compile` takes it.  [default: auto]")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="With --target: sequences.  [default: 1]")
@click.option("--new", type=click.IntRange(min=1), metavar="N", help="New tokens of each sequence.  [default: 1]")
@click.option("--devices", type=click.IntRange(min=1), metavar="N", help="Devices that share experts.  [default: 1]")
@click.option("-D", "options", metavar="KEY=VALUE", multiple=True, help="A figure of the accelerator; repeatable.")
@click.option("--html", "page", metavar="FILE", help="Write a page of the program; needs the extra `plots`.")
@click.option(
    "--routing", metavar="FILE", help="With --html: how often experts were chosen, as `moec run` recorded it."
)
@json_option
@trust_option
@shared_options
def inspect(
    source: str, context: int | None, target: str | None, quantize: str | None, kv: str | None,
    options: tuple[str, ...], as_json: bool, trust_remote_code: bool, page: str | None, routing: str | None, **step: int | None,
) -> None:  # fmt: skip
    """Show parameters, bytes, FLOPs and KV cache.

    --html writes a page to look around in: the graph of each kind of layer, weights, costs, passes. With --target also the time that a step is predicted to take on an accelerator; with --quantize one line says whether it fits and how fast it runs. Figures are for the whole and for each kind of layer. SOURCE is a checkpoint folder (a config.json is enough), an artifact or a .moir file. Nothing is run or measured:
    every figure is counted from the IR, and predicted from it and from the figures of a chip.
    """
    given = {name: value for name, value in step.items() if value is not None}
    if target is None and quantize is not None:
        target = "cpu"
    if target == "cpu" and quantize is not None and given:
        raise click.UsageError(
            f"{next(f'--{name}' for name in given)} is for accelerators: of the CPU one request is known"
        )
    if target is None and (given or options or kv):
        first = next((f"--{name}" for name in given), "-D" if options else "--kv")
        raise click.UsageError(f"{first} belongs to --target")
    if page is not None and quantize is not None:
        raise click.UsageError(
            "--html is of a program as it is: leave out --quantize, or compile with it and give the artifact"
        )
    if page is None and routing is not None:
        raise click.UsageError("--routing belongs to --html")
    check_source(source)
    keys = key_values(options)
    if target is not None:
        from ...targets import open_target

        chosen = open_target(target, keys)
        chosen.store_caches(chosen.pipeline, kv)
    from .report import inspect_source as report
    from .report import open_source

    if quantize is not None:
        from ..quantize.request import read_request

        read_request(quantize)  # before the source is imported
    opened = open_source(source, trust_remote_code=trust_remote_code)
    if quantize is not None:
        from .estimate import estimate_line, estimate_step

        past = opened.context(context)
        estimate = estimate_step(opened.module, str(target), quantize, keys, kv=kv, past=past, **given)
        click.echo(json.dumps(estimate, indent=2) if as_json else estimate_line(estimate))
        return
    found = report(opened, context=context)
    if target is not None:
        from ..driver import predict

        past = opened.context(context)
        found["predicted"] = predict(opened.module, target, keys, quantize=None, kv=kv, past=past, **given)
    if page is not None:
        from .inspect_page import inspect_page

        write_text(inspect_page(opened, found, source, routing), page)
        if page != "-":
            click.echo(f"wrote {page}", err=True)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if page is not None:
        return
    from .show import show_report

    show_report(found)
    if "kernels" in found:
        from .kernels import show_kernels

        show_kernels(found["kernels"])
    if target is not None:
        from .predicted import show_predicted

        show_predicted(found["predicted"])
