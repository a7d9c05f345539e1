"""The `moec` command. Standard output holds results only; everything else goes to standard error.

torch, transformers and onnxruntime are imported inside the commands that need them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..artifact.remote import is_url
from ..formats.caches import BITS
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
    shared_options,
    trust_option,
    write_text,
)
from .bench import bench
from .bisect import bisect
from .chat import chat
from .completion import complete_formats, complete_passes, complete_targets
from .diff import diff
from .inspect import inspect
from .lists import list_, targets
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
@click.option(
    "--target", default="cpu", show_default=True, shell_complete=complete_targets,
    help="What to compile for; `moec targets` lists them.",
)  # fmt: skip
@click.option(
    "-o", "--out", help="The artifact folder; with --stop-after a .moir file.  [default: SOURCE-TARGET-FORMATS]"
)
@click.option(
    "--download", is_flag=True, help="Fetch the model SOURCE from the Hugging Face Hub, or what has changed of it."
)
@click.option(
    "--quantize",
    metavar="SPEC",
    shell_complete=complete_formats,
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
    type=click.Choice(["auto", *BITS]),
    help="How keys and values are stored, if the target can; auto is on the cpu f16 beside int8 activations, else f32, on accelerators bf16.  [default: auto]",
)
@click.option(
    "--memory-limit",
    "memory_limit",
    metavar="SIZE",
    callback=lambda c, p, v: v and byte_size(v, p),
    help="What tiles of weights may use, as in 500MB.  [default: 1GB]",
)
@click.option(
    "--pipeline", shell_complete=complete_passes, help="Passes instead of the target's own, as in 'cleanup,lift-moe'."
)
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
@click.option(
    "--workers",
    metavar="ADDRESS|N",
    help="A Dask scheduler (tcp://HOST:PORT), or N local processes, that compute weights.",
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
    if stop_after and given["resume"]:
        raise click.UsageError("--resume goes on with the files of an artifact; --stop-after makes none")
    if given["download"] and Path(source).exists():
        raise click.UsageError(f"--download fetches a model by its name (org/name); {source} is a path")
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
@click.option(
    "-p", "--passes", default="", shell_complete=complete_passes,
    help="Passes with options, as in 'a,b{x=1}'; none only checks and prints.",
)  # fmt: skip
@click.option(
    "--target", default="cpu", show_default=True, shell_complete=complete_targets,
    help="The target that passes ask about kernels.",
)  # fmt: skip
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
main.add_command(list_)
main.add_command(targets)
