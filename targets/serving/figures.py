"""What a generated token takes and costs: bytes, FLOPs, the share of the weights that a step touches, joules and money."""

from __future__ import annotations

from typing import Any

from ..accelerator.predict.experts_touched import distinct_experts
from ..systems.system import System
from .degrees import Degrees
from .demand import Demand
from .storage import Storage
from .timing import ACCEPTED
from .workload import Workload

HOUR, MILLION = 3600.0, 1e6


def token_entry(
    workload: Workload, system: System, degrees: Degrees, storage: Storage, decode: Demand, batch: int, drafts: int,
    rate: float,
) -> dict[str, Any]:  # fmt: skip
    """Return what one generated token takes of all devices of an instance, at `rate` tokens a second of a device.

    `joules` are those of devices at their full power, without hosts and switches; None where that power is not known.
    """
    together = max(1.0, batch / degrees.pp)
    tokens = together * degrees.dp * ACCEPTED[drafts]
    read = (decode.expert_read + decode.dense_read + decode.cache_read) * system.device.bandwidth.value
    math = (
        decode.expert_math * system.device.peak(decode.expert_dtype)
        + decode.dense_math * system.device.peak(decode.dense_dtype)
        + decode.attention_math * system.device.peak("bf16")
    )
    return {
        "bytes": read * degrees.group / tokens,
        "flops": math * degrees.group / tokens,
        "weights_touched": weights_touched(workload, storage, together * degrees.dp * (1 + drafts)),
        "joules": system.power.value / rate if system.power else None,
    }


def weights_touched(workload: Workload, storage: Storage, tokens: float) -> float:
    """Return the share of all weights, by bytes, that a step with so many tokens reads."""
    touched, whole = 0.0, 0.0
    for layer in workload.layers:
        for weights in layer.weights:
            size = layer.calls * weights.elements * storage.roles[weights.role].bits
            whole += size
            touched += size if weights.flops else 0.0
        for experts in layer.experts:
            size = layer.calls * experts.elements * storage.roles["experts"].bits
            whole += size * experts.count
            touched += size * distinct_experts(experts.count, experts.chosen, tokens)
    return touched / whole if whole else 0.0


def cost_entry(price: float, rate: float, rate_interval: tuple[float, float]) -> dict[str, Any]:
    """Return what generated tokens cost at a price of a device and hour; the dearer end of the interval is of the lower rate."""

    def cost(rate: float) -> float:
        return price / HOUR / rate * MILLION

    low, high = rate_interval
    return {"price_per_device_hour": price, "per_million_tokens": cost(rate),
            "per_million_tokens_interval": [cost(high), cost(low)]}  # fmt: skip
