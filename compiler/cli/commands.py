"""The `moec` command. Standard output holds results only; everything else goes to standard error.

torch, transformers and onnxruntime are imported inside the commands that need them.
"""

from __future__ import annotations

import json
import time
from typing import Any

import click
from click.core import ParameterSource

from ..artifact.remote import is_url
from ..version import __version__
from .artifacts import run, verify
from .base import (
    CHECK_FAILED,
    Commands,
    byte_size,
    examples_epilog,
    json_option,
    key_values,
    print_notes,
    print_timings,
    read_text,
    say,
    shared_options,
    trust_option,
    write_text,
)
from .bench import bench
from .bisect import bisect
from .chat import chat
from .diff import diff
from .inspect import inspect
from .plan import plan
from .progress import show_progress
from .serve import serve

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(
    cls=Commands,
    context_settings=SETTINGS,
    epilog=examples_epilog(
        "moec compile examples/tiny-moe -o tiny",
        "moec verify tiny",
        'moec run tiny --prompt "def main():" --greedy',
    )
    + "\n\n\b\nExit codes:\n  0 good, 1 a check failed, 2 wrong use or bad input, 70 an error inside moec",
)
@click.version_option(__version__, "-V", "--version", prog_name="moec")
@shared_options
def main() -> None:
    """An ahead-of-time compiler for Mixture-of-Experts language models."""


@main.command(
    epilog=examples_epilog(
        "moec compile examples/tiny-moe -o tiny --verify",
        "moec compile config-folder --stop-after moe | less",
        "moec compile examples/tiny-moe --quantize auto,method=gptq --budget 4.5bpw --calibration text.txt",
        "moec compile program.moir --weights checkpoint-folder -o out",
        "moec compile checkpoint-folder --plan plan.json -o shards",
        "moec compile allenai/OLMoE-1B-7B-0924 --download --quantize int4",
    )
)
@click.argument("source")
@click.option("--target", default="cpu", show_default=True, help="What to compile for; `moec targets` lists them.")
@click.option(
    "-o", "--out", help="The artifact folder; with --stop-after a .moir file.  [default: SOURCE-TARGET-FORMATS]"
)
@click.option(
    "--download", is_flag=True, help="Fetch the model SOURCE from the Hugging Face Hub, or what has changed of it."
)
@click.option(
    "--quantize",
    metavar="SPEC",
    help="Store weights in fewer bits: int4, int8, 'experts=int4,head=int8,group=64', auto, the file of a plan, or the codes of the checkpoint: keep (the default where it is quantized).",
)
@click.option("--budget", metavar="SIZE", help="For --quantize auto: 4.5bpw (bits per weight), or bytes as in 6GB.")
@click.option(
    "--calibration",
    metavar="FILE",
    help="The text that method=gptq or awq looks at, and --quantize auto if there is one.",
)
@click.option(
    "--accuracy",
    type=click.Choice(["fast", "exact"]),
    help="Beside quantized weights: int8 activations (fast), or f32 (exact).  [default: fast]",
)
@click.option(
    "--kv",
    type=click.Choice(["auto", "f32", "f16", "bf16", "int8"]),
    help="How keys and values are stored; auto is f16 beside int8 activations, else f32.  [default: auto on target cpu]",
)
@click.option(
    "--memory-limit",
    "memory_limit",
    metavar="SIZE",
    callback=lambda c, p, v: v and byte_size(v, p),
    help="What tiles of weights may use, as in 500MB.  [default: 1GB]",
)
@click.option("--pipeline", help="Passes instead of the target's own, as in 'cleanup,lift-moe'.")
@click.option("--dump", metavar="DIR", help="Write the IR after every pass that changed it.")
@click.option("--check", is_flag=True, help="Compare the numbers before and after every pass.")
@click.option("--verify", is_flag=True, help="Compare the artifact with the source model in transformers.")
@click.option("--stop-after", metavar="STAGE", help="Stop after graph, moe, kernel or a pass, and print the IR.")
@click.option("-D", "options", metavar="KEY=VALUE", multiple=True, help="An option of the target; repeatable.")
@click.option("--why", is_flag=True, help="Say which rules did not apply, where, and the reason.")
@click.option("--timings", is_flag=True, help="Say how long each pass took.")
@click.option("--weights", metavar="DIR", help="The checkpoint folder of a .moir source.")
@click.option(
    "--resume", is_flag=True, help="Go on where a run of the same was stopped; what it wrote is kept when this one is."
)
@click.option("--plan", metavar="FILE", help="Write the shards of the devices of a plan (`moec plan -o FILE`).")
@json_option
@trust_option
@shared_options
def compile(
    source: str,
    target: str,
    out: str | None,
    options: tuple[str, ...],
    why: bool,
    timings: bool,
    verify: bool,
    stop_after: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Compile SOURCE and print the artifact's folder.

    SOURCE is a checkpoint folder, a .gguf, .onnx, .pt2 or .moir file, an artifact, or the name of a model on the Hugging Face Hub (org/name, org/name@revision) that is in the local cache, or fetched with --download. A folder with only a config.json will do for --stop-after graph or moe.
    """
    if stop_after and verify:
        raise click.UsageError("--verify needs an artifact; --stop-after makes none")
    if as_json and stop_after:
        raise click.UsageError("--json describes an artifact; --stop-after makes none")
    if out and out.endswith(".moir") and not stop_after:
        raise click.UsageError("-o names the artifact folder; add --stop-after kernel to write a .moir file")
    named = click.get_current_context().get_parameter_source("target")
    if given["plan"] and named is not ParameterSource.DEFAULT:
        raise click.UsageError("--plan says what is compiled for; leave out --target")
    keys = key_values(options)
    from .. import driver

    start = time.perf_counter()
    with show_progress():
        done = driver.compile_source(
            source, target, None if stop_after else out, options=keys, stop_after=stop_after, verify=verify, **given,
        )  # fmt: skip
    print_notes(note for note in done.notes if why or note.warning)
    print_timings(done.timings if timings else ())
    if done.artifact is None:
        from ..text.printer import print_module

        write_text(print_module(done.module), out)
        return
    from .show import show_artifact

    seconds = time.perf_counter() - start
    show_artifact(done.artifact, seconds)
    if as_json:
        folder = str(done.artifact.folder)
        click.echo(json.dumps({"folder": folder, "seconds": seconds, **done.artifact.report}, indent=2))
    else:
        click.echo(out if is_url(out) else str(done.artifact.folder))
    if verify and not done.artifact.manifest["figures"]["measured"]["passed"]:
        click.get_current_context().exit(CHECK_FAILED)


@main.command(
    epilog=examples_epilog(
        "moec opt program.moir -p 'cleanup,lift-moe' --check",
        "moec compile model --stop-after graph | moec opt - -p lift-moe --why > moe.moir",
    )
)
@click.argument("file")
@click.option("-p", "--passes", default="", help="Passes with options, as in 'a,b{x=1}'; none only checks and prints.")
@click.option("--target", default="cpu", show_default=True, help="The target that passes ask about kernels.")
@click.option("-o", "--out", help="The file to write.  [default: standard output]")
@click.option("--dump", metavar="DIR", help="Write the IR after every pass that changed it.")
@click.option("--check", is_flag=True, help="Compare the numbers before and after every pass.")
@click.option("--why", is_flag=True, help="Say which rules did not apply, where, and the reason.")
@click.option("--timings", is_flag=True, help="Say how long each pass took.")
@shared_options
def opt(file: str, passes: str, out: str | None, why: bool, timings: bool, **given: Any) -> None:
    """Run passes on IR and print the result.

    FILE is a .moir file or - for standard input.
    """
    from .. import driver

    source: Any = file
    if file == "-":
        from ...targets import declare_kernel_ops
        from ..text.parser import parse_module

        declare_kernel_ops()
        source = parse_module(read_text("-"), "<stdin>")
    with show_progress():
        run = driver.run_passes(source, passes, **given)
    print_notes(run.notes if why else ())
    print_timings(run.timings if timings else ())
    from ..text.printer import print_module

    write_text(print_module(run.module), out)


main.add_command(run)
main.add_command(chat)
main.add_command(verify)
main.add_command(bench)
main.add_command(plan)
main.add_command(diff)
main.add_command(bisect)
main.add_command(serve)
main.add_command(inspect)


@main.command("list", epilog=examples_epilog("moec list passes", "moec list ops --json"))
@click.argument("what", type=click.Choice(["passes", "ops", "rules", "families", "formats", "systems"]))
@json_option
@shared_options
def list_(what: str, as_json: bool) -> None:
    """List passes, ops, rules, model families, stored formats or systems.

    Families are those that the tests check; any causal LM of the installed transformers may be compiled.
    """
    from . import listing

    _show_list(getattr(listing, f"list_{what}")(), as_json)


@main.command(
    epilog=examples_epilog(
        "moec targets",
        "moec targets cpu --probe -o capabilities.json",
        "moec targets ascend-950dt -D variant=36",
        "moec targets my-chip.toml -D memory.dram.bandwidth=2.0TB/s --json",
    )
)
@click.argument("name", required=False)
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
            return _show_list(rows, as_json)
        if as_json:
            return _show_list([shown], as_json)
        from .profile import show_profile

        return show_profile(shown)
    if name is None:
        raise click.UsageError("--probe needs the name of a target")
    with show_progress():
        found = listing.probe_target(name, quick)
    if out:
        write_text(found.text, out)
    if out != "-":
        _show_list(found.rows, as_json)
    say(found.made_with)
    for line in found.differences:
        say(line)
    if found.lost:
        click.get_current_context().exit(CHECK_FAILED)


def _show_list(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    from .table import show_rows

    show_rows(rows)
