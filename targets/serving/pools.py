"""Disaggregated serving: some devices read prompts, the others decode, and caches go from one pool to the other over the links.

Requests are as many at once as are asked for: who has an answer sends the next prompt. A pool of prompts that is slower than
those who decode bounds the throughput, and requests wait for it; else they wait for nothing but their own prompt and its cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ...compiler.errors import MoecError
from ..systems.graph import pool_transfer
from ..systems.system import System
from .candidates import Candidate, Request, make_candidate, make_candidates, within_limits
from .degrees import Degrees, possible_degrees
from .demand import prefill_demand
from .memory import device_memory, sequence_bytes
from .storage import Storage
from .timing import Constants, prefill_seconds
from .workload import Workload

AUTO = "auto"
PARTS = 8  # of a large system, over which devices are divided between the pools


@dataclass(frozen=True)
class PromptPool:
    """Devices that read prompts: how long one takes on an idle pool, how many a second the pool reads and the links carry."""

    devices: int
    degrees: Degrees
    seconds: float
    rate: float
    transfer: float  # s, of one prompt's cache
    carried: float
    cache: int  # bytes of a prompt's cache

    @property
    def most(self) -> float:
        """Prompts a second that come through."""
        return min(self.rate, self.carried)


@dataclass(frozen=True)
class Division:
    """Both pools as they work together; `candidate` is that of the devices that decode."""

    pool: PromptPool
    candidate: Candidate
    requests: float  # a second, of the whole system
    bound: str  # prefill, link or decode: what a faster one of would answer more requests

    def entry(self) -> dict[str, Any]:
        """Return the pool of prompts as plain data."""
        pool = self.pool
        return {
            "devices": pool.devices, "degrees": pool.degrees.entry(), "instances": pool.devices // pool.degrees.devices,
            "prompt_ms": 1e3 * pool.seconds, "prompts_per_s": pool.rate, "transfer_ms": 1e3 * pool.transfer,
            "cache_bytes": pool.cache, "transfers_per_s": pool.carried, "requests_per_s": self.requests, "bound": self.bound,
        }  # fmt: skip


def divide_pools(
    workload: Workload, system: System, storage: Storage, request: Request, engine: str, constants: Constants
) -> Division:
    """Return the division of a system that answers most requests a second within the limits; MoecError if none can be."""
    found: list[Division] = []
    refused: MoecError | None = None
    for devices in _pool_sizes(system, request.prefill):
        rest = system.of_devices(system.devices - devices)
        try:
            pool = prompt_pool(workload, system, devices, storage, request.input, engine, constants)
            ways = [c for c in make_candidates(workload, rest, storage, request, engine, constants)
                    if c.memory.free >= 0 or (request.queue and c.running)]  # fmt: skip
            if not ways:
                raise MoecError(f"the {rest.devices} devices that decode have no room for {request.batch} requests",
                                todo="a smaller --prefill or --batch, or more devices")  # fmt: skip
        except MoecError as error:
            refused = refused or error
            continue
        best = min(ways, key=lambda c: c.token)
        found.append(_settle(workload, rest, storage, request, engine, constants, pool, best))
    if not found:
        raise refused or MoecError("a system of one device has no two pools", where=f"--on {request.on}")
    inside = [d for d in found if within_limits(d.candidate, request)]
    if not inside:
        near = min(found, key=lambda d: d.candidate.token)
        what = f"{near.candidate.token * 1e3:.1f} ms a token and {near.candidate.first:.2f} s to the first"
        raise MoecError(f"no division into two pools keeps to the limits: the nearest takes {what}",
                        todo=f"nearest: --prefill {near.pool.devices} --batch {max(1, request.batch // 2)}, or more devices")  # fmt: skip
    return max(inside, key=lambda d: d.requests)


def _pool_sizes(system: System, asked: str | int | None) -> Iterator[int]:
    """Yield how many devices may read prompts; MoecError for a number that leaves none to decode."""
    if asked != AUTO:
        count = int(asked or 0)
        if not 0 < count < system.devices:
            raise MoecError(
                f"{count} of {system.devices} devices cannot read prompts while the others decode", "--prefill",
                todo=f"1 to {system.devices - 1}, or auto" if system.devices > 1 else "a system of two devices or more",
            )  # fmt: skip
        yield count
        return
    step = max(1, system.devices // PARTS)
    yield from range(step, system.devices, step)


def prompt_pool(
    workload: Workload, system: System, devices: int, storage: Storage, prompt: int, engine: str, constants: Constants
) -> PromptPool:
    """Return the pool of so many devices that reads most prompts a second; MoecError where the model does not fit them."""
    own, part = constants.engine(engine), system.of_devices(devices)
    found: list[PromptPool] = []
    link = pool_transfer(system, devices)
    whole = sequence_bytes(workload, Degrees(), storage, prompt)
    for way in possible_degrees(workload, part, {}):
        if device_memory(workload, part, way, storage, 1, prompt).free < 0:
            continue
        alone = prefill_seconds(prefill_demand(workload, part, way, storage, prompt), constants.shared, own)
        full = prefill_seconds(prefill_demand(workload, part, way, storage, prompt, alone=False), constants.shared, own)
        sent = whole / (way.tp * way.pp)  # each device that has a part of the cache sends it
        found.append(PromptPool(
            devices, way, float(alone), float(devices // way.devices * way.dp * way.pp / full),
            sent * link.seconds + link.latency, devices / (whole * link.seconds) if whole else float("inf"), whole,
        ))  # fmt: skip
    if not found:
        what = f"the weights and a prompt of {prompt:,} tokens do not fit the {devices} devices that read prompts"
        raise MoecError(what, todo="a larger --prefill, smaller --weights, or more devices")
    return max(found, key=lambda pool: pool.rate)


def _settle(
    workload: Workload, rest: System, storage: Storage, request: Request, engine: str, constants: Constants,
    pool: PromptPool, way: Candidate,
) -> Division:  # fmt: skip
    """Return two pools as they work together in the long run."""
    copies = way.degrees.dp * (rest.devices // way.degrees.devices)
    idle = constants.engine(engine).accept + pool.seconds + pool.transfer

    def decoding(running: int) -> Candidate:
        asked = replace(request, batch=running, attention_dp=way.degrees.dp)
        return make_candidate(workload, rest, storage, asked, engine, constants, way.degrees)

    def rate(candidate: Candidate) -> float:
        return candidate.running * copies / (candidate.token * request.output)

    asked = way.batch * copies  # requests at once, wherever they are
    low, high = 0, min(way.batch, way.running)
    # the most requests that decode while the others, of which each takes `idle`, are in the pool of prompts, or wait for it
    while high - low > 1:
        middle = (low + high) // 2
        one = decoding(middle)
        fits = middle * copies + rate(one) * idle <= asked and rate(one) <= pool.most
        low, high = (middle, high) if fits else (low, middle)
    last = decoding(high)
    fits = high * copies + rate(last) * idle <= asked and rate(last) <= pool.most
    chosen = last if fits or not low else decoding(low)
    requests = min(rate(chosen), pool.most)
    bound = (
        "decode"
        if rate(decoding(min(high, way.running))) <= pool.most
        else "prefill"
        if pool.rate <= pool.carried
        else "link"
    )
    first = max(idle, asked / requests - chosen.token * request.output)
    share = rest.devices / (rest.devices + pool.devices) * requests / rate(chosen)
    settled = replace(chosen, batch=way.batch, first=first, share=share)
    return Division(pool, settled, requests, bound)
