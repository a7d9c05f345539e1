"""The results of compare.py: medians and ratios, the machine's description, a table for the terminal and for a file."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

BASELINE = "llama.cpp"
LAST_RUN = "## The last run\n"
PACKAGES = ("moec", "onnxruntime", "torch", "transformers", "numpy")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")
HEADINGS = (
    "", "decode tokens/s", "of llama.cpp", "prefill tokens/s", "of llama.cpp", "MB per token", "of the bandwidth",
    "build s", "build peak GB", "weights GB", "load s", "resident GB", "resident / weights",
)  # fmt: skip


def summarize(settings: dict[str, Any], found: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return everything that was measured. Rates in tokens and bytes a second, sizes in bytes, times in seconds."""
    tries = [rate for one in rounds for rate in one["bandwidth"]]
    bandwidth = spread(tries)
    contenders = {}
    for name, facts in found.items():
        row = dict(facts)
        for kind in ("decode", "prefill"):
            row[kind] = spread([one[name][kind] for one in rounds])
            if BASELINE in found:
                row[kind]["ratio"] = median(one[name][kind] / one[BASELINE][kind] for one in rounds)
        if "bytes_per_token" in facts:
            row["bandwidth_share"] = facts["bytes_per_token"] * row["decode"]["median"] / bandwidth["median"]
        row["resident_per_weights"] = facts["after"]["resident"] / facts["weights_bytes"]
        contenders[name] = row
    disturbed = max(cores for one in rounds for cores in one["busy"])
    return {
        "settings": settings, "machine": machine(), "bandwidth": bandwidth, "busy_cores": disturbed,
        "contenders": contenders,
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median, the extremes and all values."""
    return {"median": median(values), "min": min(values), "max": max(values), "all": list(values)}


def machine() -> dict[str, Any]:
    """Return what runs the benchmark. Linux only."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    cpu = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "processor": cpu.get("model name", platform.machine()),
        "family": f"{cpu.get('cpu family', '?')}, model {cpu.get('model', '?')}",
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(total.split()[1]) * 1024,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the table, a row for each contender."""
    return [[name, *_cells(row)] for name, row in result["contenders"].items()]


def _cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for kind, digits in (("decode", 1), ("prefill", 0)):
        low, middle, high = (f"{row[kind][key]:.{digits}f}" for key in ("min", "median", "max"))
        cells += [f"{middle} ({low} to {high})", f"{row[kind]['ratio']:.2f}" if "ratio" in row[kind] else "-"]
    read, share = row.get("bytes_per_token"), row.get("bandwidth_share")
    cells += [f"{read / 1e6:.1f}" if read else "-", f"{share:.0%}" if share else "-"]
    build = row["build"]
    cells.append(" + ".join(f"{cost['seconds']:.1f}" for cost in build.values()) or "-")
    cells.append(f"{max(c['peak_bytes'] for c in build.values()) / 1e9:.2f}" if build else "-")
    sizes = (row["weights_bytes"] / 1e9, row["load_seconds"], row["after"]["resident"] / 1e9)
    return [*cells, *(f"{n:.2f}" for n in sizes), f"{row['resident_per_weights']:.2f}"]


def notes(result: dict[str, Any]) -> list[str]:
    """Return what a reader has to know beside the table."""
    m, b, s = result["machine"], result["bandwidth"], result["settings"]
    packages = ", ".join(f"{name} {number}" for name, number in m["packages"].items())
    found = [
        f"{m['processor']} (family {m['family']}; {', '.join(m['instructions'])}), {m['cores']} cores, "
        f"{m['memory_bytes'] / 1e9:.0f} GB, {m['system']}, Python {m['python']}, {packages}.",
        f"{s['layers']} layers, batch 1, {s['threads']} threads; {s['runs']} rounds, medians (smallest to largest); prefill "
        f"of {s['prompt']} tokens, decode of {s['steps']} tokens after 16; moec compile {s['compile']}.",
        f"Streaming read bandwidth in the same rounds: {b['median'] / 1e9:.1f} GB/s median "
        f"({b['min'] / 1e9:.1f} to {b['max'] / 1e9:.1f}); shares are of the median. "
        f"Other processes used at most {result['busy_cores']:.2f} cores between the turns.",
    ]
    contenders = result["contenders"]
    if "llama.cpp" in contenders:
        kinds = ", ".join(f"{role} {kind}" for role, kind in contenders["llama.cpp"]["types"].items() if kind != "Q4_0")
        found.append(f"llama.cpp {contenders['llama.cpp']['version']}, Q4_0 but for {kinds}.")
    if "exporter" in contenders:
        made = contenders["exporter"]
        found.append(f"exporter: float32, {made['layers']} layers, experts {made['experts']}.")
    if "eager" in contenders:
        eager = contenders["eager"]
        found.append(f"eager: experts {eager['experts']}, attention {eager['attention']}.")
    return found


def show(result: dict[str, Any]) -> None:
    """Print the tables: a column for each contender, so that they fit a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", *result["contenders"])
    for cells in list(zip(HEADINGS, *rows(result), strict=True))[1:]:
        table.add_row(*cells)
    console.print(table)
    for note in notes(result):
        console.print(note, highlight=False)
    if "quality" in result:
        table = Table(*QUALITY)
        for cells in quality_rows(result):
            table.add_row(*cells)
        console.print(table)


QUALITY = ("examples/tiny-moe, held-out text", "KL to float32", "top-1 agreement", "perplexity ratio", "bits a weight")


def quality_rows(result: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the table of quality."""
    return [
        [q["name"], f"{q['kl_mean']:.5f}", f"{q['top1']:.2%}", f"{q['perplexity_ratio']:.4f}", f"{q['bits']:.2f}"]
        for q in result["quality"]
    ]


def markdown(result: dict[str, Any]) -> str:
    """Return the tables and notes as Markdown."""
    text = [_table(HEADINGS, rows(result)), *notes(result)]
    if "quality" in result:
        text.append(_table(QUALITY, quality_rows(result)))
    return "\n\n".join(text) + "\n"


def write_markdown(result: dict[str, Any], path: Path) -> None:
    """Write the tables and notes into a file, below the line LAST_RUN if it has one."""
    write_section(path, LAST_RUN, markdown(result))


def write_section(path: Path, heading: str, text: str) -> None:
    """Write a text below a heading of a file, up to the next heading; a file without it holds nothing else then."""
    before, mark, after = path.read_text().partition(heading) if path.is_file() else ("", "", "")
    following = after.find("\n## ")
    path.write_text((f"{before}{mark}\n" if mark else "") + text + (after[following:] if following >= 0 else ""))


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
