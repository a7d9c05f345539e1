"""`moec inspect SOURCE --quantize FORMAT`: does it fit this machine or a chip, and how fast will it be, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..cost.count import module_costs
from ..cost.report import bytes_text
from ..driver import lower_for, predict
from ..ir.module import Module

# share of the read bandwidth at which moec's kernels read weights: 140 tokens/s of 204.6 MB at 35.3 GB/s (BENCHMARKS.md)
REACHED = 0.8
USABLE = 0.9  # of a machine's memory, the rest is the system's: general knowledge
RUNTIME = 200_000_000  # bytes of Python, ONNX Runtime and what a step works in


def estimate_step(
    module: Module,
    target: str,
    quantize: str | None,
    options: Mapping[str, str],
    *,
    kv: str | None = None,
    past: int,
    **step: int,
) -> dict[str, Any]:
    """Return bytes, whether they fit and tokens a second of one request behind `past` tokens, as plain data."""
    from ...targets import open_target

    chosen = open_target(target, options)
    found: dict[str, Any] = {"target": chosen.name, "quantize": quantize or "as stored", "past": past}
    if chosen.predict is not None:
        step_found = predict(module, target, options, quantize=quantize, kv=kv, past=past, **step)
        memory = step_found["memory"]
        return {
            **found, "weights": memory["weights"], "needed": memory["weights"] + memory["states"],
            "capacity": memory["capacity"], "fits": memory["fits"], "bytes_per_token": sum(step_found["bytes"].values()),
            "bandwidth": None, "tokens_per_second": step_found["tokens_per_second"],
        }  # fmt: skip
    from ...targets.systems.here import measure_here

    here = measure_here().device
    costs = module_costs(lower_for(module, chosen, quantize, kv))
    total = costs.total
    read = int(total.compiled_bytes_read) + costs.at(total.state_bytes_read, past)
    needed = int(total.compiled_bytes) + costs.at(total.state_bytes, past) + RUNTIME
    capacity = int(USABLE * here.memory.value)
    return {
        **found, "weights": int(total.compiled_bytes), "needed": needed, "capacity": capacity,
        "fits": needed <= capacity, "bytes_per_token": read, "bandwidth": here.bandwidth.value,
        "tokens_per_second": REACHED * here.bandwidth.value / read,
    }  # fmt: skip


def estimate_line(found: dict[str, Any]) -> str:
    """Return an estimate as one line."""
    held = f"{bytes_text(found['weights'])} of weights, {bytes_text(found['needed'])} with what {found['past']:,} tokens need"
    room = "room unknown" if found["capacity"] is None else f"{bytes_text(found['capacity'])}"
    fits = {True: f"fits in {room}", False: f"does not fit in {room}", None: room}[found["fits"]]
    rate, read = found["tokens_per_second"], bytes_text(found["bytes_per_token"])
    where = (
        f"{read} a token at {REACHED:.0%} of {bytes_text(int(found['bandwidth']))}/s measured here"
        if found["bandwidth"]
        else f"{read} a token, predicted"
    )
    speed = f"about {rate:,.3g} tokens/s ({where})" if found["fits"] is not False else "no speed"
    return f"{found['quantize']} for {found['target']}: {held}; {fits}; {speed}"
