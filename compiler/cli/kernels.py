"""How `moec inspect` shows the kernels of an accelerator's artifact, from its kernels.json."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..cost.report import bytes_text, flops_text
from .predicted import time_text
from .table import make_table, print_parts, stdout_console


def show_kernels(found: dict[str, Any]) -> None:
    """Print a line for each kernel: what it computes, its tile, memory and prediction, and what a compiler made of it."""
    rows = [_kernel_row(kernel) for kernel in found["kernels"]]
    framework = ", ".join(f"{row['op']} ({row['calls']})" for row in found["framework"])
    steps = ", ".join(f"{tokens}: {time_text(time)}" for tokens, time in found["predicted"].items())
    print_parts(
        stdout_console(),
        "",
        f"kernels for {found['target']}, tuned for steps of up to so many tokens",
        "",
        _kernel_table(rows),
        "",
        f"predicted time of all kernels by tokens of a step: {steps}",
        *([f"computed by the framework between them: {framework}"] if framework else []),
    )


def _kernel_table(rows: list[tuple[str, ...]]) -> Table:
    columns = (
        ("kernel", False), ("tokens", True), ("calls", True), ("tile", False), ("memory", False), ("bytes", True),
        ("FLOPs", True), ("time", True), ("bound", False), ("compiled", False),
    )  # fmt: skip
    return make_table(columns, rows)


def _kernel_row(kernel: dict[str, Any]) -> tuple[str, ...]:
    low, high = kernel["tokens"]
    predicted = kernel["predicted"]
    return (
        kernel["name"],
        str(high) if low == high else f"{low}..{high}",
        str(kernel["computes"]["calls"]),
        _tile_text(kernel["tile"]),
        ", ".join(f"{name} {bytes_text(m['bytes'])}" for name, m in kernel["placement"].items() if m["limit"]),
        bytes_text(predicted["bytes"]["device"]),
        flops_text(predicted["flops"]),
        time_text(predicted["time"]),
        predicted["bound"],
        "; ".join(_compiled_text(made) for made in kernel.get("objects", {}).values()),
    )


def _tile_text(tile: dict[str, int]) -> str:
    sizes = " x ".join(str(tile[axis]) for axis in "mnk" if tile[axis] > 1 or axis == "m")
    return f"{sizes}, {tile['stages']} stages" if tile["stages"] > 1 else sizes


def _compiled_text(made: dict[str, Any]) -> str:
    if "error" in made:
        return f"not for {made['arch']}: {made['error']}"
    units = ", ".join(made.get("instructions", []))
    spills = f", {made['spills']} spilled" if made["spills"] else ""
    return f"{made['arch']}: {made['registers']} registers{spills}, {bytes_text(made['shared'])} shared" + (
        f", {units}" if units else ""
    )
