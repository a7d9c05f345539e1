"""Compile a checkpoint of DeepSeek-V4-Flash's width beside the OLMoE-shaped one: seconds per GB, peak memory.

    python tests/bench/scale.py --work DIR --runs 3 --json DIR/scale.json

Makes both checkpoints (checkpoint.py, checkpoint_v4.py: 3.8 and 12.8 GB), compiles them in turns with --quantize int4 and
prints a table in Markdown; with --keep also the larger one as it is compiled by default, with the codes of the checkpoint
in 8 bits. An artifact is removed before the next one is made: 30 GB of disk are enough, 45 GB with --keep. Sizes are those
of the tensor files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from process import Cost, busy, measured, moec_compile

HERE = Path(__file__).parent
INT4, KEEP = "--quantize int4", "--quantize keep"
HEADINGS = ("checkpoint", "GB", "moec compile", "s", "s / GB", "CPU s / GB", "peak GB", "artifact GB")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for checkpoints, artifacts and logs")
    parser.add_argument("--layers", type=int, default=3, help="of the V4 checkpoint (default 3)")
    parser.add_argument("--runs", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--keep", action="store_true", help="also compile V4 with --quantize keep, the default")
    parser.add_argument("--json", type=Path, help="write the results here")
    given = parser.parse_args()
    sources = {"OLMoE": given.work / "olmoe-4", "V4-Flash": given.work / f"v4-{given.layers}"}
    scripts = {"OLMoE": ["checkpoint.py"], "V4-Flash": ["checkpoint_v4.py", "--layers", str(given.layers)]}
    for name, (script, *options) in scripts.items():  # in processes of their own, for what they hold, see process.py
        measured([sys.executable, HERE / script, sources[name], *options], given.work / "checkpoint.log")
    others: list[float] = []
    plan = [(name, INT4) for _ in range(given.runs) for name in sources] + [("V4-Flash", KEEP)] * given.keep
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, options in plan:
        others.append(busy(1.0))
        cost, made = compiled(sources[name], given.work / "scale-artifact", options, given.work / "scale.log")
        print(f"{name} {options}: {cost.seconds:.1f} s, peak {cost.peak_bytes / 1e9:.2f} GB", flush=True)
        found.setdefault((name, options), []).append({**asdict(cost), "artifact_bytes": made})
    rows = [summary(name, size_of(sources[name]), options, costs) for (name, options), costs in found.items()]
    ratio = rows[1]["seconds_per_gb"] / rows[0]["seconds_per_gb"]
    print("\n" + table(rows))
    print(f"\nTime per GB of V4-Flash over that of OLMoE: {ratio:.2f}. Others used up to {max(others):.2f} cores.")
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "ratio": ratio, "busy_cores": others}, indent=2) + "\n")


def compiled(source: Path, out: Path, options: str, log: Path) -> tuple[Cost, int]:
    """Compile, and return the cost and the bytes of the artifact, which is removed."""
    shutil.rmtree(out, ignore_errors=True)
    cost = measured(moec_compile(source, out, options), log)
    made = sum(file.stat().st_size for file in out.iterdir())
    shutil.rmtree(out)
    return cost, made


def size_of(folder: Path) -> int:
    """Return the bytes of a checkpoint's tensor files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def summary(name: str, size: int, options: str, costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of what the rounds took, and all of it."""
    seconds = sorted(cost["seconds"] for cost in costs)
    return {
        "checkpoint": name, "bytes": size, "options": options, "seconds": median(seconds), "all_seconds": seconds,
        "seconds_per_gb": median(seconds) / size * 1e9,
        "cpu_seconds_per_gb": median(cost["cpu_seconds"] for cost in costs) / size * 1e9,
        "peak_bytes": max(cost["peak_bytes"] for cost in costs), "artifact_bytes": costs[0]["artifact_bytes"],
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS)]
    for row in rows:
        low, high = row["all_seconds"][0], row["all_seconds"][-1]
        spread = f" ({low:.1f} to {high:.1f})" if len(row["all_seconds"]) > 1 else ""
        lines.append([
            row["checkpoint"], f"{row['bytes'] / 1e9:.2f}", f"`{row['options']}`", f"{row['seconds']:.1f}{spread}",
            f"{row['seconds_per_gb']:.2f}", f"{row['cpu_seconds_per_gb']:.2f}", f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['artifact_bytes'] / 1e9:.2f}",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
