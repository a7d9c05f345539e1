"""Reading systems from TOML files, checking them, and finding one by name, by `PROFILE:N` or by path.

A figure is a table of value, grade and source, in a user's own file a bare value; a fabric may take its figures from a link of
the device's profile. `nvidia-h200:8` is eight such devices, joined as the profile's links say or cut out of the system that ships with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ...compiler.errors import MoecError
from ...compiler.errors.json_files import problem_of as why_unreadable
from ..accelerator.chip.chip import GRADES, Figure, Profile
from ..accelerator.chip.profile import find_profile, profile_names
from ..accelerator.chip.quantities import parse_quantity
from .system import SHAPES, Device, Fabric, Host, System

FOLDER = Path(__file__).parent / "data"
DTYPES = ("bf16", "f8e4m3", "mxfp4", "i8")
LATENCY = Figure(2e-6, "K", "general knowledge: a few microseconds from sending to arriving")
KEYS = {
    "": ("name", "doc", "device", "devices", "unified", "fabric", "host", "storage", "power", "sources"),
    "device": ("name", "memory", "bandwidth", "peak"),
    "fabric": ("shape", "span", "link", "bandwidth", "latency"),
    "host": ("memory", "bandwidth", "link", "devices"),
    "storage": ("bandwidth",),
    "figure": ("value", "grade", "source", "note"),
    "peak": DTYPES,
}


def system_names() -> list[str]:
    """Return the names of the systems that moec brings along."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


@cache
def find_system(name: str) -> System:
    """Return the system of a name, of a path ending in .toml, of `PROFILE:N` and `SYSTEM:N`, or `here`; MoecError for others."""
    if name.endswith(".toml"):
        return read_system(Path(name))
    if name == "here":
        from .here import measure_here  # numpy takes a while, and measuring too

        return measure_here()
    base, colon, count = name.rpartition(":") if ":" in name else (name, "", "1")
    if colon and not (count.isascii() and count.isdigit() and 0 < int(count) <= 65536):
        raise MoecError(f"{name!r} does not end in a number of devices", todo="as in --on nvidia-h200:8")
    if base in system_names():
        system = read_system(FOLDER / f"{base}.toml")
        return system.of_devices(int(count)) if colon else system
    if base in profile_names():
        return _of_profile(base, int(count))
    known = [*system_names(), *profile_names()]
    near = get_close_matches(base, known, n=3, cutoff=0.5)
    todo = f"did you mean {' or '.join(near)}?" if near else "moec list systems shows them"
    raise MoecError(f"there is no system {base!r}", todo=todo)


def read_system(path: Path) -> System:
    """Return the system in a TOML file; MoecError names the key that is missing or impossible."""
    import tomllib  # here: only who reads a system pays for it

    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoecError(f"the system cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise MoecError(f"the system is not TOML: {why_unreadable(error)}", where=str(path)) from None
    return _Reader(raw, path).system()


def _of_profile(name: str, devices: int) -> System:
    """Return devices of a profile: cut out of a shipped system that has so many of them, else joined by the profile's links."""
    shipped = [read_system(FOLDER / f"{n}.toml") for n in system_names()]
    fitting = [s for s in shipped if s.cards == name and s.devices >= devices]
    if fitting:
        return min(fitting, key=lambda s: s.devices).of_devices(devices)
    profile = find_profile(name, {})
    fabrics = [
        Fabric(link.name, "switch", int(link.domain.value) if link.domain else devices, link.bandwidth,
               link.latency or LATENCY)
        for link in profile.links if link.bandwidth and link.name != "c2c"
    ]  # fmt: skip
    return System(f"{name}:{devices}", profile.doc, _profile_device(profile), devices, tuple(fabrics), cards=name)


def _profile_device(profile: Profile) -> Device:
    """Return what a plan asks of a chip; MoecError for a figure that its profile does not know."""
    outer = profile.memories[0]
    profile.need(f"memory.{outer.name}.capacity")
    profile.need(f"memory.{outer.name}.bandwidth")
    if outer.capacity is None or outer.bandwidth is None:
        raise MoecError(f"the memory of {profile.name} is unknown")
    peaks = {u.dtype: u.peak for u in profile.units if u.peak and u.dtype in DTYPES}
    return Device(profile.name, outer.capacity, outer.bandwidth, peaks)


class _Reader:
    """Reads the tables of one file; its errors name the key and the file."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def error(self, what: str, todo: str = "") -> MoecError:
        return MoecError(what, where=str(self.path), todo=todo)

    def system(self) -> System:
        """Return the system that the tables describe."""
        raw = self.table("", self.raw, "")
        if "device" not in raw:
            raise self.error("device is missing", "the name of a profile (moec targets), or a table of figures")
        profile = self.profile(raw["device"]) if isinstance(raw["device"], str) else None
        device = _profile_device(profile) if profile else self.device(raw["device"])
        devices = self.count("devices", raw.get("devices", 1))
        fabrics = [self.fabric(name, table, profile, devices) for name, table in self.tables("fabric").items()]
        if devices > 1 and not any(f.span >= devices for f in fabrics):
            raise self.error(f"no fabric joins all {devices} devices", "a fabric without span does")
        storage = self.table("storage", self.tables("storage"), "storage")
        return System(
            name=str(raw.get("name", self.path.stem)),
            doc=str(raw.get("doc", "")),
            device=device,
            devices=devices,
            fabrics=tuple(sorted(fabrics, key=lambda f: f.span)),
            host=self.host(devices) if "host" in raw else None,
            storage=self.figure("storage.bandwidth", storage["bandwidth"], "bytes/s") if storage else None,
            unified=bool(raw.get("unified", False)),
            cards=profile.name if profile else "",
            power=self.figure("power", raw["power"], "W") if "power" in raw else None,
        )

    def profile(self, name: str) -> Profile:
        """Return the profile of a name, or of a file beside this one."""
        return find_profile(str(self.path.parent / name) if name.endswith(".toml") else name, {})

    def tables(self, key: str) -> Mapping[str, Any]:
        found = self.raw.get(key, {})
        if not isinstance(found, dict):
            raise self.error(f"{key} must be a table")
        return found

    def table(self, kind: str, table: Any, key: str) -> Mapping[str, Any]:
        """Return a table after checking the names of its keys."""
        if not isinstance(table, dict):
            raise self.error(f"{key} must be a table")
        for name in table:
            if name not in KEYS[kind]:
                near = get_close_matches(name, KEYS[kind], n=1)
                todo = f"did you mean {near[0]}?" if near else f"keys: {', '.join(KEYS[kind])}"
                raise self.error(f"{key + '.' if key else ''}{name} is no key of a system", todo)
        return table

    def need(self, table: Mapping[str, Any], key: str, name: str) -> Any:
        if name not in table:
            raise self.error(f"{key}.{name} is missing")
        return table[name]

    def count(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65536:
            raise self.error(f"{key} must be a whole number from 1 to 65536, not {value!r}")
        return value

    def figure(self, key: str, given: Any, kind: str) -> Figure:
        """Return a figure in SI units."""
        plain = not isinstance(given, dict)
        table = {"value": given} if plain else self.table("figure", given, key)
        value = self.need(table, key, "value")
        if not isinstance(value, (int, float, str)) or isinstance(value, bool):
            raise self.error(f"{key} must be a number or a text such as 64GB")
        grade = table.get("grade", "U")
        if grade not in GRADES:
            raise self.error(f"{key}.grade must be one of {', '.join(GRADES)}, not {grade!r}")
        source = str(table.get("source", self.path.name))
        try:
            number = parse_quantity(value, kind)
        except ValueError as error:
            raise self.error(f"{key} {error}") from None
        return Figure(number, grade, str(self.tables("sources").get(source, source)), str(table.get("note", "")))

    def device(self, given: Any) -> Device:
        table = self.table("device", given, "device")
        peaks = self.table("peak", self.need(table, "device", "peak"), "device.peak")
        return Device(
            str(table.get("name", self.raw.get("name", self.path.stem))),
            self.figure("device.memory", self.need(table, "device", "memory"), "bytes"),
            self.figure("device.bandwidth", self.need(table, "device", "bandwidth"), "bytes/s"),
            {dtype: self.figure(f"device.peak.{dtype}", value, "FLOP/s") for dtype, value in peaks.items()},
        )

    def fabric(self, name: str, given: Any, profile: Profile | None, devices: int) -> Fabric:
        key = f"fabric.{name}"
        table = self.table("fabric", given, key)
        shape = table.get("shape", "switch")
        if shape not in SHAPES:
            raise self.error(f"{key}.shape must be one of {', '.join(SHAPES)}, not {shape!r}")
        bandwidth, latency = None, LATENCY
        if "link" in table:
            if profile is None:
                raise self.error(f"{key}.link names a link of a profile, and the device has none")
            link = profile.link(table["link"])
            bandwidth, latency = link.bandwidth, link.latency or LATENCY
        if "bandwidth" in table or bandwidth is None:
            bandwidth = self.figure(f"{key}.bandwidth", self.need(table, key, "bandwidth"), "bytes/s")
        if "latency" in table:
            latency = self.figure(f"{key}.latency", table["latency"], "s")
        return Fabric(name, shape, self.count(f"{key}.span", table.get("span", devices)), bandwidth, latency)

    def host(self, devices: int) -> Host:
        table = self.table("host", self.tables("host"), "host")
        return Host(
            self.figure("host.memory", self.need(table, "host", "memory"), "bytes"),
            self.figure("host.bandwidth", self.need(table, "host", "bandwidth"), "bytes/s"),
            self.figure("host.link", table["link"], "bytes/s") if "link" in table else None,
            self.count("host.devices", table.get("devices", devices)),
        )
