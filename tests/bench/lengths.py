"""Compare decode by past tokens and by batch, and prefill, of moec with and without its kernels, llama.cpp and ik_llama.cpp.

    python tests/bench/lengths.py --work DIR --layers 4 --llama-python llama/bin/python --ik ik_llama.cpp/build/bin \\
        --past 16,1024,4096,16384 --batch 1,4,8,16 --json DIR/lengths.json --markdown DIR/lengths.md

The checkpoint is that of compare.py, and so are the processes: one a contender, stopped while another is asked. llama.cpp has
Q4_0 weights, a cache in float16 and flash attention (--no-flash: without it too). Points: a prefill; decode behind each number of past tokens, batch 1;
decode of each batch behind 16 tokens. For each point every contender computes its past once, then rounds ask all of them in
turn, beginning with another one each round; later steps go on from the same past. Tokens are random, the same for all.
Figures are medians over the rounds, ratios the medians of the rounds' ratios to llama.cpp. Before every round the streaming
read is measured, and half a second what other processes compute.

A contender without its programs is left out: --llama-python, --ik. That of ik_llama.cpp is asked in rounds of its own process
(batched_bench.py), at most --ik-runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import report
from bandwidth import measure
from batched_bench import program_in, timed_rows
from process import Contender, busy, measured, moec_compile, remembered

HERE = Path(__file__).resolve().parent
MOEC = {
    "moec": "--quantize int4 -D kernels=moec",
    "ONNX Runtime": "--quantize int4 -D kernels=onnxruntime",
}
LLAMA, NO_FLASH, IK = report.BASELINE, "llama.cpp, no flash", "ik_llama.cpp"
SHORT = 16  # past tokens of batches
HEADING = "## By past tokens and batch\n"

Point = tuple[str, int, int]  # prefill or decode, tokens of the prompt, batch


def main() -> None:
    """Read the command line, measure, write the results."""
    given = arguments()
    say = partial(print, file=sys.stderr, flush=True)
    points = points_of(given)
    running = start(given, points, say)
    try:
        facts = {name: contender.facts for name, contender in running.items()}
        rows = [row for point in points for row in [measured_point(given, point, running, say)]]
    finally:
        for contender in running.values():
            contender.close()
    settings = {name: getattr(given, name) for name in ("layers", "threads", "runs", "steps")}
    result = {"settings": settings, "machine": report.machine(), "facts": facts, "points": rows}
    text = markdown(result)
    print(text)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    if given.markdown:
        report.write_section(given.markdown, HEADING, text)


def arguments() -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints, artifacts and logs")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="of every contender (default 2)")
    parser.add_argument("--runs", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--steps", type=int, default=64, help="decode steps of a round (default 64)")
    parser.add_argument("--prompt", type=numbers, default=(512,), help="tokens of the prefills (default 512)")
    parser.add_argument("--past", type=numbers, default=(16, 1024, 4096, 16384), help="(default 16,1024,4096,16384)")
    parser.add_argument("--batch", type=numbers, default=(4, 8, 16), help="behind 16 tokens (default 4,8,16)")
    parser.add_argument("--llama-python", type=Path, help="a python with llama_cpp and gguf, see llama.py")
    parser.add_argument("--no-flash", action="store_true", help="llama.cpp without flash attention as well")
    parser.add_argument("--ik", type=Path, help="the folder with the programs of ik_llama.cpp")
    parser.add_argument("--ik-runs", type=int, default=2, help="its rounds, each of which loads the model (default 2)")
    parser.add_argument("--keep", action="store_true", help="take the artifacts of the run before")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--markdown", type=Path, help=f"write the table here, below its line {HEADING.strip()!r}")
    given = parser.parse_args()
    if min(given.threads, given.runs, given.steps, given.ik_runs) < 1:
        parser.error("a number is below 1")
    if given.ik and not given.llama_python:
        parser.error("--ik needs --llama-python, which writes its model")
    if given.ik:
        program_in(given.ik)
    given.work.mkdir(parents=True, exist_ok=True)
    return given


def numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list with commas; none for an empty text."""
    found = tuple(map(int, filter(None, text.split(","))))
    if any(n < 1 for n in found):
        raise argparse.ArgumentTypeError("a number is below 1")
    return found


def points_of(given: argparse.Namespace) -> list[Point]:
    """Return what is measured."""
    decode = dict.fromkeys([*((past, 1) for past in given.past), *((SHORT, batch) for batch in given.batch)])
    return [*(("prefill", n, 1) for n in given.prompt), *(("decode", past, batch) for past, batch in decode)]


def start(given: argparse.Namespace, points: Sequence[Point], say: Callable[[str], None]) -> dict[str, Contender]:
    """Build the contenders and start their processes."""
    work, logs = given.work, given.work / f"lengths-{given.layers}"
    checkpoint = work / f"olmoe-{given.layers}"
    command = [sys.executable, HERE / "checkpoint.py", checkpoint, "--layers", str(given.layers)]
    measured(command, work / "checkpoint.log")
    threads = ["--threads", str(given.threads)]
    commands: dict[str, list[str | Path]] = {}
    for name, options in MOEC.items():
        artifact = work / f"lengths-{given.layers}-{name.split()[0].lower()}"
        if not (given.keep and artifact.is_dir()):
            say(f"{name}: build")
            measured(moec_compile(checkpoint, artifact, options), logs / f"{artifact.name}.log")
        commands[name] = [sys.executable, HERE / "compiled.py", artifact]
    if given.llama_python:
        say(f"{LLAMA}: build")
        slots = max(batch * (tokens + given.steps + 2) for _, tokens, batch in points)
        room = ["--context", str(slots), "--sequences", str(max(batch for *_, batch in points))]
        file = gguf_of(given, checkpoint, "olmoe")
        served = [given.llama_python, HERE / "llama.py", "serve", file, *room]
        commands |= {LLAMA: [*served, "--flash"], **({NO_FLASH: served} if given.no_flash else {})}
    running = {}
    for name, command in commands.items():
        say(f"{name}: load")
        log = logs / f"{name.replace(' ', '-')}.log"
        running[name] = Contender([*command, *threads], log, {"OMP_NUM_THREADS": str(given.threads)})
    return running


def gguf_of(given: argparse.Namespace, checkpoint: Path, architecture: str) -> Path:
    """Return the Q4_0 file of the checkpoint for an architecture, made unless an earlier run did."""
    files = [given.work / f"{architecture}-{given.layers}-{kind}.gguf" for kind in ("bf16", "q4_0")]
    script = [given.llama_python, HERE / "llama.py"]
    logs = given.work / f"lengths-{given.layers}"
    steps = ("convert", checkpoint, "--architecture"), ("quantize", files[0], "--architecture")
    for (step, source, option), file in zip(steps, files, strict=True):
        remembered([*script, step, source, file, option, architecture], logs / f"{architecture}-{step}.log", file)
    return files[1]


# --- one point -----------------------------------------------------------------------------------------------------


def measured_point(
    given: argparse.Namespace, point: Point, running: dict[str, Contender], say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the rates of a point: tokens a second of all sequences together, by contender, a number a round."""
    kind, tokens, batch = point
    rates: dict[str, list[float]] = {name: [] for name in running}
    streams, others = [], []
    for contender in running.values():
        if kind == "prefill":
            contender.ask(prefill=tokens, seed=0)
        else:
            contender.ask(fill=tokens, batch=batch, seed=0)
    say(f"{kind} {tokens} batch {batch}: filled")
    for number in range(given.runs):
        names = list(running)
        streams.append(measure(given.threads))
        for name in names[number % len(names) :] + names[: number % len(names)]:
            others.append(busy(0.5))
            rates[name].append(rate_of(given, point, running[name], number))
    if given.ik:
        file = gguf_of(given, given.work / f"olmoe-{given.layers}", "qwen3moe")
        rates[IK] = [ik_rate(given, point, file) for _ in range(given.ik_runs)]
    row = {"kind": kind, "tokens": tokens, "batch": batch, "stream": report.spread(streams), "busy": max(others)}
    row |= {"rates": {name: report.spread(found) for name, found in rates.items()}}
    if LLAMA in running:
        row["ratios"] = {
            name: median(a / b for a, b in zip(found, rates[LLAMA], strict=False)) for name, found in rates.items()
        }
    say(f"{kind} {tokens} batch {batch}: " + ", ".join(f"{n} {median(r):.1f}" for n, r in rates.items()))
    return row


def rate_of(given: argparse.Namespace, point: Point, contender: Contender, number: int) -> float:
    """Return the tokens a second of one contender in one round."""
    kind, tokens, batch = point
    if kind == "prefill":
        return tokens / contender.ask(prefill=tokens, seed=1 + number)
    # the first step is not timed: a contender may copy its caches in it
    return batch * given.steps / contender.ask(steps=given.steps + 1, batch=batch, seed=100 * (1 + number))


def ik_rate(given: argparse.Namespace, point: Point, file: Path) -> float:
    """Return the tokens a second of ik_llama.cpp, in a process of its own."""
    kind, tokens, batch = point
    prompt, steps = timed_rows(program_in(given.ik), file, tokens, (batch,), given.steps, given.threads)[batch]
    return batch * tokens / prompt if kind == "prefill" else batch * given.steps / steps


# --- the table -----------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """Return the table, and what a reader has to know beside it."""
    points, s = result["points"], result["settings"]
    names = list(points[0]["rates"])
    based = LLAMA in names
    headings = ["tokens/s", *names, *(f"{name} / {LLAMA}" for name in names if based and name != LLAMA), "stream GB/s"]
    lines = [headings, ["---"] * len(headings)]
    for p in points:
        what = f"{p['kind']} {'behind ' if p['kind'] == 'decode' else 'of '}{p['tokens']}"
        cells = [what + (f", batch {p['batch']}" if p["batch"] > 1 else "")]
        digits = 0 if p["kind"] == "prefill" else 1
        for name in names:
            low, middle, high = (f"{p['rates'][name][key]:.{digits}f}" for key in ("min", "median", "max"))
            cells.append(f"{middle} ({low} to {high})")
        cells += [f"{p['ratios'][name]:.2f}" for name in names if based and name != LLAMA]
        lines.append([*cells, f"{p['stream']['median'] / 1e9:.1f}"])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    m = result["machine"]
    notes = (
        f"{m['processor']} (family {m['family']}; {', '.join(m['instructions'])}), {m['cores']} cores; {s['layers']} layers, "
        f"{s['threads']} threads; {s['runs']} rounds of {s['steps']} steps, medians (smallest to largest). Other processes "
        f"used at most {max(p['busy'] for p in points):.2f} cores between the contenders' turns."
    )
    how = "Decode of several sequences: tokens a second of all together. llama.cpp: Q4_0, cache in float16, flash attention."
    return f"{table}\n\n{notes}\n\n{how}\n"


if __name__ == "__main__":
    main()
