"""The ways to divide a model that a request allows, each with what it holds and how long it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...compiler.errors import MoecError
from ..systems.system import System
from .degrees import Degrees, check_degrees, possible_degrees
from .demand import Demand, decode_demand, prefill_demand
from .memory import Memory, device_memory, with_copies
from .offload import Offload, offloaded_decode, offloaded_prompt, place_experts
from .routing import EVEN, Spread, read_routing, spread_experts
from .storage import Storage
from .timing import Constants, Load, predict_times
from .workload import Workload


@dataclass(frozen=True)
class Request:
    """What is asked: where it runs and what is sent to it.

    `batch` is the requests at once: of an attention rank where `attention_dp` is given, else of the whole system, spread
    evenly over its instances and ranks.
    """

    on: str
    engine: str | None = None
    weights: str | None = None
    cache: str | None = None
    tp: int | None = None
    attention_dp: int | None = None
    ep: int | None = None
    pp: int | None = None
    batch: int = 1
    input: int = 1024
    output: int = 1024
    drafts: int = 0
    prefill: str | int | None = None  # devices that read prompts while the others decode; auto to have them chosen
    queue: bool = False  # requests beyond the cache wait; else they are refused
    tpot: float | None = None  # s, at most
    ttft: float | None = None
    routing: str | None = None  # the file of a histogram of experts; without one they are taken to be chosen evenly
    copies: int = 0  # of hot experts, beyond one of each
    price: float | None = None  # of a device and hour

    @staticmethod
    def of(on: str, asked: Mapping[str, Any]) -> Request:
        """Return a request from options by name; MoecError for one that there is not."""
        if unknown := asked.keys() - Request.__dataclass_fields__.keys():
            todo = f"it takes {', '.join(Request.__dataclass_fields__)}"
            raise MoecError(f"plan takes no {min(unknown)}", todo=todo)
        return Request(on=on, **asked)

    def given(self) -> dict[str, int]:
        """Return the degrees that are asked for, by their names in Degrees."""
        named = {"tp": self.tp, "dp": self.attention_dp, "ep": self.ep, "pp": self.pp}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to divide the model, with what it holds and how long it takes; `running` of `batch` requests run at once."""

    degrees: Degrees
    memory: Memory
    batch: int
    running: int
    first: float
    token: float
    parts: dict[str, float]
    decode: Demand
    placed: Offload | None = None  # where experts lie that the devices have no room for
    spread: Spread = EVEN
    share: float = 1.0  # of the system's devices that decode, in times of the share of their time that they do

    @property
    def fits(self) -> bool:
        """Return whether everything has a place, in the devices or beside them."""
        return self.memory.free >= 0 or self.placed is not None

    def rate(self) -> float:
        """Return tokens a second of one device."""
        return self.running * self.degrees.dp / self.token / self.degrees.devices * self.share


def default_engine(system: System) -> str:
    """Return the engine that people would run on a system."""
    if system.unified or (system.devices == 1 and system.host):
        return "llama.cpp"
    return "atom" if system.cards.startswith("amd-") else "vllm"


def default_cache(system: System, weights: str | None) -> str:
    """Return how recipes store the cache beside quantized weights: in 8 bits on chips that multiply 4 bits, else in 16."""
    return "fp8" if weights in ("fp8", "fp4") and "mxfp4" in system.device.peaks else "bf16"


def rank_batch(request: Request, system: System, degrees: Degrees) -> int:
    """Return the requests that an attention rank has at once."""
    if request.attention_dp is not None:
        return request.batch
    return max(1, -(-request.batch // (degrees.dp * (system.devices // degrees.devices))))


def within_limits(candidate: Candidate, request: Request) -> bool:
    """Return whether a candidate keeps to the limits on its times."""
    return candidate.token <= (request.tpot or float("inf")) and candidate.first <= (request.ttft or float("inf"))


def make_candidates(
    workload: Workload, system: System, storage: Storage, request: Request, engine: str, constants: Constants
) -> list[Candidate]:
    given = request.given()
    spread = request.attention_dp is None
    if len(given) == 4 or {"tp", "dp", "ep"} <= given.keys():
        degrees = Degrees(**given)
        check_degrees(degrees, workload, system)
        ways = [degrees]
    else:
        ways = list(possible_degrees(workload, system, given))
        ways = [w for w in ways if not spread or w.dp <= request.batch] or ways
        if not ways:
            # experts of as many devices as are asked for: so the reason is what forbids that
            whole = {"dp": max(1, given.get("ep", 1) // given.get("tp", 1)), **given}
            check_degrees(replace(Degrees(), **whole), workload, system)
            raise MoecError(f"no degrees with {given} divide {system.name}")
    return [make_candidate(workload, system, storage, request, engine, constants, way) for way in ways]


def make_candidate(
    workload: Workload, system: System, storage: Storage, request: Request, engine: str, constants: Constants,
    degrees: Degrees,
) -> Candidate:  # fmt: skip
    batch = rank_batch(request, system, degrees)
    whole = request.input + request.output
    spread = spread_of(request, degrees)
    memory = with_copies(device_memory(workload, system, degrees, storage, batch, whole, request.output),
                         workload, degrees, storage, spread.copies)  # fmt: skip
    placed = None
    if memory.free < 0 and not memory.largest_batch:
        placed = place_experts(workload, system, degrees, storage, memory)
    running = batch if placed else min(batch, memory.largest_batch)
    context = request.input + request.output / 2
    decode = decode_demand(workload, system, degrees, storage, max(running, 1), context, request.drafts)
    prompt = prefill_demand(workload, system, degrees, storage, request.input)
    decode, prompt = (
        replace(d, expert_read=d.expert_read * spread.imbalance, expert_math=d.expert_math * spread.imbalance)
        for d in (decode, prompt)
    )
    if placed:
        decode = offloaded_decode(decode, workload, system, degrees, placed)
        prompt = offloaded_prompt(prompt, system, degrees, placed)
    load = Load(max(running, 1), degrees.dp, request.output, request.prefill is not None)
    first, token, parts = predict_times(
        decode, prompt, load, constants, engine, request.drafts, max(workload.blocks, 1)
    )
    first, token, parts = float(first), float(token), {name: float(value) for name, value in parts.items()}
    if 0 < running < batch:  # the others wait until those before them have their answers
        first += (batch - running) / running * token * request.output
    return Candidate(degrees, memory, batch, running, first, token, parts, decode, placed, spread)


def spread_of(request: Request, degrees: Degrees) -> Spread:
    """Return how a request's experts are spread over the ranks of degrees."""
    if request.routing is None or degrees.ep == 1:
        return EVEN
    return spread_experts(read_routing(request.routing), degrees.ep, request.copies)
