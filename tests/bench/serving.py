"""Fits the constants of predicted serving times to measured rows, and reports the errors on rows that were left out.

    python tests/bench/serving.py --rows nvidia.csv --others others.csv --configs tests/configs --configs more-configs
    python tests/bench/serving.py ... --write          # also puts the constants into targets/serving/fitted.json

nvidia.csv has one measured configuration a row (columns as in aiconfigurator's accuracy_tracking sample), others.csv those of other
makers. Half of the configurations, chosen by a hash, are fitted to; errors are those of the other half, and of each model
and chip when nothing of it was fitted to. The shipped constants are fitted to all rows, their residuals are those of
the halves.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from moec.compiler.driver import import_workload
from moec.targets.serving.candidates import default_cache
from moec.targets.serving.degrees import Degrees
from moec.targets.serving.demand import Demand, decode_demand, prefill_demand
from moec.targets.serving.storage import choose_storage
from moec.targets.serving.timing import FITTED, Constants, Engine, Load, Shared, predict_times
from moec.targets.systems.read import find_system

SHARED = {  # first guess, least, most
    "read_dense": (0.7, 0.3, 0.95), "read_experts": (0.6, 0.2, 0.95), "read_cache": (0.5, 0.1, 0.95),
    "math_bf16": (0.5, 0.1, 0.9), "math_f8e4m3": (0.4, 0.05, 0.9), "math_mxfp4": (0.3, 0.03, 0.9),
    "math_attention": (0.4, 0.05, 0.9), "link": (0.5, 0.05, 0.95), "exchange": (8e-6, 2e-6, 3e-5),
}  # fmt: skip
ENGINE = {
    "step": (1e-3, 1e-5, 1e-2), "kernel": (4e-6, 5e-7, 3e-5), "sequence": (1e-5, 1e-7, 1e-3),
    "accept": (3e-2, 1e-3, 0.3), "prefill": (5.0, 1.0, 30.0), "queue": (0.1, 0.01, 2.0), "mixed": (0.7, 0.02, 1.5),
}  # fmt: skip
MODELS = {  # a model without a config of its own has the shapes of another one
    "DeepSeek-R1": "DeepSeek-V3", "DeepSeek-R1-0528": "DeepSeek-V3", "Kimi-K2-Thinking": "Kimi-K2-Instruct",
    "Qwen3-Coder-30B-A3B": "Qwen3-30B-A3B", "Qwen3.6-35B-A3B": "Qwen3.6-35B-A3B-NVFP4",
}  # fmt: skip
SYSTEMS = {"DGX Spark (GB10)": "dgx-spark", "M2 Ultra": "apple-m2-ultra", "MI300X": "mi300x-x8", "MI355X": "mi355x-x8"}
WEIGHTS = {
    "fp8": "fp8", "fp8, fp8 kv": "fp8", "fp4": "fp4", "nvfp4": "fp4", "mxfp4, fp8 kv": "mxfp4", "bf16": "bf16",
    "mxfp4": None, "q8_0": "int8_g32",
    "q2 (experts IQ2_XXS/Q2_K)": "int8_g32,experts=uint2_g64",
}  # fmt: skip
LOW_LOAD = 16  # requests at once up to which a time to first token is one of low load


@dataclass
class Case:
    """A measured row with what it demands."""

    row: dict
    model: str
    chip: str
    engine: str
    batch: int
    devices: int
    drafts: int
    blocks: int
    decode: Demand
    prompt: Demand
    load: Load
    token: float | None  # s
    first: float | None
    drafted: bool = False  # whether drafting is visible or stated
    beyond: bool = False  # more requests than the cache holds

    @property
    def family(self) -> str:
        """The model whose shapes it has: rows of two names may be one measurement."""
        return MODELS.get(self.model, self.model)

    def half(self) -> int:
        """Return which half of the configurations the row is in: rows of the same work on as many devices are together."""
        stored = self.row.get("precision") or self.row.get("weights")
        key = [self.family, self.chip, self.engine, stored, self.row["isl"], self.row["osl"]]
        return zlib.crc32(json.dumps([*key, self.batch * self.load.ranks, self.devices]).encode()) % 2


def workload_of(model, configs, known={}):  # noqa: B006
    """Return the workload of a model by its config's folder or file."""
    name = MODELS.get(model, model)
    if name not in known:
        found = [folder / name for folder in configs if (folder / name / "config.json").is_file()]
        if not found:
            raise SystemExit(f"there is no config of {name}: give --configs")
        known[name] = import_workload(found[0])
    return known[name]


def divided(row):
    """Return (devices, degrees) of a row of nvidia.csv, and whether its degrees can be meant as they are written.

    Rows that state attention_dp and divide experts both ways (moe_tp 8 and moe_ep 8, tp 64) repeat the figures of rows of 8
    devices: the larger degree is the number of devices. Rows with tp and attention_dp alike (4 and 4, moe_ep 16) do so too.
    Rows without attention_dp are consistent: tp attention_dp = moe_tp moe_ep.
    """
    tp, pp, moe_tp, ep = (int(row[k]) for k in ("tp", "pp", "moe_tp", "moe_ep"))
    if not row["attention_dp"]:
        return Degrees(tp, max(1, moe_tp * ep // tp), ep, pp), moe_tp * ep % tp == 0
    dp = int(row["attention_dp"])
    if moe_tp > 1 and ep > 1:
        group = max(moe_tp, ep)
        return Degrees(1 if dp > 1 else group, group if dp > 1 else 1, group, pp), dp == 1
    if dp > 1 and tp > 1:
        return Degrees(1, tp, tp, pp), tp == dp
    group = max(tp, dp, moe_tp, ep)
    return Degrees(group // dp, dp, ep, pp), group <= 8


def nvidia_cases(file, configs):
    """Yield the cases of aggregated rows whose degrees can be."""
    for row in csv.DictReader(file.open()):
        if row["mode"] != "agg":
            continue
        degrees, sound = divided(row)
        workload = workload_of(row["model"], configs)
        if not sound or (workload.heads % degrees.tp):
            continue
        system = find_system(f"nvidia-{row['chip']}:{degrees.devices}")
        weights = None if row["model"].startswith("gpt-oss") else row["precision"]
        cache = default_cache(system, row["precision"])
        yield make_case(
            row, workload, system, degrees, weights, cache, 0, row["chip"], row["engine"], int(row["batch"])
        )


def other_cases(file, configs):
    """Yield the cases of others.csv."""
    for row in csv.DictReader(file.open()):
        chip, number = row["chip"], int(row["n_chips"])
        system = find_system(f"{SYSTEMS[chip]}:{number}" if chip in SYSTEMS else f"nvidia-{chip.lower()}:{number}")
        ranks = int(found[1]) if (found := re.search(r"DP(\d+)", row["parallel"])) else 1
        degrees = Degrees(number // ranks, ranks, number if ranks > 1 else 1, 1)
        steps = re.search(r"(?:MTP ?|MTP)(\d)", row["spec"])
        drafts = int(steps[1]) if steps else 0
        workload = workload_of(row["model"], configs)
        batch = max(1, int(row["concurrency"]) // ranks)
        cache = "fp8" if "fp8 kv" in row["weights"] else "bf16"
        engine = row["engine"].lower()
        weights = WEIGHTS[row["weights"]]
        case = make_case(row, workload, system, degrees, weights, cache, drafts, chip, engine, batch)
        case.drafted = drafts > 0 or "probable" in row["spec"]
        case.beyond = int(row["concurrency"]) >= 1024 or (case.first or 0) > 10
        yield case


def make_case(row, workload, system, degrees, weights, cache, drafts, chip, engine, batch):
    """Return a row with its demands."""
    storage = choose_storage(workload, weights, cache)
    isl, osl = int(row["isl"]), int(row["osl"])
    decode = decode_demand(workload, system, degrees, storage, batch, isl + osl / 2, drafts)
    prompt = prefill_demand(workload, system, degrees, storage, isl)
    token, first = (float(row[k]) / 1e3 if row[k] else None for k in ("tpot_ms", "ttft_ms"))
    load = Load(batch, degrees.dp, osl)
    return Case(
        row,
        row["model"],
        chip,
        engine,
        batch,
        degrees.devices,
        drafts,
        workload.blocks,
        decode,
        prompt,
        load,
        token,
        first,
    )


def mark_drafted(cases):
    """Mark rows that are a quarter faster than another one of the same configuration, and the version that all of these are of."""
    alike = defaultdict(list)
    keys = ("chip", "engine", "precision", "isl", "osl", "batch", "tp", "attention_dp", "moe_tp", "moe_ep")
    for case in cases:
        alike[(case.model, *(case.row[k] for k in keys))].append(case)
    for group in alike.values():
        slowest = max(c.token for c in group)
        for case in group:
            case.drafted = case.token < 0.75 * slowest or case.row["version"] == "1.2.0rc6.post3"
            case.beyond = case.first > 10


@dataclass
class Group:
    """Cases of one engine and equal operand types as one, with arrays in the place of numbers."""

    engine: str
    drafts: int
    blocks: np.ndarray
    decode: Demand
    prompt: Demand
    load: Load
    token: np.ndarray
    first: np.ndarray
    low: np.ndarray

    def errors(self, constants):
        """Return the logarithms of predicted over measured times a token, and to the first token at low load."""
        early, each, _ = predict_times(
            self.decode, self.prompt, self.load, constants, self.engine, self.drafts, self.blocks
        )
        known, low = ~np.isnan(self.token), self.low & ~np.isnan(self.first)
        return np.log(each / self.token)[known], np.log(early / self.first)[low]


def stacked(kind, items):
    """Return dataclasses of numbers as one of arrays; what is a text is equal in all."""
    columns = {f.name: [getattr(item, f.name) for item in items] for f in fields(kind)}
    return kind(**{k: v[0] if isinstance(v[0], str) else np.array(v, float) for k, v in columns.items()})


def grouped(cases):
    """Return cases as groups that are predicted together."""
    found = defaultdict(list)
    for c in cases:
        found[c.engine, c.drafts, c.decode.expert_dtype, c.decode.dense_dtype].append(c)
    return [
        Group(
            key[0], key[1], np.array([c.blocks for c in group], float),
            stacked(Demand, [c.decode for c in group]), stacked(Demand, [c.prompt for c in group]),
            stacked(Load, [c.load for c in group]),
            np.array([c.token or np.nan for c in group]), np.array([c.first or np.nan for c in group]),
            np.array([c.batch * c.load.ranks <= LOW_LOAD for c in group]),
        )
        for key, group in found.items()
    ]  # fmt: skip


class Fit:
    """Least squares over the logarithms of parameters, with bounds, robust to rows that nothing explains."""

    def __init__(self, cases):
        self.groups = grouped(cases)
        self.engines = sorted({c.engine for c in cases})
        self.names = [("", n) for n in SHARED] + [(e, n) for e in self.engines for n in ENGINE]
        table = [SHARED[n] if not e else ENGINE[n] for e, n in self.names]
        self.start, self.low, self.high = (np.log([row[i] for row in table]) for i in range(3))

    def constants(self, x):
        """Return the constants of a point."""
        values = dict(zip(self.names, np.exp(x), strict=True))
        shared = Shared(**{f.name: float(values["", f.name]) for f in fields(Shared)})
        engines = {e: Engine(**{f.name: float(values[e, f.name]) for f in fields(Engine)}) for e in self.engines}
        return Constants(shared, engines, {}, ())

    def errors(self, x):
        """Return the logarithms of predicted over measured: times a token, then times to the first token at low load."""
        constants = self.constants(x)
        pairs = [group.errors(constants) for group in self.groups]
        return np.concatenate([*(token for token, _ in pairs), *(0.5 * first for _, first in pairs)])

    def solve(self, rounds=25):
        """Return the best point: Gauss and Newton's steps with weights that make far rows count less."""
        x = self.start.copy()

        def total(x):
            e = self.errors(x)
            return np.sum(np.sqrt(1 + (e / 0.1) ** 2)), e

        value, e = total(x)
        damping = 1.0
        for _ in range(rounds):
            jacobian = np.stack([(self.errors(x + 1e-4 * unit) - e) / 1e-4 for unit in np.eye(len(x))], axis=1)
            weight = 1 / np.sqrt(1 + (e / 0.1) ** 2)
            prior = 0.02  # parameters that no row tells stay where they began
            left = jacobian.T @ (weight[:, None] * jacobian) + prior * np.eye(len(x))
            right = jacobian.T @ (weight * e) + prior * (x - self.start)
            while True:
                step = np.linalg.solve(left + damping * np.diag(np.diag(left)), right)
                new = np.clip(x - step, self.low, self.high)
                found, error = total(new)
                if found < value or damping > 1e4:
                    break
                damping *= 4
            if value - found < 1e-4 * value:
                return new if found < value else x
            x, value, e, damping = new, found, error, damping / 3
        return x


def residuals(cases, constants):
    """Return (logarithms of predicted over measured of times a token, those of times to first token at low load)."""
    pairs = [group.errors(constants) for group in grouped(cases)]
    return tuple(np.concatenate([np.zeros(0), *(pair[i] for pair in pairs)]) for i in (0, 1))


def line(title, errors):
    """Return a row of the table: rows, median error factor, that of 90 %, the worst, the median of predicted over measured."""
    if not len(errors):
        return f"| {title} | 0 | | | | |"
    factors = np.exp(np.abs(errors))
    return (f"| {title} | {len(errors)} | {np.median(factors):.2f} | {np.quantile(factors, 0.9):.2f} | {factors.max():.2f} |"
            f" {np.exp(np.median(errors)):.2f} |")  # fmt: skip


def interval(errors):
    """Return the factors on a prediction between which four of five measured values lie."""
    low, high = np.quantile(-errors, [0.1, 0.9])
    return [round(float(np.exp(low)), 3), round(float(np.exp(high)), 3)]


def main():
    """Fit, report, and with --write keep the constants."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--others", type=Path)
    parser.add_argument("--configs", type=Path, action="append", required=True)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--worst", type=int, default=0, help="print so many rows with the largest errors")
    given = parser.parse_args()
    nvidia = list(nvidia_cases(given.rows, given.configs))
    mark_drafted(nvidia)
    others = list(other_cases(given.others, given.configs)) if given.others else []
    cases = [c for c in [*nvidia, *others] if not c.drafted and not c.beyond]
    print(f"{len(cases)} rows without visible drafting and within the cache, of {len(nvidia)} and {len(others)}")
    head = "| fitted to | rows | median | 90 % within | worst | predicted / measured |\n| --- | --- | --- | --- | --- | --- |"
    print("\ntime per token\n\n" + head)
    halves = [[c for c in cases if c.half() == h] for h in (0, 1)]
    crossed, table = [], []
    for h in (0, 1):
        fit = Fit(halves[h])
        constants = fit.constants(fit.solve())
        crossed += [(c, *residuals([c], constants)) for c in halves[1 - h] if c.engine in constants.engines]
    nv = [(c, t, f) for c, t, f in crossed if "precision" in c.row]

    def show(title, chosen):
        token, first = (np.concatenate([row[i] for row in chosen] or [np.zeros(0)]) for i in (1, 2))
        print(line(title, token))
        table.append(line(title, first))

    show("the other half, all", nv)
    for key in ("engine", "chip", "family"):
        for value in sorted({getattr(c, key) for c, _, _ in nv}):
            show(f"the other half: {value}", [row for row in nv if getattr(row[0], key) == value])
    outside = []
    for key in ("family", "chip"):
        for value in sorted({getattr(c, key) for c in cases if "precision" in c.row}):
            fit = Fit([c for c in cases if getattr(c, key) != value])
            constants = fit.constants(fit.solve())
            left = [
                (c, *residuals([c], constants))
                for c in cases
                if getattr(c, key) == value and c.engine in constants.engines
            ]
            outside += left if key == "chip" else []
            show(f"without {value}", left)
    show("others.csv, the other half", [row for row in crossed if "precision" not in row[0].row])
    fit = Fit(cases)
    constants = fit.constants(fit.solve())
    show("all rows, fitted to all", [(c, *residuals([c], constants)) for c in cases])
    drafted = [c for c in others if c.drafted and not c.beyond and c.engine in constants.engines]
    show("others.csv with drafts", [(c, *residuals([c], constants)) for c in drafted])
    print("\ntime to first token, at most 16 requests\n\n" + head)
    print("\n".join(table))
    for name, row in asdict(constants)["engines"].items():
        print(name, {k: float(f"{v:.3g}") for k, v in row.items()})
    print({k: float(f"{v:.3g}") for k, v in asdict(constants.shared).items()})
    worst = sorted(
        ((abs(t[0]), t[0], c) for c in cases for t in [residuals([c], constants)[0]] if len(t)), key=lambda r: -r[0]
    )
    for _, error, case in worst[: given.worst]:
        print(f"{np.exp(error):.2f}", {k: v for k, v in case.row.items() if v and k not in ("source", "date", "mode")})
    if given.write:
        everywhere = [np.concatenate([row[i] for row in outside]) for i in (1, 2)]
        found = {"tpot": {"other chips": interval(everywhere[0])}, "ttft": {"other chips": interval(everywhere[1])}}
        for engine in constants.engines:
            for name, i in (("tpot", 1), ("ttft", 2)):
                errors = np.concatenate([row[i] for row in crossed if row[0].engine == engine] or [np.zeros(0)])
                if len(errors) >= 10:
                    found[name][engine] = interval(errors)
        data = asdict(constants)
        short = {name: {k: float(f"{v:.4g}") for k, v in row.items()} for name, row in data["engines"].items()}
        chips = sorted({f"nvidia-{c.chip}" for c in cases if "precision" in c.row})
        whole = {"rows": len(cases), "chips": chips, "shared": {k: float(f"{v:.4g}") for k, v in data["shared"].items()},
                 "engines": short, "residuals": found}  # fmt: skip
        FITTED.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
