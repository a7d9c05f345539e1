"""Compare moec with llama.cpp, transformers' ONNX exporter and torch eager on the OLMoE-shaped checkpoint.

    python tests/bench/compare.py --work DIR --layers 4 --llama-python llama/bin/python \\
        --exporter-python exporter/bin/python --json DIR/result.json --markdown DIR/result.md

The pythons are virtual environments with a contender's packages; llama.py and exporter.py say how to make them. A
contender without one, or named by --skip, is left out. The rest runs under this python, which has moec.

What is measured, and how:

- build: wall clock and peak resident memory of whole processes. moec compiles anew in every run of this script; GGUF
  conversion, quantization and ONNX export are kept in DIR, with what they cost when they were made (--rebuild).
- a contender's process loads once, generates 32 tokens, reports load time (files in the page cache, imports not
  counted) and resident memory, and stays alive. While one is asked, all others are stopped (SIGSTOP).
- a round asks every contender in turn, beginning with another one each round: a few steps and a prefill to warm up,
  then prefill and decode, batch 1. Figures are medians over the rounds; a ratio is the median of the rounds' ratios.
- before every turn the script looks half a second at what other processes compute: the machine should be idle.
- the streaming read bandwidth is measured at the start of every round (bandwidth.py), all contenders stopped.
- quality: quality.py, on examples/tiny-moe.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import report
from process import Contender, Cost, busy, measured, moec_compile, remembered

HERE = Path(__file__).resolve().parent
SLOW_STEPS = 16  # decode steps of contenders that take a large part of a second for one
Build = dict[str, Cost]


@dataclass(frozen=True)
class Plan:
    """How a contender is built and started: the costs by step, the command that serves, its decode steps."""

    build: Callable[[], Build]
    command: list[str | Path]
    steps: int


def main() -> None:
    """Read the command line, measure, write the results."""
    given = arguments()
    work: Path = given.work
    checkpoint = work / f"olmoe-{given.layers}"
    say = partial(print, file=sys.stderr, flush=True)
    say(f"checkpoint: {checkpoint}")
    measured(
        [sys.executable, HERE / "checkpoint.py", checkpoint, "--layers", str(given.layers)], work / "checkpoint.log"
    )
    found: dict[str, dict[str, Any]] = {}
    running: dict[str, tuple[Contender, int]] = {}
    try:
        for name, plan in plans(given, checkpoint).items():
            say(f"{name}: build")
            found[name] = {"build": {step: asdict(cost) for step, cost in plan.build().items()}}
        for name, plan in plans(given, checkpoint).items():
            say(f"{name}: load")
            environment = {"OMP_NUM_THREADS": str(given.threads)}
            contender = Contender([*plan.command, "--threads", str(given.threads)], work / f"{name}.log", environment)
            running[name] = contender, plan.steps
            found[name] |= contender.facts
        rounds = [one_round(number, running, given, say) for number in range(given.runs)]
    finally:
        for contender, _ in running.values():
            contender.close()
    settings = {key: getattr(given, key) for key in ("layers", "threads", "runs", "prompt", "steps", "compile")}
    result = report.summarize(settings, found, rounds)
    if "quality" not in given.skip:
        say("quality")
        result["quality"] = quality(given)
    report.show(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    if given.markdown:
        report.write_markdown(result, given.markdown)


def arguments() -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints, artifacts and logs")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="of every contender (default 2)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill, at most 512 (default 512)")
    parser.add_argument("--steps", type=int, default=128, help="decode steps after 16 tokens (default 128)")
    parser.add_argument("--compile", default="--quantize int4", help="options of moec compile (default %(default)s)")
    parser.add_argument(
        "--quality", action="append", default=[], metavar="OPTIONS", help="other options of moec compile to judge"
    )
    parser.add_argument("--llama-python", type=Path, help="a python with llama_cpp and gguf")
    parser.add_argument("--exporter-python", type=Path, help="a python with transformers and onnxscript")
    parser.add_argument("--exporter-layers", type=int, help="layers that the exporter exports (default: all)")
    parser.add_argument("--exporter-experts", help="its implementation of the experts (default: transformers' choice)")
    parser.add_argument("--skip", default="", help="of llama.cpp, exporter, eager, moec, quality; with commas")
    parser.add_argument("--rebuild", action="store_true", help="build all contenders anew")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--markdown", type=Path, help="write the tables here, after its line '## The last run' if it has one"
    )
    given = parser.parse_args()
    given.skip = set(filter(None, given.skip.split(",")))
    unknown = given.skip - {"llama.cpp", "exporter", "eager", "moec", "quality"}
    if unknown or not 0 < given.prompt <= 512 or given.runs < 1 or given.steps < 1:
        parser.error(f"--skip does not know {', '.join(unknown)}" if unknown else "a number is out of range")
    given.work.mkdir(parents=True, exist_ok=True)
    return given


def plans(given: argparse.Namespace, checkpoint: Path) -> dict[str, Plan]:
    """Return the contenders that take part; each builds its own files in the work folder."""
    logs = given.work / f"build-{given.layers}"
    artifact, exported = (
        given.work / f"moec-{given.layers}",
        given.work / f"exporter-{given.exporter_layers or given.layers}-{given.exporter_experts or 'default'}",
    )
    bf16, q4_0 = (given.work / f"olmoe-{given.layers}-{kind}.gguf" for kind in ("bf16", "q4_0"))
    make = partial(_make, given)

    def build_moec() -> Build:
        return {"compile": measured(moec_compile(checkpoint, artifact, given.compile), logs / "moec.log")}

    def build_llama() -> Build:
        script = [given.llama_python, HERE / "llama.py"]
        threads = ["--threads", str(given.threads)]
        return {
            "convert": make([*script, "convert", checkpoint, bf16], logs / "llama-convert.log", bf16),
            "quantize": make([*script, "quantize", bf16, q4_0, *threads], logs / "llama-quantize.log", q4_0),
        }

    def build_exporter() -> Build:
        layers = ["--layers", str(given.exporter_layers or given.layers)]
        experts = ["--experts", given.exporter_experts] if given.exporter_experts else []
        command = [given.exporter_python, HERE / "exporter.py", "export", checkpoint, exported, *layers, *experts]
        return {"export": make(command, given.work / f"{exported.name}.log", exported / "export.done")}

    found = {
        "moec": Plan(build_moec, [sys.executable, HERE / "compiled.py", artifact], given.steps),
        "llama.cpp": Plan(build_llama, [given.llama_python, HERE / "llama.py", "serve", q4_0], given.steps),
        "exporter": Plan(build_exporter, [given.exporter_python, HERE / "exporter.py", "serve", exported], SLOW_STEPS),
        "eager": Plan(dict, [sys.executable, HERE / "eager.py", checkpoint], 4 * SLOW_STEPS),
    }
    absent = {name for name, plan in found.items() if plan.command[0] is None}
    return {name: plan for name, plan in found.items() if name not in given.skip | absent}


def _make(given: argparse.Namespace, command: list[str | Path], log: Path, made: Path) -> Cost:
    if given.rebuild:
        log.with_suffix(".json").unlink(missing_ok=True)
    return remembered(command, log, made)


def one_round(
    number: int, running: dict[str, tuple[Contender, int]], given: argparse.Namespace, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the bandwidth, then every contender once; return bytes and tokens a second."""
    seed = 1 + number
    command = [sys.executable, HERE / "bandwidth.py", "--threads", str(given.threads)]
    log = given.work / "bandwidth.log"
    measured(command, log)
    tries = json.loads(log.read_text())
    result: dict[str, Any] = {"bandwidth": tries, "busy": []}
    names = list(running)
    for name in names[number % len(names) :] + names[: number % len(names)]:
        contender, steps = running[name]
        result["busy"].append(busy(0.5))
        contender.ask(decode=8 if steps == given.steps else 1, prompt=16, seed=0)
        contender.ask(prefill=given.prompt, seed=0)
        prefill = contender.ask(prefill=given.prompt, seed=seed)
        decode = contender.ask(decode=steps, prompt=16, seed=seed)
        result[name] = {"prefill": given.prompt / prefill, "decode": steps / decode}
        say(f"round {number + 1}: {name}: decode {steps / decode:.1f}, prefill {given.prompt / prefill:.0f} tokens/s")
    return result


def quality(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of quality.py, for what was compiled."""
    out = given.work / "quality.json"
    command = [sys.executable, HERE / "quality.py", "--work", given.work / "quality", "--json", out]
    for options in (given.compile, *given.quality):
        command.append(f"--compile={options}")
    if given.llama_python:
        command += ["--llama-python", given.llama_python]
    measured(command, given.work / "quality.log")
    return json.loads(out.read_text())


if __name__ == "__main__":
    main()
