"""What a decode step of several tokens takes: what drafting tokens and checking them together has to earn.

    python tests/bench/several_tokens.py ARTIFACT --past 16,4096 --json out.json
    python tests/bench/several_tokens.py tests/configs/DeepSeek-V3

Steps of 1, 2, 3 and 4 new tokens of one sequence behind the same past, logits for all of them, random tokens; rounds that
begin with another number each, medians of the rounds' ratios to a step of one token. Beside it the ratio of the bytes, as the
program says: more tokens choose more experts. A drafted token is worth it if (1 + p) / (ratio + draft) is above 1, with p the
share of drafts that are right and `draft` the cost of making one, in steps of one token. Of a config alone the bytes are counted:
of steps of 2 to 5 tokens, and of a draft by one more layer like the last one and the head.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import moec
import numpy as np
from lengths import numbers
from moec.compiler.cli.report import open_source
from moec.compiler.cost.count import module_costs
from moec.compiler.runtime.generate import run_prefill
from process import busy

COUNTS = (1, 2, 3, 4)


def main() -> None:
    """Read the command line, measure, print a row for each past."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="or the folder of a config.json")
    parser.add_argument("--past", type=numbers, default=(16, 4096))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here")
    given = parser.parse_args()
    if not (given.artifact / "moec.json").is_file():
        print(counted_line(given.artifact))
        return
    session: Any = moec.Artifact.open(given.artifact).session(threads=given.threads)
    costs = module_costs(moec.load(given.artifact / "program.moir"))
    rows = [measured_past(session, costs, past, given.rounds, given.steps) for past in given.past]
    print("\n".join(map(line_of, rows)))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


def measured_past(session: Any, costs: Any, past: int, rounds: int, steps: int) -> dict[str, Any]:
    """Return milliseconds of a step by its number of tokens, and their ratios to one token, in time and in bytes."""
    generator = np.random.default_rng(past)
    ids = generator.integers(0, session.vocabulary, (1, past))
    filled = run_prefill(session, ids, np.ones_like(ids), np.arange(past)[None])[1]

    def step_seconds(count: int) -> float:
        states, start = filled, 0.0
        for number in range(steps + 1):
            if number == 1:  # the first step copies the caches
                start = time.perf_counter()
            begin = past + number * count
            tokens = generator.integers(0, session.vocabulary, (1, count))
            mask, positions = np.ones((1, begin + count), np.int64), (begin + np.arange(count))[None]
            _, states = session.step(tokens, mask, positions, states, last=count)
        return (time.perf_counter() - start) / steps

    found: dict[int, list[float]] = {count: [step_seconds(count)] for count in COUNTS}
    others = busy(0.5)
    for number in range(rounds):
        for count in COUNTS[number % 4 :] + COUNTS[: number % 4]:
            found[count].append(step_seconds(count))
    times = {count: seconds[1:] for count, seconds in found.items()}
    states = costs.step_bytes(1, past)[1]
    read = {count: costs.step_bytes(count, past)[0] + states for count in COUNTS}
    return {
        "past": past, "busy": others, "milliseconds": {count: median(times[count]) * 1e3 for count in COUNTS},
        "time": {count: median(a / b for a, b in zip(times[count], times[1], strict=True)) for count in COUNTS},
        "bytes": {count: read[count] / read[1] for count in COUNTS},
    }  # fmt: skip


def counted_line(folder: Path) -> str:
    """Return the bytes of steps of several tokens and of a draft, in those of a step of one token, as a line in Markdown."""
    costs = module_costs(open_source(folder).counted)
    one = costs.step_bytes(1, 0)[0]
    ratios = [costs.step_bytes(count, 0)[0] / one for count in (2, 3, 4, 5)]
    ends = [call.cost.compiled_bytes_read for call in costs.layers if call.function == "main"]
    last = [call.cost.compiled_bytes_read for call in costs.layers if call.function != "main"][-1]
    draft = (last + sum(ends)) / one
    cells = (*(f"{ratio:.2f}" for ratio in ratios), f"{draft:.2f}", f"{ratios[0] + draft - 1:.0%}")
    return f"| {folder.name} | " + " | ".join(cells) + " |"


def line_of(row: dict[str, Any]) -> str:
    """Return a row as a line of a table in Markdown."""
    ratios = (f"{row['time'][count]:.2f} ({row['bytes'][count]:.2f})" for count in COUNTS[1:])
    return f"| {row['past']} | {row['milliseconds'][1]:.1f} | " + " | ".join(ratios) + " |"


if __name__ == "__main__":
    main()
