"""Quantities as people write them, `4.8TB/s` or `228KiB`, and as moec keeps them, in SI units.

KB, MB, GB and TB are powers of 1000, KiB, MiB, GiB and TiB powers of 1024.
"""

from __future__ import annotations

import math
import re

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BYTES = {f"{prefix}B": scale for prefix, scale in _DECIMAL.items()} | {
    f"{prefix}iB": 1024.0**power for power, prefix in enumerate("KMGTP", 1)
}
UNITS: dict[str, dict[str, float]] = {
    "bytes": _BYTES,
    "bytes/s": {f"{unit}/s": scale for unit, scale in _BYTES.items()},
    "FLOP/s": {
        f"{prefix}{name}": scale for prefix, scale in _DECIMAL.items() for name in ("FLOPS", "FLOP/s", "OPS", "OP/s")
    },
    "s": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "Hz": {f"{prefix}Hz": scale for prefix, scale in _DECIMAL.items()},
    "W": {"W": 1.0, "kW": 1e3},
    "count": {"": 1.0},
}
EXAMPLES = {
    "bytes": "64GB", "bytes/s": "2.0TB/s", "FLOP/s": "300TFLOPS", "s": "5us", "Hz": "1.8GHz", "W": "700W", "count": "8",
}  # fmt: skip
# What a device can have, to catch a 4800 that was meant as GB/s: the least and the most, far from any chip.
_SENSIBLE = {
    "bytes": (1.0, 1e18), "bytes/s": (1e8, 1e18), "FLOP/s": (1e8, 1e20), "s": (1e-10, 10.0), "Hz": (1e6, 1e12), "W": (0.1, 1e6),
    "count": (1.0, 1e9),
}  # fmt: skip


def parse_quantity(given: float | str, kind: str) -> float:
    """Return a number or a text with a unit in SI units; `kind` is a key of UNITS.

    Raises ValueError, with a text that goes on after the name of the figure, for a text that is not a quantity, a unit of
    another kind, and a number that no device has.
    """
    value = float(given) if not isinstance(given, str) else _read_text(given, kind)
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    if value <= 0:
        raise ValueError(f"must be greater than 0, not {given}")
    low, high = _SENSIBLE[kind]
    if not low <= value <= high:
        raise ValueError(f"cannot be {value:g} {kind}: a plain number is in {kind}; write it as in {EXAMPLES[kind]}")
    if kind in ("bytes", "count") and value != int(value):
        raise ValueError(f"must be a whole number of {kind.removesuffix('count') or 'units'}, not {value:g}".strip())
    return value


def _read_text(text: str, kind: str) -> float:
    found = re.fullmatch(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-z/]*)\s*", text)
    if found is None:
        raise ValueError(f"must be a number or a text such as {EXAMPLES[kind]}, not {text!r}")
    scale = 1.0 if not found[2] else UNITS[kind].get(found[2])
    if scale is None:
        raise ValueError(f"is in {kind}, as in {EXAMPLES[kind]}, not {text!r}")
    value = float(found[1]) * scale
    return float(round(value)) if kind == "bytes" and scale > 1 else value  # 0.3GB is a whole number of bytes


def quantity_text(value: float, kind: str, operations: str = "FLOPS") -> str:
    """Return a value in SI units with the unit that people use for it."""
    match kind:
        case "bytes":
            return _bytes_text(value)
        case "bytes/s":
            return f"{value / 1e9:,.6g} GB/s"
        case "FLOP/s":
            return f"{value / 1e12:,.6g} T{operations}"
        case "s":
            return f"{value * 1e6:.6g} us"
        case "Hz":
            return f"{value / 1e9:.6g} GHz"
        case "W":
            return f"{value:,.6g} W"
    return f"{value:,.6g}"


def _bytes_text(value: float) -> str:
    for scale, unit in ((1e9, "GB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
        if value >= scale:
            return f"{value / scale:,.6g} {unit}"
    return f"{value:,.6g} B"
