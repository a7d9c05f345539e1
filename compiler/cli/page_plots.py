"""The plots of `moec inspect --html`: precision by weight and layer, sensitivity, experts, and the roofline."""

from __future__ import annotations

from typing import Any


def draw_table(axes: Any, table: dict[str, Any]) -> None:
    """Draw numbers by row and column as colours, with a bar that says what they are; None is left open."""
    cells = [[float("nan") if value is None else value for value in row] for row in table["cells"]]
    first = table["first"]  # the number of the first column; -1 is what stands outside of the layers
    extent = (first - 0.5, first + len(cells[0]) - 0.5, len(cells) - 0.5, -0.5)
    image = axes.imshow(cells, aspect="auto", interpolation="nearest", cmap="viridis", extent=extent)
    axes.figure.colorbar(image, ax=axes, label=table["label"])
    axes.set_xlabel(table["across"])
    axes.locator_params(axis="x", integer=True)
    if table["rows"] is None:
        axes.set_ylabel(table["down"])
        axes.locator_params(axis="y", integer=True)
    else:
        axes.set_yticks(range(len(table["rows"])), table["rows"], fontsize=7)


def draw_memory(axes: Any, parts: dict[str, int]) -> None:
    """Draw bytes by what they are for, one bar each."""
    names = list(parts)[::-1]
    axes.barh(names, [parts[name] / 1e6 for name in names], color="#4878a8")
    axes.set_xlabel("MB")


def draw_passes(axes: Any, steps: list[Any]) -> None:
    """Draw the passes on a line of time; those that changed nothing are pale."""
    start = 0.0
    for row, step in enumerate(steps):
        axes.barh([row], [step.seconds], left=start, color="#4878a8", alpha=1 if step.changed else 0.35)
        start += step.seconds
    axes.set_yticks(range(len(steps)), [step.name for step in steps], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")


def draw_roofline(axes: Any, data: dict[str, Any]) -> None:
    """Draw ops by the FLOPs for each byte: under a chip's roofs where times are known, else by their FLOPs."""
    for part, points in sorted(data["points"].items()):
        axes.plot([x for x, _ in points], [y for _, y in points], "o", markersize=4, alpha=0.8, label=part)
    xs = [2.0**k for k in range(-6, 14)]
    for name, (rate, bandwidth) in data["roofs"].items():
        axes.plot(xs, [min(rate, x * bandwidth) for x in xs], label=name, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs for each byte that is moved")
    axes.set_ylabel(data["label"])
    axes.legend(fontsize=7, frameon=False)
