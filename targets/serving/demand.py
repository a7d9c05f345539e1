"""What one step demands of one device: seconds that bytes and FLOPs take at the device's and the links' full rates.

`timing.py` makes a predicted time of it, with the shares of these rates that engines were measured to reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..accelerator.predict.experts_touched import distinct_experts
from ..systems.graph import all_to_all
from ..systems.system import System
from .degrees import Degrees
from .storage import FIXED_STATE, Storage
from .workload import Layer, Workload

ACTIVATION = 2  # bytes of a number that devices exchange
DISPATCHED = 3  # of a number that goes to an expert in 8 bits and comes back in 16


@dataclass
class Demand:
    """Ideal seconds by cause; `kernels` and `exchanges` are numbers, `sequences` those of one attention rank."""

    expert_read: float = 0.0
    expert_math: float = 0.0
    dense_read: float = 0.0
    dense_math: float = 0.0
    cache_read: float = 0.0
    attention_math: float = 0.0
    exchange: float = 0.0
    latency: float = 0.0
    kernels: float = 0.0
    exchanges: float = 0.0
    sequences: float = 0.0
    expert_dtype: str = "bf16"
    dense_dtype: str = "bf16"


def decode_demand(
    workload: Workload,
    system: System,
    degrees: Degrees,
    storage: Storage,
    batch: float,
    context: float,
    drafts: int = 0,
) -> Demand:
    """Return what a decoding step demands: `batch` sequences of each attention rank, `context` past tokens.

    With `drafts`, each sequence has so many tokens more, that are verified in the same step.
    """
    together = max(1.0, batch / degrees.pp)  # sequences of one microbatch: a stage works on one at a time
    tokens = together * (1 + drafts)
    found = _demand(workload, system, degrees, storage, tokens, context, context, together)
    found.sequences = batch
    return found


def prefill_demand(
    workload: Workload, system: System, degrees: Degrees, storage: Storage, prompt: int, requests: float = 1.0,
    alone: bool = True,
) -> Demand:  # fmt: skip
    """Return what reading the prompts of `requests` requests of an attention rank in one step demands.

    `alone` is one rank, and the others have none.
    """
    found = _demand(workload, system, degrees, storage, prompt * requests, 0, prompt, 0.0, alone)
    found.sequences = requests
    return found


def _demand(
    workload: Workload, system: System, degrees: Degrees, storage: Storage, tokens: float, first: float, last: float,
    caches: float, alone: bool = False,
) -> Demand:  # fmt: skip
    """Return the demand of `tokens` tokens of each attention rank (`alone`: of one rank, and the others have none)."""
    found = Demand(expert_dtype=storage.roles["experts"].dtype, dense_dtype=storage.roles["attention"].dtype)
    everyone = tokens if alone else tokens * degrees.dp
    for layer in workload.layers:
        _add_weights(found, layer, system, degrees, storage, tokens)
        _add_experts(found, layer, system, degrees, storage, everyone)
        _add_attention(found, layer, system, degrees, storage, tokens, first, last, caches)
        found.kernels += layer.calls * layer.kernels
    _add_exchanges(found, workload, system, degrees, tokens)
    return found


def _add_weights(
    found: Demand, layer: Layer, system: System, degrees: Degrees, storage: Storage, tokens: float
) -> None:
    bandwidth = system.device.bandwidth.value
    for weights in layer.weights:
        if weights.flops:  # what is only looked up takes no time
            stored = storage.roles[weights.role]
            found.dense_read += layer.calls * weights.elements * stored.bits / 8 / degrees.tp / bandwidth
            found.dense_math += layer.calls * weights.flops * tokens / degrees.tp / system.device.peak(stored.dtype)


def _add_experts(
    found: Demand, layer: Layer, system: System, degrees: Degrees, storage: Storage, tokens: float
) -> None:
    stored = storage.roles["experts"]
    for experts in layer.experts:
        touched = distinct_experts(experts.count, experts.chosen, tokens)
        size = touched * experts.elements * stored.bits / 8 / degrees.group
        found.expert_read += layer.calls * size / system.device.bandwidth.value
        found.expert_math += layer.calls * experts.flops * tokens / degrees.group / system.device.peak(stored.dtype)


def _add_attention(
    found: Demand, layer: Layer, system: System, degrees: Degrees, storage: Storage, tokens: float, first: float,
    last: float, caches: float,
) -> None:  # fmt: skip
    for state in layer.states:
        size = storage.cache_bytes if state.grows else FIXED_STATE
        read = layer.calls * state.read(last) * size / min(degrees.tp, state.heads)
        found.cache_read += caches * read / system.device.bandwidth.value
    flops = layer.attention.mean(first, last) if last > first else layer.attention(last)
    found.attention_math += layer.calls * flops * tokens / degrees.tp / system.device.peak("bf16")


def _add_exchanges(found: Demand, workload: Workload, system: System, degrees: Degrees, tokens: float) -> None:
    """Add the sums over devices behind attention and experts, and the dispatch to experts of other attention ranks."""
    size = tokens * workload.hidden * ACTIVATION
    if degrees.tp > 1:
        sums = workload.blocks * (1 if degrees.dp > 1 else 2)
        way = all_to_all(system, degrees.tp)
        # reduce-scatter, then all-gather: each device sends all but its own part, twice
        found.exchange += sums * 2 * size * (degrees.tp - 1) / degrees.tp * way.seconds
        found.exchanges += sums
        found.latency += sums * way.latency
    if degrees.dp > 1:
        way = all_to_all(system, degrees.group)
        copies = min(_chosen(workload), degrees.ep) if degrees.ep > 1 else degrees.group
        sent = tokens / degrees.tp * workload.hidden * DISPATCHED * copies * (degrees.group - 1) / degrees.group
        found.exchange += workload.expert_blocks * sent * way.seconds
        found.exchanges += 2 * workload.expert_blocks
        found.latency += 2 * workload.expert_blocks * way.latency
    if degrees.pp > 1:
        way = all_to_all(system, degrees.pp, degrees.group)
        found.exchange += (degrees.pp - 1) * size / degrees.tp * way.seconds
        found.exchanges += degrees.pp - 1
        found.latency += (degrees.pp - 1) * way.latency


def _chosen(workload: Workload) -> int:
    return max((e.chosen for layer in workload.layers for e in layer.experts), default=1)
