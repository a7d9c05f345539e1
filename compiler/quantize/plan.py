"""The plan of a mixed quantization, quantization.json: a format for every layer and role, to be read and edited.

A plan reaches the pass `quantize` as its option `layers`, a text such as `0..2.attention=int8_g128 3.experts=uint4_g64
head=int8_g64`: layers (none for what stands outside of them), role, format. Experts of one layer may have several:
`3.experts[0..7,9]=uint4_g64 3.experts[8]=uint2_g32`; those that are not named have the format of the pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import MoecError
from ..errors.json_files import no_constant, read_value
from ..formats.table import FORMAT_NAMES, find_format
from .options import ROLES

PLAN = "quantization.json"
VERSION = 1
KEEP = "f32"
MOST_NUMBERS, LONGEST_NUMBER = 65536, 9  # layers or experts of one range, and digits of a number of one
_FIELDS: dict[str, tuple[type, ...]] = {
    "layers": (str, type(None)), "role": (str,), "experts": (str, type(None)), "format": (str,), "bytes": (int,), "kl": (int, float, type(None)),
}  # fmt: skip
_TOP: dict[str, tuple[type, ...]] = {
    "quantization": (int,), "budget": (str,), "method": (str,), "bits_per_weight": (int, float), "bytes": (int,),
    "kl": (int, float), "tokens": (int,), "weights": (list,),
}  # fmt: skip
_LAYERS = re.compile(r"(\d+)(?:\.\.(\d+))?")
_WORD = re.compile(r"(?:(\d+(?:\.\.\d+)?)\.)?([a-z]+)(?:\[([\d.,]+)\])?=([a-z0-9_]+)")


class Unit(NamedTuple):
    """What has one format: a role in a layer (None: outside of the layers), or some experts of a layer (none: all)."""

    layer: int | None
    role: str
    experts: tuple[int, ...] = ()

    def __str__(self) -> str:
        experts = f"[{_spell_numbers(self.experts)}]" if self.experts else ""
        return f"{'' if self.layer is None else f'{self.layer}.'}{self.role}{experts}"


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
        for span, run in _layer_runs(self.entries):
            known = [e.kl for e in run if e.kl is not None]
            weights.append({
                "layers": span, "role": run[0].unit.role,
                "experts": _spell_numbers(run[0].unit.experts) or None, "format": run[0].format, "bytes": sum(e.bytes for e in run),
                "kl": sum(known) if len(known) == len(run) else None,
            })  # fmt: skip
        content = {
            "quantization": VERSION, "budget": self.budget, "method": self.method,
            "bits_per_weight": self.bits_per_weight, "bytes": self.bytes, "kl": self.kl, "tokens": self.tokens,
            "weights": weights,
        }  # fmt: skip
        file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def read_plan(file: Path) -> Plan:
    """Read a plan; MoecError if the file is not a plan, for missing and unknown keys, and for unknown formats."""
    content = read_value(file, "the plan", parse_constant=no_constant)
    _check_object(content, _TOP, "the plan", file)
    if content["quantization"] != VERSION:
        raise MoecError(f"the plan has version {content['quantization']}, {VERSION} is read", where=str(file))
    entries: list[Entry] = []
    for number, weight in enumerate(content["weights"], 1):
        _check_object(weight, _FIELDS, f"entry {number} of the plan", file)
        try:
            units = _parse_units(weight["layers"], weight["role"], weight["experts"], weight["format"])
        except ValueError as error:
            raise MoecError(f"entry {number} of the plan: {error}", where=str(file)) from None
        share = None if weight["kl"] is None else weight["kl"] / len(units)
        entries += [Entry(unit, weight["format"], weight["bytes"] // len(units), share) for unit in units]
    return Plan(
        content["budget"], content["method"], float(content["bits_per_weight"]), content["bytes"],
        float(content["kl"]), content["tokens"], tuple(entries),
    )  # fmt: skip


def _check_object(content: Any, fields: Mapping[str, tuple[type, ...]], what: str, file: Path) -> None:
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
    for span, run in _layer_runs(entries):
        unit = str(run[0].unit._replace(layer=None))
        words.append(f"{'' if span is None else span + '.'}{unit}={run[0].format}")
    return " ".join(words)


def parse_layers(text: str) -> dict[Unit, str]:
    """Return the formats that the option says; MoecError for a text that says none, and for a unit named twice."""
    found: dict[Unit, str] = {}
    for word in text.split():
        match = _WORD.fullmatch(word)
        try:
            if match is None:
                raise ValueError(f"{word!r} does not read")
            units = _parse_units(*match.groups())
        except ValueError as error:
            raise MoecError(f"layers: {error}", todo="as in '0..2.attention=int8_g128 head=int8_g64'") from None
        for unit in units:
            for other in found:
                both = set(unit.experts) & set(other.experts) or not (unit.experts and other.experts)
                if unit[:2] == other[:2] and both:
                    raise MoecError(f"layers: {unit} is named twice", todo="give each layer, role and expert once")
            found[unit] = match[4]
    return found


def _parse_units(layers: str | None, role: str, experts: str | None, format: str) -> list[Unit]:
    if role not in ROLES:
        raise ValueError(f"there is no role {role}; there are {', '.join(ROLES)}")
    if format != KEEP and find_format(format) is None:
        raise ValueError(f"there is no format {format}; there are {KEEP}, {', '.join(FORMAT_NAMES)}")
    numbers = _read_numbers(experts) if experts is not None else ()
    if numbers and role != "experts":
        raise ValueError(f"{role} has no experts")
    if layers is None:
        return [Unit(None, role, numbers)]
    match = _LAYERS.fullmatch(layers)
    if match is None or not _number_range(match):
        raise ValueError(f"{layers!r:.60} names no layers; 3 and 0..5 do")
    return [Unit(n, role, numbers) for n in _number_range(match)]


def _number_range(match: re.Match[str]) -> range:
    """Return the numbers of `3` or `0..5`; ValueError for more of them than a model has layers or experts."""
    first, last = match[1], match[2] or match[1]
    if len(last) > LONGEST_NUMBER or int(last) - int(first) >= MOST_NUMBERS:
        raise ValueError(f"{match[0]:.40} is more than {MOST_NUMBERS} layers or experts")
    return range(int(first), int(last) + 1)


def _read_numbers(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for word in text.split(","):
        match = _LAYERS.fullmatch(word)
        if match is None or not _number_range(match):
            raise ValueError(f"{text!r:.60} names no experts; 0..3,7 does")
        found += _number_range(match)
        if len(found) > MOST_NUMBERS:
            raise ValueError(f"{text!r:.60} is more than {MOST_NUMBERS} experts")
    if len(set(found)) != len(found):
        raise ValueError(f"{text!r} names an expert twice")
    return tuple(sorted(found))


def _spell_numbers(numbers: Sequence[int]) -> str:
    words: list[list[int]] = []
    for number in numbers:
        if words and words[-1][1] == number - 1:
            words[-1][1] = number
        else:
            words.append([number, number])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in words)


def _layer_runs(entries: Iterable[Entry]) -> list[tuple[str | None, list[Entry]]]:
    """Return entries put together where neighbouring layers have the same role and format, with the layers as text."""
    ordered = sorted(entries, key=lambda e: (e.unit.layer is None, e.unit.role, e.unit.layer or 0, e.unit.experts))
    runs: list[list[Entry]] = []
    for entry in ordered:
        last = runs[-1][-1] if runs else None
        before = entry.unit._replace(layer=entry.unit.layer - 1) if entry.unit.layer else None
        if last is not None and last.unit == before and last.format == entry.format:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    found = []
    for run in runs:
        first, end = run[0].unit.layer, run[-1].unit.layer
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
