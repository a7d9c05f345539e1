"""The plan of a mixed quantization, quantization.json: a format for every layer and role, to be read and edited.

A plan reaches the pass `quantize` as its option `layers`, a text such as `0..2.attention=int8_g128 3.experts=uint4_g64
head=int8_g64`: layers (none for what stands outside of them), role, format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from .errors import MoecError
from .formats import FORMAT_NAMES, find_format
from .roles import ROLES

PLAN = "quantization.json"
VERSION = 1
KEEP = "f32"
_FIELDS: dict[str, tuple[type, ...]] = {
    "layers": (str, type(None)), "role": (str,), "format": (str,), "bytes": (int,), "kl": (int, float, type(None)),
}  # fmt: skip
_TOP: dict[str, tuple[type, ...]] = {
    "quantization": (int,), "budget": (str,), "method": (str,), "bits_per_weight": (int, float), "bytes": (int,),
    "kl": (int, float), "tokens": (int,), "weights": (list,),
}  # fmt: skip
_LAYERS = re.compile(r"(\d+)(?:\.\.(\d+))?")
_WORD = re.compile(r"(?:(\d+(?:\.\.\d+)?)\.)?([a-z]+)=([a-z0-9_]+)")

Unit = tuple[int | None, str]  # a layer (None: outside of the layers) and a role


@dataclass(frozen=True)
class Entry:
    """The format of one role in one layer, the bytes that it takes, and what it is expected to cost: KL in nats."""

    unit: Unit
    format: str
    bytes: int
    kl: float | None = None


@dataclass(frozen=True)
class Plan:
    """Formats of all units under a budget; `tokens` is how many the sensitivities were measured on."""

    budget: str
    method: str
    bits_per_weight: float
    bytes: int
    kl: float
    tokens: int
    entries: tuple[Entry, ...]

    def layers(self) -> str:
        """Return the option `layers` of the pass quantize."""
        return spell_layers({e.unit: e.format for e in self.entries})

    def write(self, file: Path) -> None:
        """Write quantization.json; neighbouring layers with the same format are one entry."""
        weights = []
        for span, run in _runs(self.entries):
            known = [e.kl for e in run if e.kl is not None]
            weights.append({
                "layers": span, "role": run[0].unit[1], "format": run[0].format, "bytes": sum(e.bytes for e in run),
                "kl": sum(known) if len(known) == len(run) else None,
            })  # fmt: skip
        content = {
            "quantization": VERSION, "budget": self.budget, "method": self.method,
            "bits_per_weight": self.bits_per_weight, "bytes": self.bytes, "kl": self.kl, "tokens": self.tokens,
            "weights": weights,
        }  # fmt: skip
        file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def read_plan(file: Path) -> Plan:
    """Read a plan; MoecError for a file that is none, for missing and unknown keys, and for unknown formats."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise MoecError(f"cannot read the plan: {error.strerror}", where=str(file)) from error
    except ValueError as error:
        raise MoecError(f"the plan is not JSON: {error}", where=str(file)) from None
    _check(content, _TOP, "the plan", file)
    if content["quantization"] != VERSION:
        raise MoecError(f"the plan has version {content['quantization']}, {VERSION} is read", where=str(file))
    entries: list[Entry] = []
    for number, weight in enumerate(content["weights"], 1):
        _check(weight, _FIELDS, f"entry {number} of the plan", file)
        try:
            units = _units(weight["layers"], weight["role"], weight["format"])
        except ValueError as error:
            raise MoecError(f"entry {number} of the plan: {error}", where=str(file)) from None
        share = None if weight["kl"] is None else weight["kl"] / len(units)
        entries += [Entry(unit, weight["format"], weight["bytes"] // len(units), share) for unit in units]
    return Plan(
        content["budget"], content["method"], float(content["bits_per_weight"]), content["bytes"],
        float(content["kl"]), content["tokens"], tuple(entries),
    )  # fmt: skip


def _check(content: Any, fields: Mapping[str, tuple[type, ...]], what: str, file: Path) -> None:
    if not isinstance(content, dict):
        raise MoecError(f"{what} is not an object", where=str(file), todo=f"its keys: {', '.join(fields)}")
    missing, unknown = sorted(set(fields) - set(content)), sorted(set(content) - set(fields))
    if missing or unknown:
        lacks = f"lacks {', '.join(missing)}" if missing else f"has the unknown key {', '.join(unknown)}"
        raise MoecError(f"{what} {lacks}", where=str(file), todo=f"its keys: {', '.join(fields)}")
    for key, types in fields.items():
        if not isinstance(content[key], types) or isinstance(content[key], bool):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise MoecError(f"{key} of {what} is {content[key]!r}, not {names}", where=str(file))


# --- the option of the pass ------------------------------------------------------------------------------------


def spell_layers(formats: Mapping[Unit, str]) -> str:
    """Return formats as the option `layers` of the pass quantize."""
    entries = [Entry(unit, format, 0) for unit, format in formats.items()]
    words = []
    for span, run in _runs(entries):
        words.append(f"{'' if span is None else span + '.'}{run[0].unit[1]}={run[0].format}")
    return " ".join(words)


def parse_layers(text: str) -> dict[Unit, str]:
    """Return the formats that the option says; MoecError for a text that says none, and for a unit named twice."""
    found: dict[Unit, str] = {}
    for word in text.split():
        match = _WORD.fullmatch(word)
        try:
            if match is None:
                raise ValueError(f"{word!r} does not read")
            units = _units(*match.groups())
        except ValueError as error:
            raise MoecError(f"layers: {error}", todo="as in '0..2.attention=int8_g128 head=int8_g64'") from None
        for unit in units:
            if unit in found:
                raise MoecError(f"layers: {unit_name(unit)} is named twice", todo="give each layer and role once")
            found[unit] = match[3]
    return found


def unit_name(unit: Unit) -> str:
    """Return how a unit is written."""
    return unit[1] if unit[0] is None else f"{unit[0]}.{unit[1]}"


def _units(layers: str | None, role: str, format: str) -> list[Unit]:
    if role not in ROLES:
        raise ValueError(f"there is no role {role}; there are {', '.join(ROLES)}")
    if format != KEEP and find_format(format) is None:
        raise ValueError(f"there is no format {format}; there are {KEEP}, {', '.join(FORMAT_NAMES)}")
    if layers is None:
        return [(None, role)]
    match = _LAYERS.fullmatch(layers)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"{layers!r} names no layers; 3 and 0..5 do")
    return [(n, role) for n in range(int(match[1]), int(match[2] or match[1]) + 1)]


def _runs(entries: Iterable[Entry]) -> list[tuple[str | None, list[Entry]]]:
    """Return entries put together where neighbouring layers have the same role and format, with the layers as text."""
    ordered = sorted(entries, key=lambda e: (e.unit[0] is None, e.unit[1], e.unit[0] or 0))
    runs: list[list[Entry]] = []
    for entry in ordered:
        last = runs[-1][-1] if runs else None
        follows = last is not None and last.unit[0] is not None and entry.unit == (last.unit[0] + 1, last.unit[1])
        if follows and last is not None and last.format == entry.format:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    found = []
    for run in runs:
        first, end = run[0].unit[0], run[-1].unit[0]
        found.append((None if first is None else str(first) if first == end else f"{first}..{end}", run))
    return found


# --- budgets ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Bits of a weight on average over the weights that a plan stores, or the bytes of all weights together."""

    text: str
    bits: Fraction | None
    bytes: int | None

    @staticmethod
    def parse(text: str) -> Budget:
        """Return what `4.5bpw`, `6GB` or `900MB` says; MoecError for another text."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(bpw|[kMGT]?B)", text.strip())
        if match is None or not float(match[1]):
            raise MoecError(f"{text!r} is no budget", todo="as in 4.5bpw (bits per weight) or 6GB (of all weights)")
        number = Fraction(match[1])
        if match[2] == "bpw":
            return Budget(text, number, None)
        return Budget(text, None, int(number * 1000 ** " kMGT".index(match[2][:-1] or " ")))
