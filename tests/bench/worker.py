"""What every contender's process does: load a model, answer requests to time it, say what memory it takes.

Standard library and numpy only, since each contender runs under the Python that has its packages. The process stays
alive between the rounds; whoever started it stops it (SIGSTOP) while another contender computes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CONTEXT = 1024  # slots of the key-value cache, where a contender fixes them and the command line does not say
WARM_TOKENS = 32  # generated before resident memory is read


class Model(Protocol):
    """A loaded language model. Prompts are token ids."""

    def prefill(self, prompt: Sequence[int]) -> float:
        """Return the seconds from an empty cache to the logits of the last token of the prompt."""

    def decode(self, prompt: Sequence[int], steps: int) -> float:
        """Return the seconds of `steps` greedy steps after the prompt, that of the prompt left out."""

    def fill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Evaluate prompts of one length and keep their cache; only the contenders of lengths.py can, as with `steps`."""

    def steps(self, tokens: Sequence[Sequence[int]]) -> float:
        """Take a step for each list of tokens, a token a sequence, behind what `fill` kept; return the seconds of all but
        the first step."""

    def facts(self) -> dict[str, Any]:
        """Return what the report should say: `weights_bytes` (the file) and others."""


def main(description: str | None, load: Callable[[Path, int], Model]) -> None:
    """Read the command line of a contender that takes a folder, and serve it; `load` gets the folder and the threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("source", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    vocabulary = json.loads((given.source / "config.json").read_text())["vocab_size"]
    serve(lambda: load(given.source, given.threads), vocabulary)


def serve(load: Callable[[], Model], vocabulary: int) -> None:
    """Load, report as one line of JSON, then answer requests on standard input, a line each, until it ends.

    A request is {"prefill": tokens} or {"decode": steps, "prompt": tokens}, or {"fill": past tokens, "batch": n} and then
    {"steps": steps, "batch": n} any number of times, all with a seed; the answer is {"seconds": x}.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to standard error
    sys.stdout = sys.stderr
    before = memory()
    start = time.perf_counter()
    model = load()
    loaded = time.perf_counter() - start
    model.decode(prompt(0, 16, vocabulary), WARM_TOKENS)
    facts = {"load_seconds": loaded, "before": before, "after": memory(), **model.facts()}
    print(json.dumps(facts), file=answers)
    for line in sys.stdin:
        print(json.dumps({"seconds": answer(model, json.loads(line), vocabulary)}), file=answers)


def answer(model: Model, request: dict[str, Any], vocabulary: int) -> float:
    """Do what a request asks for and return the seconds."""
    seed, start = request["seed"], time.perf_counter()
    rows = range(request.get("batch", 1))
    if "prefill" in request:
        return model.prefill(prompt(seed, request["prefill"], vocabulary))
    if "fill" in request:
        model.fill([prompt(seed + row, request["fill"], vocabulary) for row in rows])
        return time.perf_counter() - start
    if "steps" in request:
        columns = [prompt(seed + row, request["steps"], vocabulary) for row in rows]
        return model.steps(list(zip(*columns, strict=True)))
    return model.decode(prompt(seed, request["prompt"], vocabulary), request["decode"])


def prompt(seed: int, length: int, vocabulary: int) -> list[int]:
    """Return random tokens, the same for every contender."""
    return np.random.default_rng(seed).integers(3, vocabulary, length).tolist()


def memory() -> dict[str, int]:
    """Return bytes: `resident` (VmRSS), and of it `anonymous`, which no file backs. Linux only."""
    status = _kilobytes("/proc/self/status")
    return {"resident": status["VmRSS"], "anonymous": _kilobytes("/proc/self/smaps_rollup")["Anonymous"]}


def _kilobytes(path: str) -> dict[str, int]:
    pairs = (line.split() for line in Path(path).read_text().splitlines())
    return {p[0].rstrip(":"): int(p[1]) * 1024 for p in pairs if len(p) == 3 and p[2] == "kB"}
