"""How `moec inspect --target` shows a predicted step to people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..cost.report import bytes_text, flops_text
from .table import make_table, print_parts, stdout_console

SMALL = 0.005  # share of the step below which ops of a function are shown together


def show_predicted(found: dict[str, Any]) -> None:
    """Print a prediction: the times of functions and ops with what bounds them, their sum, and what was assumed."""
    chip = found["target"] + (f" (variant {found['variant']})" if found["variant"] else "")
    tokens = (
        f"{found['new']} new token{'s' * (found['new'] > 1)} of {found['batch']} sequence{'s' * (found['batch'] > 1)}"
    )
    many = f", one of {found['devices']} devices" if found["devices"] > 1 else ""
    parts: list[Table | str] = ["", f"on {chip}, predicted: {tokens} behind {found['past']:,} past tokens{many}", ""]
    parts += [_function_rows(found["functions"]), ""]
    parts += [
        f"predicted step time {time_text(found['time'])}, {found['tokens_per_second']:,.1f} tokens/s"
        f"{' a device' if many else ''}; {found['bandwidth_share']:.0%} of the device memory's bandwidth",
        f"bytes {_amounts_text(found['bytes'], bytes_text)}; {_amounts_text(found['flops'], flops_text)}",
        _memory_text(found["memory"]),
        "assumed: " + "; ".join(found["assumed"]),
    ]
    print_parts(stdout_console(), *parts)


def _function_rows(functions: list[dict[str, Any]]) -> Table:
    columns = (
        ("function, op", False), ("kernels", True), ("bytes", True), ("FLOPs", True), ("time", True), ("bound", False),
        ("share", True),
    )  # fmt: skip
    rows = []
    for function in functions:
        calls = f", {function['calls']} calls" if function["calls"] > 1 else ""
        rows.append(_prediction_row(f"@{function['function']}{calls}", function))
        large = [op for op in function["ops"] if op["share"] >= SMALL]
        rows += [_prediction_row(f"  {op['op']}", op) for op in large]
        if small := [op for op in function["ops"] if op["share"] < SMALL]:
            rows.append(_prediction_row(f"  {len(small)} {'more' if large else 'ops'}", _sum_rows(small)))
    return make_table(columns, rows)


def _prediction_row(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    amounts = bytes_text(sum(row["bytes"].values())), flops_text(sum(row["flops"].values()))
    return (name, f"{row['kernels']:,}", *amounts, time_text(row["time"]), row["bound"], f"{row['share']:.1%}")


def _sum_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return small rows as one; what bounds it is what bounds most of its time."""
    bounds: dict[str, float] = {}
    for row in rows:
        bounds[row["bound"]] = bounds.get(row["bound"], 0.0) + row["time"]
    return {
        **{name: sum(row[name] for row in rows) for name in ("kernels", "time", "share")},
        **{name: {"all": sum(sum(row[name].values()) for row in rows)} for name in ("bytes", "flops")},
        "bound": max(bounds, key=lambda name: bounds[name]),
    }


def _amounts_text(amounts: dict[str, int], text: Any) -> str:
    return ", ".join(f"{text(amount)} {name}" for name, amount in amounts.items())


def _memory_text(memory: dict[str, Any]) -> str:
    held = f"a device holds {bytes_text(memory['weights'])} of weights and {bytes_text(memory['states'])} of states"
    if memory["capacity"] is None:
        return f"{held}; how much it can hold is unknown"
    return f"{held}, {'' if memory['fits'] else 'more than '}of its {bytes_text(memory['capacity'])}".replace(
        "than of", "than"
    )


def time_text(seconds: float) -> str:
    """Return seconds in ms or us."""
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.4g} us"
