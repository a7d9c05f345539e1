"""Reading a chip's profile from a TOML file, checking it, and finding one by name with a user's own figures.

A figure is a table of value, grade and source, or in a user's own file only the value; a value is a number in SI units or
a text such as "4.8TB/s". A `source` that is a key of the file's [sources] stands for what is written there.
[variants.NAME] holds the figures in which another bin of the chip differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ....compiler.errors import MoecError
from ....compiler.errors.json_files import DIGITS
from ....compiler.errors.json_files import problem_of as why_unreadable
from ....compiler.errors.plugins import CHIPS as BROUGHT
from ....compiler.errors.plugins import entry_points_of, load_brought, refuse_names
from .chip import FIGURES, RULES, TOP, Figure, Link, Memory, Operands, Order, Origin, Profile, Rate, Unit, kind_of
from .families import find_family
from .quantities import parse_quantity
from .schema import problem_of

__all__ = [
    "Figure",
    "Link",
    "Memory",
    "Operands",
    "Order",
    "Origin",
    "Profile",
    "Rate",
    "Unit",
    "find_profile",
    "profile_names",
    "read_profile",
    "shipped_profiles",
]  # fmt: skip

FOLDER = Path(__file__).parent / "profiles"
Raw = dict[str, Any]


def profile_names() -> list[str]:
    """Return the names of the profiles that moec brings along."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def known_profiles() -> list[str]:
    """Return the names of those profiles, and of those that packages outside of moec bring."""
    own = profile_names()
    refuse_names(BROUGHT, set(own))
    return [*own, *entry_points_of(BROUGHT)]


def profile_file(name: str) -> Path | None:
    """Return the TOML file of a name, that of a package too; None if there is none."""
    file = FOLDER / f"{name}.toml"
    if name in profile_names():
        return file
    found = load_brought(BROUGHT, name, (str, Path), "the path of a TOML file")
    return None if found is None else Path(found)


@cache
def shipped_profiles() -> dict[str, Profile]:
    """Return every profile that moec brings along, by name, in the bin that the file describes first."""
    return {name: _shipped_profile(name) for name in profile_names()}


@cache
def _shipped_profile(name: str) -> Profile:
    return read_profile(FOLDER / f"{name}.toml")


def read_profile(path: Path) -> Profile:
    """Return the profile in a TOML file; MoecError names the key that is missing or impossible."""
    return _build_profile(_load_tables(path), path)


def find_profile(name: str, options: Mapping[str, str]) -> Profile:
    """Return the profile of a shipped name or of a path ending in .toml, with a user's figures.

    `options` are KEY=VALUE as given with -D: a KEY of Profile.figures with a value such as 2.0TB/s, or `variant` with
    the name of a bin. Raises MoecError for an unknown name or KEY, with the ones near it, and for a value that cannot be.
    """
    own = name.endswith(".toml")
    path = Path(name) if own else profile_file(name)
    if path is None:
        raise MoecError(f"there is no accelerator {name!r}", todo=_similar_names(name, known_profiles()))
    if name in profile_names() and not options:
        return _shipped_profile(name)
    raw = _load_tables(path)
    if "variant" in options:
        _take_variant(raw, options["variant"], path)
        _check_schema(raw, path)
    for key, value in options.items():
        if key != "variant":
            where = f"-D {key}={value}"
            kind = _override_figure(raw, key, {"value": value, "grade": "U", "source": where}, where)
            try:
                parse_quantity(value, kind)
            except ValueError as error:
                raise MoecError(f"{key} {error}", where=where) from None
    return _build_profile(raw, path)


def _load_tables(path: Path) -> Raw:
    """Return the tables of a TOML file that the schema allows."""
    import tomllib  # here: only who reads a profile pays for it

    try:
        text = path.read_text(encoding="utf-8")
        if re.search(rf"\d{{{DIGITS + 1}}}", text.replace("_", "")):
            raise ValueError(f"a number of more than {DIGITS} digits is too long")
        raw = tomllib.loads(text)
    except OSError as error:
        raise MoecError(f"the profile cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:  # of TOML or of UTF-8
        raise MoecError(f"the profile is not TOML: {why_unreadable(error)}", where=str(path)) from None
    _check_schema(raw, path)
    return raw


def _check_schema(raw: Raw, path: Path) -> None:
    if problem := problem_of(raw):
        raise MoecError(problem[0], where=str(path), todo=problem[1])


# --- a user's figures, and the bins --------------------------------------------------------------------------------


def _take_variant(raw: Raw, name: str, path: Path) -> None:
    """Put the figures of another bin in the place of those of the first."""
    if name == raw.get("variant"):
        return
    variants = raw.get("variants", {})
    if name not in variants:
        known = ", ".join([raw["variant"], *variants] if "variant" in raw else [])
        todo = f"variants: {known}" if known else "it has no variants"
        raise MoecError(f"{raw.get('name', path.stem)} has no variant {name!r}", where=f"-D variant={name}", todo=todo)
    for key, figure in _figures_of_tables(variants[name]):
        if key in ("doc", "arch"):
            raw[key] = figure
        else:
            _override_figure(raw, key, figure, str(path), f"variants.{name}.")
    raw["variants"] = {raw["variant"]: {}, **{other: {} for other in variants if other != name}}
    raw["variant"] = name


def _figures_of_tables(table: Raw, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the figures of nested tables by their dotted keys."""
    for key, value in table.items():
        if isinstance(value, dict) and "value" not in value:
            yield from _figures_of_tables(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _override_figure(raw: Raw, key: str, figure: Any, where: str, prefix: str = "") -> str:
    """Put a figure into the tables and return its kind; MoecError if the chip has none of that key."""
    kind, known = kind_of(key), _figure_keys(raw)
    if kind is None or key not in known:
        raise MoecError(f"{prefix}{key} is no figure of this profile", where=where, todo=_similar_names(key, known))
    *tables, last = key.split(".")
    inner = raw
    for table in tables:
        inner = inner.setdefault(table, {})
    inner[last] = figure
    if last in ("bandwidth", "peak"):
        inner.pop("measured", None)  # it was measured at another one
    return kind


def _figure_keys(raw: Raw) -> list[str]:
    """Return the keys of all figures that a profile may have."""
    found = [*TOP, *(f"rule.{name}" for name in RULES)]
    for table, figures in FIGURES.items():
        found += [f"{table}.{name}.{figure}" for name in raw.get(table, {}) for figure in figures]
    return found + [f"rate.{a}.{b}" for a, targets in raw.get("rate", {}).items() for b in targets]


def _similar_names(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(found)}?" if found else f"there are {', '.join(known)}"


# --- from tables to a profile --------------------------------------------------------------------------------------


class _Reader:
    """Reads figures out of one file's tables; its errors name the key and the file."""

    def __init__(self, raw: Raw, path: Path) -> None:
        self.raw, self.path, self.sources = raw, path, raw.get("sources", {})

    def error(self, what: str, todo: str = "") -> MoecError:
        return MoecError(what, where=str(self.path), todo=todo)

    def source(self, given: str | list[str]) -> str:
        return "; ".join(self.sources.get(s, s) for s in ([given] if isinstance(given, str) else given))

    def origin(self, table: Raw) -> Origin:
        if "grade" not in table:
            return Origin("U", self.path.name)
        return Origin(table["grade"], self.source(table["source"]), table.get("note", ""))

    def figure(self, key: str) -> Figure | None:
        """Return the figure of a dotted key, None if the file does not have it."""
        *tables, last = key.split(".")
        inner = self.raw
        for table in tables:
            inner = inner.get(table, {})
        if last not in inner:
            return None
        given, kind = inner[last], kind_of(key)
        assert kind is not None
        origin = self.origin(given) if isinstance(given, dict) else Origin("U", self.path.name)
        try:
            value = parse_quantity(given["value"] if isinstance(given, dict) else given, kind)
        except ValueError as error:
            raise self.error(f"{key} {error}") from None
        return Figure(value, origin.grade, origin.source, origin.note)

    def figures(self, table: str, name: str) -> dict[str, Figure | None]:
        return {figure: self.figure(f"{table}.{name}.{figure}") for figure in FIGURES[table]}

    def at_most(self, low: str, high: str) -> None:
        """Check that one figure is not greater than another where both are known."""
        small, large = self.figure(low), self.figure(high)
        if small and large and small.value > large.value:
            raise self.error(f"{low} is larger than {high}: {small.value:g} of {large.value:g}")

    def memories_known(self, key: str, names: list[str]) -> None:
        for name in names:
            if name not in self.raw["memory"]:
                raise self.error(
                    f"{key} names a memory {name!r} that is not there", _similar_names(name, [*self.raw["memory"]])
                )


def _build_profile(raw: Raw, path: Path) -> Profile:
    """Return the profile that tables say; MoecError for what a schema cannot see."""
    read = _Reader(raw, path)
    warp = read.figure("threads")
    assert warp is not None
    moves, operands = raw.get("moves", {"paths": {}}), raw.get("operands")
    for source, targets in moves["paths"].items():
        read.memories_known("moves.paths", [source, *targets])
    if operands:
        read.memories_known("operands", [*operands["left"], *operands["right"], operands["result"]])
    layouts = raw.get("layout", {})
    read.memories_known("layout", [*layouts])
    rates = [(a, b) for a, targets in raw.get("rate", {}).items() for b in targets]
    read.memories_known("rate", [name for pair in rates for name in pair])
    if "toolchain" in raw and "arch" not in raw:
        raise read.error("arch is missing: a toolchain compiles for one")
    return Profile(
        name=raw.get("name", path.stem),
        vendor=raw.get("vendor", ""),
        family=find_family(raw["family"]),
        doc=raw.get("doc", ""),
        toolchain=raw.get("toolchain"),
        arch=raw.get("arch"),
        cores=read.figure("cores"),
        vector_cores=read.figure("vector_cores"),
        clock=read.figure("clock"),
        vector_peak=read.figure("vector_peak"),
        memories=tuple(_read_memory(read, name) for name in raw["memory"]),
        moves=tuple((source, target) for source, targets in moves["paths"].items() for target in targets),
        units=tuple(unit for dtype in raw.get("unit", {}) for unit in _read_units(read, dtype)),
        formats=tuple(raw.get("formats", ())),
        links=tuple(_read_link(read, name) for name in raw.get("link", {})),
        launch=read.figure("launch"),
        threads=int(warp.value),
        variants=(raw["variant"], *raw.get("variants", {})) if "variant" in raw else (),
        variant=raw.get("variant", ""),
        operands=operands
        and Operands(tuple(operands["left"]), tuple(operands["right"]), operands["result"], read.origin(operands)),
        layouts=tuple(Order(memory, table["order"], read.origin(table)) for memory, table in layouts.items()),
        rates=tuple(Rate(a, b, _known_figure(read.figure(f"rate.{a}.{b}"))) for a, b in rates),
        rules=tuple((name, _known_figure(read.figure(f"rule.{name}"))) for name in raw.get("rule", {})),
        warp=warp,
        moves_origin=read.origin(moves) if "moves" in raw else None,
    )


def _known_figure(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def _read_memory(read: _Reader, name: str) -> Memory:
    key, figures = f"memory.{name}", read.figures("memory", name)
    read.at_most(f"{key}.usable", f"{key}.capacity")
    read.at_most(f"{key}.measured", f"{key}.bandwidth")
    align = figures["align"]
    return Memory(
        name, figures["capacity"], figures["usable"], figures["bandwidth"], read.raw["memory"][name]["per"],
        int(align.value) if align else 1, align, figures["measured"],
    )  # fmt: skip


def _read_units(read: _Reader, dtype: str) -> Iterator[Unit]:
    """Yield a matrix unit for each of its shapes, one without shapes if the file says none."""
    table, figures = read.raw["unit"][dtype], read.figures("unit", dtype)
    read.at_most(f"unit.{dtype}.measured", f"unit.{dtype}.peak")
    shapes = table.get("shapes")
    if shapes is None:
        yield Unit(dtype, (), (), 1, figures["peak"], measured=figures["measured"])
        return
    for shape in shapes["of"]:
        m, n = (_read_choices(read, f"unit.{dtype}.shapes {side}", shape[side]) for side in "mn")
        cores = shape.get("cores", 1)
        yield Unit(dtype, m, n, shape["k"], figures["peak"], cores, figures["measured"], read.origin(shapes))


def _read_choices(read: _Reader, key: str, given: list[int] | dict[str, int]) -> tuple[int, ...]:
    if isinstance(given, list):
        return tuple(given)
    found = tuple(range(given["first"], given["last"] + 1, given["step"]))
    if not found or found[-1] != given["last"]:
        raise read.error(f"{key} cannot go from {given['first']} to {given['last']} in steps of {given['step']}")
    return found


def _read_link(read: _Reader, name: str) -> Link:
    figures = read.figures("link", name)
    read.at_most(f"link.{name}.measured", f"link.{name}.bandwidth")
    return Link(name, figures["bandwidth"], figures["latency"], figures["domain"], figures["measured"])
