"""Predicted times: a step's demand divided by the shares of full rates that engines reach, and constants of each engine.

The constants are data (`fitted.json`, made by tests/bench/serving.py from measured rows): a few for all engines, and for each
engine the time of a step, of a kernel, of a sequence and of accepting a request. Residuals on rows that they were not
fitted to make the intervals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.errors import MoecError
from .demand import Demand

FITTED = Path(__file__).parent / "fitted.json"
# published mean tokens a step of DeepSeek-V4-Pro's MTP with 1, 2, 3 drafts; more are not known
ACCEPTED = {0: 1.0, 1: 1.79, 2: 2.27, 3: 2.49}


@dataclass(frozen=True)
class Shared:
    """Shares of full rates that all engines reach, and seconds of one exchange beside its volume."""

    read_dense: float
    read_experts: float
    read_cache: float
    math_bf16: float
    math_f8e4m3: float
    math_mxfp4: float
    math_attention: float
    link: float
    exchange: float


@dataclass(frozen=True)
class Engine:
    """Seconds that an engine takes beside the device's work."""

    step: float  # of a step
    kernel: float  # of each kernel of a step
    sequence: float  # of each sequence of a step
    accept: float  # from a request's arrival to its first step
    prefill: float  # of each kernel of a step that reads a prompt, in times of `kernel`
    mixed: float  # share of the other requests' prompts that are read between two tokens of a request; 0 where all are read first
    queue: float  # share of the other requests' prompts that a request waits for


@dataclass(frozen=True)
class Constants:
    """Everything that was fitted, and what it stands on."""

    shared: Shared
    engines: Mapping[str, Engine]
    residuals: Mapping[str, Mapping[str, tuple[float, float]]]
    chips: tuple[str, ...]

    def engine(self, name: str) -> Engine:
        """Return an engine's constants; MoecError for one that was not measured."""
        if name not in self.engines:
            raise MoecError(
                f"there are no measured times of {name!r}", where="--engine", todo=f"engines: {', '.join(self.engines)}"
            )
        return self.engines[name]

    def interval(self, figure: str, engine: str, chip: str) -> tuple[float, float]:
        """Return the factors between which four of five rows lay: of the engine, or, of a chip not fitted to, with the chip left out."""
        rows = self.residuals[figure]
        key = engine if chip in self.chips else "other chips"
        return rows.get(key, rows["other chips"])


@cache
def fitted_constants() -> Constants:
    """Return the constants that moec ships."""
    return constants_of(json.loads(FITTED.read_text(encoding="utf-8")))


def constants_of(data: Mapping[str, Any]) -> Constants:
    """Return constants from plain data."""
    shared = Shared(**{f.name: data["shared"][f.name] for f in fields(Shared)})
    engines = {name: Engine(**{f.name: row[f.name] for f in fields(Engine)}) for name, row in data["engines"].items()}
    residuals = {k: {n: (v[0], v[1]) for n, v in row.items()} for k, row in data["residuals"].items()}
    return Constants(shared, engines, residuals, tuple(data["chips"]))


def work_seconds(demand: Demand, shared: Shared) -> dict[str, float]:
    """Return the seconds of a step's work by cause, without what an engine adds; a demand may hold arrays, so that rows are fitted together."""
    math = {"bf16": shared.math_bf16, "f8e4m3": shared.math_f8e4m3, "mxfp4": shared.math_mxfp4}
    return {
        "experts": np.maximum(demand.expert_read / shared.read_experts, demand.expert_math / math[demand.expert_dtype]),
        "weights": np.maximum(demand.dense_read / shared.read_dense, demand.dense_math / math[demand.dense_dtype]),
        "cache": demand.cache_read / shared.read_cache,
        "attention": demand.attention_math / shared.math_attention,
        "exchange": demand.exchange / shared.link + demand.latency + demand.exchanges * shared.exchange,
    }


def added_seconds(demand: Demand, shared: Shared) -> float:
    """Return the seconds that a prompt adds to a step that goes on anyway and reads the weights."""
    math = {"bf16": shared.math_bf16, "f8e4m3": shared.math_f8e4m3, "mxfp4": shared.math_mxfp4}
    return (
        demand.expert_math / math[demand.expert_dtype]
        + demand.dense_math / math[demand.dense_dtype]
        + demand.attention_math / shared.math_attention
        + demand.exchange / shared.link
    )


def decode_seconds(demand: Demand, shared: Shared, engine: Engine) -> dict[str, float]:
    """Return the seconds of a decoding step by cause."""
    own = engine.step + demand.kernels * engine.kernel + demand.sequences * engine.sequence
    return {**work_seconds(demand, shared), "engine": own}


def prefill_seconds(demand: Demand, shared: Shared, engine: Engine) -> float:
    """Return the seconds of a step that reads a prompt."""
    own = engine.step + demand.kernels * engine.kernel * engine.prefill
    return sum(work_seconds(demand, shared).values()) + own


@dataclass(frozen=True)
class Load:
    """Requests as a benchmark sends them: `batch` at once on each of `ranks` attention ranks, each with a prompt and an answer.

    `apart` says that prompts are read elsewhere.
    """

    batch: float
    ranks: int
    answer: int
    apart: bool = False


def predict_times(
    decode: Demand, prompt: Demand, load: Load, constants: Constants, engine: str, drafts: int = 0, blocks: int = 1
) -> tuple[float, float, dict[str, float]]:
    """Return seconds to the first token, seconds a token, and what a token's time is made of.

    Prompts of new requests are read in steps that decode the others: each request costs the others a
    share of its prompt's work once in the answer's length.
    """
    shared, own = constants.shared, constants.engine(engine)
    step = decode_seconds(decode, shared, own)
    added = added_seconds(prompt, shared)
    others = (load.batch * load.ranks - 1) * (1 - load.apart)
    step["prompts"] = own.mixed * others * added / load.answer
    accepted = ACCEPTED[drafts]
    draft = drafts * sum(step.values()) / blocks  # a draft is about one layer more
    parts = {name: seconds / accepted for name, seconds in {**step, **({"drafts": draft} if drafts else {})}.items()}
    first = own.accept + prefill_seconds(prompt, shared, own) + own.queue * others * added
    return first, sum(parts.values()), parts
