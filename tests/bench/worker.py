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

CONTEXT = 1024  # slots of the key-value cache, where a contender fixes them
WARM_TOKENS = 32  # generated before resident memory is read


class Model(Protocol):
    """A loaded language model, batch 1. Prompts are token ids."""

    def prefill(self, prompt: Sequence[int]) -> float:
        """Return the seconds from an empty cache to the logits of the last token of the prompt."""

    def decode(self, prompt: Sequence[int], steps: int) -> float:
        """Return the seconds of `steps` greedy steps after the prompt, that of the prompt left out."""

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

    A request is {"prefill": tokens} or {"decode": steps, "prompt": tokens}, with a seed; the answer {"seconds": x}.
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
        request = json.loads(line)
        if "prefill" in request:
            seconds = model.prefill(prompt(request["seed"], request["prefill"], vocabulary))
        else:
            seconds = model.decode(prompt(request["seed"], request["prompt"], vocabulary), request["decode"])
        print(json.dumps({"seconds": seconds}), file=answers)


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
