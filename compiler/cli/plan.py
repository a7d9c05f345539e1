"""`moec plan`: does a model run on a system, how is it divided, how fast will it be, and how a person reads the answer."""

from __future__ import annotations

import json
import re
from typing import Any

import click

from ..errors.paths import check_source
from .base import examples_epilog, json_option, say, shared_options, trust_option, write_text

PLACES = {"device": "in device memory", "host": "in host memory", "disk": "on disk"}
COUNT = click.IntRange(min=1)


def seconds_option(text: str | None, param: click.Parameter) -> float | None:
    """Return the seconds that a text such as 50ms or 2s says."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s)", text.strip())
    if not found or not float(found[1]):
        raise click.BadParameter(f"{text!r} is not a time such as 50ms or 2s", param=param)
    return float(found[1]) * (1e-3 if found[2] == "ms" else 1.0)


def pool_option(text: str | None, param: click.Parameter) -> str | int | None:
    """Return the number of devices that a text says, or auto."""
    if text is None or text == "auto":
        return text
    if not text.isdecimal() or not int(text):
        raise click.BadParameter(f"{text!r} is neither auto nor a number of devices", param=param)
    return int(text)


@click.command(
    epilog=examples_epilog(
        "moec plan folder-with-config-json --on nvidia-h200:8 --engine trtllm --weights fp8 --batch 64",
        "moec plan folder-with-config-json --on rtx5090-pc --weights fp4",
        "moec plan folder-with-config-json --on gb300-nvl72 --batch 512 --tpot 50ms --ttft 2s --json",
        "moec plan folder-with-config-json --on hgx-h200 --export engines",
        "moec plan folder-with-config-json --on gb300-nvl72 --batch 2048 --prefill auto",
        "moec plan checkpoint --on nvidia-h200:8 --ep 8 -o plan.json && moec compile checkpoint --plan plan.json",
    )
)
@click.argument("source")
@click.option(
    "--on", required=True, metavar="SYSTEM", help="A name of `moec list systems`, nvidia-h200:8, a TOML file, or here."
)
@click.option(
    "--engine", metavar="NAME", help="What serves it: vllm, sglang, trtllm, atom, llama.cpp, ds4.  [default: by system]"
)
@click.option(
    "--weights",
    metavar="FORMAT",
    help="fp8, fp4, int4, any format, or 'experts=fp4,attention=fp8'.  [default: as the checkpoint]",
)
@click.option("--cache", type=click.Choice(["bf16", "fp8"]), help="How KV caches are stored.  [default: by system]")
@click.option("--tp", type=COUNT, metavar="N", help="Tensor-parallel devices of attention.  [default: chosen]")
@click.option("--attention-dp", type=COUNT, metavar="N", help="Copies of attention.  [default: chosen]")
@click.option("--ep", type=COUNT, metavar="N", help="Devices that hold different experts.  [default: chosen]")
@click.option("--pp", type=COUNT, metavar="N", help="Pipeline stages.  [default: chosen]")
@click.option(
    "--batch",
    type=COUNT,
    default=1,
    show_default=True,
    metavar="N",
    help="Requests at once: of the system; with --attention-dp, of each copy of attention.",
)
@click.option("--input", type=COUNT, default=1024, show_default=True, metavar="N", help="Tokens of a prompt.")
@click.option("--output", type=COUNT, default=1024, show_default=True, metavar="N", help="Tokens of an answer.")
@click.option(
    "--drafts",
    type=click.IntRange(0, 3),
    default=0,
    show_default=True,
    metavar="N",
    help="Tokens that a draft head proposes a step.",
)
@click.option(
    "--prefill",
    metavar="N|auto",
    callback=lambda c, p, v: pool_option(v, p),
    help="Devices that read prompts while the others decode (disaggregated).  [default: all do both]",
)
@click.option("--queue", is_flag=True, help="Requests beyond the cache wait; without it they are refused.")
@click.option(
    "--tpot", metavar="TIME", callback=lambda c, p, v: seconds_option(v, p), help="Most time a token, as in 50ms."
)
@click.option(
    "--ttft",
    metavar="TIME",
    callback=lambda c, p, v: seconds_option(v, p),
    help="Most time to the first token, as in 2s.",
)
@click.option("--routing", metavar="FILE", help="How often experts are chosen, of `moec run --record-routing`.")
@click.option(
    "--copies", type=click.IntRange(min=0), default=0, metavar="N", help="Copies of hot experts over all ranks."
)
@click.option("--price", type=click.FloatRange(min=0, min_open=True), metavar="X", help="Of a device and hour.")
@click.option("-o", "--out", metavar="FILE", help="Write the plan as JSON, for `moec compile --plan FILE`.")
@click.option("--export", metavar="DIR", help="Write what vLLM, SGLang, llama.cpp ... take of the plan.")
@click.option("--html", "page", metavar="FILE", help="Write a page with plots; needs the extra `plots`.")
@json_option
@trust_option
@shared_options
def plan(
    source: str, on: str, as_json: bool, out: str | None, export: str | None, page: str | None, trust_remote_code: bool, **asked: Any
) -> None:  # fmt: skip
    """Say whether a model fits a system, and how fast it runs.

    SOURCE is a checkpoint folder (a config.json is enough), an artifact or a .moir file. Times are predicted, with the
    interval in which four of five measured rows lay; nothing is run.
    """
    check_source(source)
    from ..driver import plan as make_plan

    found = make_plan(source, on, trust_remote_code=trust_remote_code, **asked)
    if out is not None:
        write_text(json.dumps(found, indent=2) + "\n", out)
    if page is not None:
        from .plan_page import plan_page

        write_text(plan_page(found, plan_lines(found)), page)
    if export is not None:
        write_exports(found, source, export)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    if as_json or out == "-":
        return
    show_plan(found)


def write_exports(found: dict[str, Any], source: str, folder: str) -> None:
    """Write what engines take of a plan into a folder, and say which of them cannot follow it."""
    from ...targets.serving.exports import export_files

    files, notes = export_files(found, source)
    for name, text in {**files, "plan.json": json.dumps(found, indent=2) + "\n"}.items():
        write_text(text, f"{folder}/{name}")
    for note in notes:
        say(f"note: {note}")


def show_plan(found: dict[str, Any]) -> None:
    """Print a plan as a person reads it: fits or not, the division, the speed, what bounds it, what else there is."""
    from .table import make_table, print_parts, stdout_console

    rows = [
        (_degrees_text(row), str(row["batch"]), f"{row['ttft_ms']:.0f}", f"{row['tpot_ms']:.2f}", f"{row['tokens_per_s_per_device']:.1f}")
        for row in found["pareto"]
    ]  # fmt: skip
    columns = (
        ("division", False),
        ("batch", True),
        ("first token ms", True),
        ("ms a token", True),
        ("tokens/s a device", True),
    )
    table = [make_table(columns, rows)] if len(rows) > 1 else []
    print_parts(stdout_console(), *plan_lines(found), *table)


def plan_lines(found: dict[str, Any]) -> list[str]:
    """Return the lines of a plan that a person reads first."""
    memory, predicted, load = found["memory"], found["predicted"], found["load"]
    system, degrees, largest = found["system"], found["degrees"], found["largest"]
    waiting = load["batch"] - load["running"]
    return [
        "",
        f"{found['model']} on {system['name']}, {found['engine']}, weights {found['weights']}, cache {found['cache']}",
        "",
        _fits_text(found, memory, waiting),
        f"plan         {_degrees_text(degrees)}; {found['instances']} instance{'s' * (found['instances'] > 1)} on {system['devices']} device{'s' * (system['devices'] > 1)}",
        *([_prefill_text(found["prefill"])] if found["prefill"] else []),
        f"first token  {_interval_text(predicted, 'ttft_ms')} ms with {load['requests']} requests of {load['input']:,} tokens",
        f"each token   {_interval_text(predicted, 'tpot_ms')} ms, {_interval_text(predicted, 'tokens_per_s_per_user')} tokens/s for each user",
        f"a device     {_interval_text(predicted, 'tokens_per_s_per_device')} tokens/s",
        f"because      {_parts_text(found['parts_ms'])}",
        f"a token is   {_token_text(found)}",
        f"room for     {largest['batch']:,} requests of these lengths, or {largest['context']:,} tokens each",
        "",
    ]  # fmt: skip


def _prefill_text(pool: dict[str, Any]) -> str:
    busy = pool["requests_per_s"] / min(pool["prompts_per_s"], pool["transfers_per_s"])
    return (f"prompts      on {pool['devices']} more devices ({_degrees_text(pool['degrees'])}): {pool['prompt_ms']:.0f} ms each and "
            f"{pool['transfer_ms']:.3g} ms for its cache; busy {min(busy, 1.0):.0%}, {pool['bound']} bounds {pool['requests_per_s']:.3g} requests/s")  # fmt: skip


def _fits_text(found: dict[str, Any], memory: dict[str, int], waiting: int) -> str:
    from ..cost.report import bytes_text

    held = f"{bytes_text(memory['needed'])} of {bytes_text(memory['capacity'])} a device"
    parts = f"weights {bytes_text(memory['weights'])}, caches {bytes_text(memory['cache'])}"
    if placed := found["offload"]:
        beside = ", ".join(f"{placed[name]:.0%} {text}" for name, text in PLACES.items() if placed[name])
        return f"fits         with experts offloaded: {beside} ({bytes_text(placed['expert_bytes'])} in all)"
    if found["fits"]:
        return f"fits         {held}: {parts}"
    return f"fits in part {held}: {parts}; {waiting:,} requests wait"


def _degrees_text(degrees: dict[str, int]) -> str:
    return f"tp {degrees['tp']}, attention-dp {degrees['attention_dp']}, ep {degrees['ep']}, pp {degrees['pp']}"


def _interval_text(predicted: dict[str, Any], name: str) -> str:
    low, high = predicted[f"{name}_interval"]
    return f"{predicted[name]:.4g} ({low:.4g} to {high:.4g})"


def _token_text(found: dict[str, Any]) -> str:
    from ..cost.report import bytes_text, flops_text

    token, cost, placed = found["token"], found["cost"], found["experts"]
    parts = [bytes_text(int(token["bytes"])), flops_text(int(token["flops"]))]
    parts += [f"{token['weights_touched']:.0%} of the weights read in a step"]
    parts += [f"{token['joules']:.3g} J of the devices"] if token["joules"] else []
    parts += [f"{cost['per_million_tokens']:.3g} for a million"] if cost else []
    if placed and placed["physical_to_logical"]:
        parts += [
            f"the fullest rank has {placed['imbalance']:.2f} of the mean load ({placed['imbalance_in_order']:.2f} in order)"
        ]
    return ", ".join(parts)


def _parts_text(parts: dict[str, float]) -> str:
    total = sum(parts.values())
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {ms:.3g} ms" for name, ms in ordered if ms > 0.02 * total)
