"""The plan of a model on a system: degrees, memory, predicted times with intervals, and what to change where it does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...compiler.errors import MoecError
from ..systems.read import find_system
from ..systems.system import System
from .candidates import (
    Candidate,
    Request,
    default_cache,
    default_engine,
    make_candidate,
    make_candidates,
    within_limits,
)
from .degrees import Degrees, possible_degrees
from .figures import cost_entry, token_entry
from .memory import device_memory, largest_context
from .pools import divide_pools
from .routing import Spread, check_routing, read_routing
from .storage import Storage, choose_storage
from .timing import ACCEPTED, Constants, fitted_constants
from .workload import Workload

BATCHES = (1, 4, 16, 64, 256)  # requests of a rank that the list of what else there is goes through
SCHEMA = 1  # of what a plan is as plain data: plan.schema.json
SMALLER = ("fp8", "fp4", "int4", "int2")  # what to store weights in where they do not fit, widest first


def make_plan(workload: Workload, request: Request) -> dict[str, Any]:
    """Return the plan as plain data: what `moec plan --json` prints. MoecError for what cannot be, with what can."""
    _check_request(workload, request)
    system = find_system(request.on)
    engine = request.engine or default_engine(system)
    storage = choose_storage(workload, request.weights, request.cache or default_cache(system, request.weights))
    constants = fitted_constants()
    constants.engine(engine)
    if request.prefill is not None:
        division = divide_pools(workload, system, storage, request, engine, constants)
        rest = replace(system, devices=system.devices - division.pool.devices)
        chosen = division.candidate
        return {
            **_plan_entry(workload, rest, storage, request, engine, constants, chosen, [chosen]),
            "prefill": division.entry(),
        }
    ways = list(make_candidates(workload, system, storage, request, engine, constants))
    good = [c for c in ways if c.memory.free >= 0]
    good = good or [c for c in ways if c.fits or (request.queue and c.running)]
    if not good:
        raise _does_not_fit(workload, system, request, ways)
    inside = [c for c in good if within_limits(c, request)]
    if not inside:
        best = min(good, key=lambda c: c.token)
        raise MoecError(
            f"no plan keeps to the limits: the fastest takes {best.token * 1e3:.1f} ms a token and {best.first:.2f} s to the first",
            todo=f"nearest: {best.degrees.options()} --batch {max(1, best.batch // 2)}, or more devices",
        )
    best = max(inside, key=lambda c: (c.memory.free >= 0, 1 / c.token))
    swept = _sweep_batches(workload, system, storage, request, engine, constants, [c.degrees for c in inside])
    return _plan_entry(workload, system, storage, request, engine, constants, best, [*inside, *swept])


def _check_request(workload: Workload, request: Request) -> None:
    for name in ("batch", "input", "output"):
        if getattr(request, name) < 1:
            raise MoecError(f"--{name} must be at least 1")
    if request.routing is not None:
        check_routing(read_routing(request.routing), workload, request.routing)
    elif request.copies:
        raise MoecError("copies are of hot experts, and nothing says which are hot", todo="--routing FILE")
    if request.copies and request.ep is None:
        raise MoecError("copies need to know the ranks that they lie on", todo=f"--ep N --copies {request.copies}")
    if request.drafts not in ACCEPTED:
        raise MoecError(
            f"how many of {request.drafts} drafts are accepted is not known", todo=f"--drafts {max(ACCEPTED)} or fewer"
        )
    asked = request.input + request.output
    if workload.context and asked > workload.context:
        raise MoecError(
            f"the model takes {workload.context:,} tokens, and input and output are {asked:,}",
            todo=f"--input {max(1, workload.context - request.output)}",
        )


def _sweep_batches(
    workload: Workload, system: System, storage: Storage, request: Request, engine: str, constants: Constants,
    ways: list[Degrees],
) -> list[Candidate]:  # fmt: skip
    """Return the candidates of other batches that fit and keep to the limits: what else could be asked of the system."""
    found = []
    for batch in BATCHES:
        for way in ways:
            asked = replace(request, batch=batch, attention_dp=way.dp)
            candidate = make_candidate(workload, system, storage, asked, engine, constants, way)
            if candidate.memory.free >= 0 and within_limits(candidate, request):
                found.append(candidate)
    return found


def _does_not_fit(workload: Workload, system: System, request: Request, ways: list[Candidate]) -> MoecError:
    """Return the error that says what is short, and what to type instead."""
    nearest = max(ways, key=lambda c: c.memory.free)
    memory = nearest.memory
    room = memory.largest_batch
    if room:
        what = f"the cache of {nearest.batch} requests of {request.input + request.output:,} tokens does not fit"
    elif memory.needed - memory.cache <= memory.capacity:
        what = f"the cache of one request of {request.input + request.output:,} tokens does not fit"
    else:
        what = "the weights do not fit"
    return MoecError(
        f"{what}: a device of {system.name} needs {memory.needed:,} bytes and has {memory.capacity:,}",
        where=nearest.degrees.options(),
        todo="; ".join(changes_to_fit(workload, system, request, nearest)),
    )


def changes_to_fit(workload: Workload, system: System, request: Request, nearest: Candidate) -> list[str]:
    """Return options to type with which the model would fit, those that change least first."""
    found = []
    whole = request.input + request.output
    cache = request.cache or default_cache(system, request.weights)
    storage = choose_storage(workload, request.weights, cache)
    if nearest.memory.largest_batch:
        found.append(f"--batch {nearest.memory.largest_batch}, or --queue to let the others wait")
    elif context := largest_context(workload, system, nearest.degrees, storage, 1):
        found.append(f"--batch 1 with {context:,} tokens of input and output")
    for weights in SMALLER:
        other = choose_storage(workload, weights, cache)
        if device_memory(workload, system, nearest.degrees, other, nearest.batch, whole, request.output).free >= 0:
            found.append(f"--weights {weights}")
            break
    for factor in (2, 4, 8, 16, 32):
        more = f"{system.cards}:{system.devices * factor}"
        if system.cards and _fits_on(workload, find_system(more), storage, request):
            found.append(f"--on {more}")
            break
    return found


def _fits_on(workload: Workload, system: System, storage: Storage, request: Request) -> bool:
    """Return whether some degrees fit a request on a system."""
    for degrees in possible_degrees(workload, system, {}):
        batch = max(1, -(-request.batch // degrees.dp))
        if (
            device_memory(
                workload, system, degrees, storage, batch, request.input + request.output, request.output
            ).free
            >= 0
        ):
            return True
    return False


def _plan_entry(
    workload: Workload, system: System, storage: Storage, request: Request, engine: str, constants: Constants,
    best: Candidate, others: list[Candidate],
) -> dict[str, Any]:  # fmt: skip
    moved = best.placed.bytes // best.degrees.devices if best.placed else 0
    bound = max(best.parts, key=lambda name: best.parts[name])
    return {
        "schema": SCHEMA,
        "model": workload.name,
        "system": {"name": system.name, "device": system.device.name, "devices": system.devices,
                   "bandwidth": system.device.bandwidth.value, "peaks": {k: f.value for k, f in system.device.peaks.items()}},
        "engine": engine,
        "weights": storage.name,
        "cache": storage.cache,
        "formats": dict(storage.formats),
        "experts": placement_entry(workload, best.degrees, best.spread),
        "degrees": best.degrees.entry(),
        "instances": system.devices // best.degrees.devices,
        "load": {"batch": best.batch, "requests": best.batch * best.degrees.dp * (system.devices // best.degrees.devices), "running": best.running,
                 "input": request.input, "output": request.output, "drafts": request.drafts},
        "fits": best.fits and best.running == best.batch,
        "memory": best.memory.entry(),
        "offload": best.placed.entry() if best.placed else None,
        "largest": {
            "batch": best.placed.largest_batch if best.placed else best.memory.largest_batch,
            "context": largest_context(workload, system, best.degrees, storage, best.batch, moved),
        },
        "predicted": predicted_entry(best, request, engine, system, constants),
        "token": token_entry(workload, system, best.degrees, storage, best.decode, best.running, request.drafts, best.rate()),
        "cost": None if request.price is None else cost_entry(request.price, best.rate(), rate_interval(best, engine, system, constants)),
        "bound": bound,
        "prefill": None,
        "parts_ms": {name: 1e3 * seconds for name, seconds in best.parts.items()},
        "pareto": [pareto_entry(c) for c in pareto_front(others)],
    }  # fmt: skip


def placement_entry(workload: Workload, degrees: Degrees, spread: Spread) -> dict[str, Any] | None:
    """Return which experts each rank holds; without a map they lie in the order of their numbers."""
    counts = {e.count for layer in workload.layers for e in layer.experts}
    if len(counts) != 1:
        return None
    placed = spread.placement.entry()["physical_to_logical"] if spread.placement else None
    return {"experts": counts.pop(), "ranks": degrees.ep, "copies": spread.copies,
            "layers": list(workload.expert_layers), "of_layers": workload.blocks, "imbalance": spread.imbalance,
            "imbalance_in_order": spread.unplaced, "physical_to_logical": placed}  # fmt: skip


def predicted_entry(
    best: Candidate, request: Request, engine: str, system: System, constants: Constants
) -> dict[str, Any]:
    """Return the predicted figures, each with the interval in which four of five measured rows lay."""
    low, high = constants.interval("tpot", engine, system.cards)
    early, late = constants.interval("ttft", engine, system.cards)
    token, first, rate = 1e3 * best.token, 1e3 * best.first, best.rate()
    return {
        "ttft_ms": first, "ttft_ms_interval": [first * early, first * late],
        "tpot_ms": token, "tpot_ms_interval": [token * low, token * high],
        "tokens_per_s_per_device": rate,
        "tokens_per_s_per_device_interval": list(rate_interval(best, engine, system, constants)),
        "tokens_per_s_per_user": 1 / best.token, "tokens_per_s_per_user_interval": [1 / best.token / high, 1 / best.token / low],
    }  # fmt: skip


def rate_interval(best: Candidate, engine: str, system: System, constants: Constants) -> tuple[float, float]:
    """Return the interval of tokens a second of a device."""
    low, high = constants.interval("tpot", engine, system.cards)
    return best.rate() / high, best.rate() / low


def pareto_front(candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates that no other one beats in both tokens a second of a user and of a device."""
    found: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: c.token):
        if not found or candidate.rate() > found[-1].rate():
            found.append(candidate)
    return found


def pareto_entry(candidate: Candidate) -> dict[str, Any]:
    """Return one point of the front as plain data."""
    return {**candidate.degrees.entry(), "batch": candidate.batch, "ttft_ms": 1e3 * candidate.first,
            "tpot_ms": 1e3 * candidate.token, "tokens_per_s_per_device": candidate.rate()}  # fmt: skip
