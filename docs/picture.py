"""Draws README's picture from the tables of BENCHMARKS.md: speed beside others, and what bits a weight lose.

python docs/picture.py     (after pip install -e '.[plots]'; writes docs/speed.svg and docs/loss.svg)
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from moec.compiler.cli.svg import draw_svg

ROOT = Path(__file__).parent.parent
GREY = "#777777"  # of texts: it is read on light and dark pages
CONTENDERS = ("moec", "ONNX Runtime", "llama.cpp")
COLOURS = ("#c46210", "#8aa0b8", "#2a7f62")


def table_rows(text: str, first: str) -> list[dict[str, str]]:
    """Return the rows of the table whose head begins with a cell, each as cells by heading."""
    lines = text[text.index(f"| {first} |") :].partition("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def speeds(text: str) -> dict[str, list[float]]:
    """Return tokens a second by what was measured, in the order of the contenders."""
    rows = table_rows(text, "tokens/s")
    return {row["tokens/s"]: [float(row[name].split()[0]) for name in CONTENDERS] for row in rows}


def losses(text: str) -> list[tuple[str, float, float]]:
    """Return (what, bits a weight, KL) of each row."""
    first = "examples/tiny-moe, held-out text"
    return [(row[first], float(row["bits a weight"]), float(row["KL to float32"])) for row in table_rows(text, first)]


def draw_speeds(axes: Any, rows: dict[str, list[float]]) -> None:
    """Draw a group of bars for each row, with the numbers above them."""
    for k, (name, colour) in enumerate(zip(CONTENDERS, COLOURS, strict=True)):
        bars = axes.bar([i + 0.27 * (k - 1) for i in range(len(rows))], [r[k] for r in rows.values()], 0.25, label=name)
        for bar in bars:
            bar.set_color(colour)
        axes.bar_label(bars, fmt="%.4g", fontsize=6, color=GREY)
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [re.sub(r", | (?=behind|of)", "\n", name) for name in rows], fontsize=7)
    axes.set_ylabel("tokens/s")
    axes.legend(fontsize=7, frameon=False, ncols=3)


def draw_losses(axes: Any, rows: list[tuple[str, float, float]]) -> None:
    """Draw KL over bits a weight."""
    for label, colour in (("moec", COLOURS[0]), ("llama.cpp and its Q4_0", COLOURS[2])):
        points = [(bits, kl) for what, bits, kl in rows if what.startswith("moec") == (label == "moec")]
        axes.plot([b for b, _ in points], [kl for _, kl in points], "o", color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight (examples/tiny-moe, held-out text)")
    axes.set_ylabel("KL to float32")
    axes.legend(fontsize=7, frameon=False)


def main() -> None:
    """Write both pictures."""
    text = (ROOT / "BENCHMARKS.md").read_text("utf-8")
    for name, draw, rows in (("speed", draw_speeds, speeds(text)), ("loss", draw_losses, losses(text))):
        drawn = draw_svg(draw, rows).replace("currentColor", GREY)
        figures = f"<desc>{html.escape(json.dumps(rows))}</desc>"  # what was drawn, for readers that see no picture
        (ROOT / f"docs/{name}.svg").write_text(drawn.replace(">", f">{figures}", 1), "utf-8")


if __name__ == "__main__":
    main()
