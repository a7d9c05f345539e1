"""Plans models on every system that moec brings along, and measures how long a plan takes.

    python tests/bench/plans.py tests/configs/DeepSeek-V3 tests/configs/OLMoE-1B-7B-0924

For each model: the seconds of its import, those of the slowest plan with everything chosen, the milliseconds of one with degrees
given (of 500 in one process), the largest resident memory so far, and on which systems it fits, with tokens a second.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import moec
from moec.compiler.driver import import_workload
from moec.targets.systems.read import system_names

CALLS = 500


def plan_everywhere(folder):
    """Return (rows of a table, seconds of the slowest plan) of a model on every system."""
    rows, slowest = [], 0.0
    for name in system_names():
        start = time.perf_counter()
        try:
            found = moec.plan(folder, on=name)
            predicted, degrees = found["predicted"], found["degrees"]
            low, high = predicted["tokens_per_s_per_user_interval"]
            text = (f"{predicted['tokens_per_s_per_user']:.1f} ({low:.1f} to {high:.1f}) | {predicted['ttft_ms']:.0f} |"
                    f" {', '.join(f'{k} {v}' for k, v in degrees.items() if v > 1) or 'one device'}"
                    f"{', experts offloaded' if found['offload'] else ''}")  # fmt: skip
        except moec.MoecError as error:
            text = f"| | {error.what.split(':')[0]}"
        seconds = time.perf_counter() - start
        slowest = max(slowest, seconds)
        rows.append(f"| {name} | {text} |")
    return rows, slowest


def call_milliseconds(folder):
    """Return the milliseconds of a plan whose degrees are given, on average over calls with different loads."""
    asked = {"on": "nvidia-h200:8", "engine": "trtllm", "weights": "fp8", "tp": 8, "attention_dp": 1, "ep": 8, "pp": 1}
    start = time.perf_counter()
    for i in range(CALLS):
        moec.plan(folder, **asked, batch=1 + i % 64, input=512, output=512)
    return 1e3 * (time.perf_counter() - start) / CALLS


def main():
    """Print what was found of each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        start = time.perf_counter()
        import_workload(folder)
        imported = time.perf_counter() - start
        rows, slowest = plan_everywhere(folder)
        try:
            each = f"{call_milliseconds(folder):.2f} ms"
        except moec.MoecError as error:
            each = error.what
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(
            f"\n{folder.name}: import {imported:.1f} s, slowest plan {slowest:.2f} s, a plan with degrees {each}, {resident:.0f} MB\n"
        )
        print("| system | tokens/s of one user | first token, ms | division |\n| --- | --- | --- | --- |")
        print("\n".join(rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
