"""What is known of a chip: its memories, matrix units and links, each figure with where it is from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ....compiler.errors import MoecError
from .families import Family
from .quantities import EXAMPLES

GRADES = {
    "P": "primary document or source code",
    "T": "a third party's transcription of a primary document",
    "M": "measured on the device",
    "S": "secondary page only",
    "D": "derived by arithmetic from other figures",
    "K": "general knowledge, not looked up: verify before relying on it",
    "U": "given by the user",
}
RULES = {  # name: kind and what it says; a chip to which one does not apply does not have it
    "fractal_rows": ("count", "rows of one fractal of L0A and columns of one of L0B"),
    "fractal_bytes": ("bytes", "bytes of a row of such a fractal"),
    "l0a_buffers": ("count", "parts into which L0A is split, to load one while another is read"),
    "l0b_buffers": ("count", "parts of L0B, likewise"),
    "l0c_buffers": ("count", "parts of L0C, to drain one while another accumulates"),
    "bias_table_bytes": ("bytes", "the cube's bias table, of each core"),
    "simt_cache_bytes": ("bytes", "least that SIMT code takes out of the unified buffer as its data cache"),
    "simt_cache_most_bytes": ("bytes", "most that it takes"),
    "store_align_bytes": ("bytes", "alignment that writes to the device memory are fastest at"),
    "gather_bytes": ("bytes", "bytes of a row of the device memory that gathers are fastest at"),
    "stack_bytes": ("bytes", "taken out of a core's and a cluster's memory by the compiler for its stack"),
    "compute_align": ("count", "elements of which a vector operation takes multiples"),
    "cores_per_cluster": ("count", "cores that share a cluster's memory"),
    "dies": ("count", "dies in the device, each a device of its own to a program; figures are for all of them"),
    "cluster_blocks": ("count", "blocks of one cluster that can share data and multicast"),
    "tile_k_bytes": ("bytes", "bytes along K of a tile in shared memory (one swizzle span)"),
    "tensor_lanes": ("count", "rows of tensor memory"),
    "tensor_columns": ("count", "columns of tensor memory, of 4 bytes each"),
    "registers_per_thread": ("count", "32-bit registers that one thread may have"),
    "threads_per_block": ("count", "most threads of one block"),
    "blocks": ("count", "most blocks of one launch"),
    "mx_group": ("count", "values that share a scale in the chip's MX formats"),
}  # fmt: skip
FIGURES = {
    "memory": {"capacity": "bytes", "usable": "bytes", "bandwidth": "bytes/s", "measured": "bytes/s", "align": "bytes"},
    "unit": {"peak": "FLOP/s", "measured": "FLOP/s"},
    "link": {"bandwidth": "bytes/s", "measured": "bytes/s", "latency": "s", "domain": "count"},
}
TOP = {
    "cores": "count", "vector_cores": "count", "clock": "Hz", "vector_peak": "FLOP/s", "launch": "s",
    "threads": "count",
}  # fmt: skip


def kind_of(key: str) -> str | None:
    """Return the kind (of quantities.UNITS) of a figure by its key such as `memory.l2.bandwidth`; None for another key."""
    match key.split("."):
        case [name]:
            return TOP.get(name)
        case ["rule", name]:
            return RULES[name][0] if name in RULES else None
        case ["rate", _, _]:
            return "bytes"
        case ["memory" | "unit" | "link" as table, _, figure]:
            return FIGURES[table].get(figure)
    return None


@dataclass(frozen=True)
class Figure:
    """One number in SI units (bytes, bytes/s, FLOP/s, s, Hz, counts) with its grade (of GRADES) and source."""

    value: float
    grade: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class Origin:
    """Grade and source of what is no single number."""

    grade: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class Memory:
    """A memory; `capacity` is of one unit of it (see `per`), `bandwidth` is reading by the whole device.

    `usable` is what one kernel's block may take where that is less; `measured` the bandwidth that a copy reached.
    """

    name: str
    capacity: Figure | None
    usable: Figure | None
    bandwidth: Figure | None
    per: str  # device, core, vector (one of Ascend's vector cores) or cluster
    align: int  # bytes of the smallest aligned piece
    alignment: Figure | None = None  # where `align` is from
    measured: Figure | None = None


@dataclass(frozen=True)
class Unit:
    """A shape of the matrix unit's instruction for one operand type, with the dense peak of the whole device.

    A chip whose instructions take any aligned size has no shapes: `m` and `n` are empty and `k` is 1.
    """

    dtype: str
    m: tuple[int, ...]
    n: tuple[int, ...]
    k: int
    peak: Figure | None
    cores: int = 1  # cores that work on one instruction together
    measured: Figure | None = None  # what a large matrix product reached
    origin: Origin | None = None  # where the shape is from


@dataclass(frozen=True)
class Link:
    """A link, one way and per device; `domain` is the devices that it joins, `measured` what an exchange reached."""

    name: str
    bandwidth: Figure | None
    latency: Figure | None
    domain: Figure | None
    measured: Figure | None = None


@dataclass(frozen=True)
class Operands:
    """The memories that the matrix unit can take its left and right operand from, and the one it accumulates in."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    result: str
    origin: Origin | None = None


@dataclass(frozen=True)
class Order:
    """The order of elements that a memory holds matrices in, by its name in the field (zN, nZ, FRACTAL_NZ ...)."""

    memory: str
    order: str
    origin: Origin


@dataclass(frozen=True)
class Rate:
    """Bytes that one core moves from one memory to another in a cycle, for chips that say it that way."""

    source: str
    target: str
    per_cycle: Figure


@dataclass(frozen=True)
class Profile:
    """A chip; what is unknown is None or absent. Memories stand from the outermost (the device's) to the innermost."""

    name: str
    vendor: str
    family: Family
    doc: str
    toolchain: str | None
    arch: str | None
    cores: Figure | None
    vector_cores: Figure | None
    clock: Figure | None
    vector_peak: Figure | None
    memories: tuple[Memory, ...]
    moves: tuple[tuple[str, str], ...]
    units: tuple[Unit, ...]
    formats: tuple[str, ...]
    links: tuple[Link, ...]
    launch: Figure | None
    threads: int
    variants: tuple[str, ...]  # names of all bins, the shown one first
    variant: str = ""  # the bin that the figures are of
    operands: Operands | None = None
    layouts: tuple[Order, ...] = ()
    rates: tuple[Rate, ...] = ()
    rules: tuple[tuple[str, Figure], ...] = ()
    warp: Figure | None = None  # where `threads` is from
    moves_origin: Origin | None = None

    def memory(self, name: str) -> Memory:
        """Return a memory by name; MoecError if the chip has none of it."""
        for memory in self.memories:
            if memory.name == name:
                return memory
        raise MoecError(
            f"{self.name} has no memory {name!r}", todo=f"memories: {', '.join(m.name for m in self.memories)}"
        )

    def unit(self, dtype: str) -> Unit | None:
        """Return the matrix unit for an operand type in its first shape, None if there is none."""
        return next((unit for unit in self.units if unit.dtype == dtype), None)

    def link(self, name: str) -> Link:
        """Return a link by name; MoecError if the chip has none of it."""
        for link in self.links:
            if link.name == name:
                return link
        raise MoecError(f"{self.name} has no link {name!r}", todo=f"links: {', '.join(n.name for n in self.links)}")

    def rule(self, name: str) -> int | None:
        """Return a whole number of RULES, None where it does not apply to the chip."""
        assert name in RULES
        return next((int(figure.value) for key, figure in self.rules if key == name), None)

    def rate(self, source: str, target: str) -> float | None:
        """Return bytes/s from one memory to another of the whole device: bytes a cycle x cores x clock, or None."""
        if self.cores is None or self.clock is None:
            return None
        scale = self.cores.value * self.clock.value
        return next((r.per_cycle.value * scale for r in self.rates if (r.source, r.target) == (source, target)), None)

    def figures(self) -> dict[str, Figure | None]:
        """Return every figure by its key, None for one that is unknown; rules that do not apply are left out."""
        found: dict[str, Figure | None] = {
            "cores": self.cores, "vector_cores": self.vector_cores, "clock": self.clock,
            "vector_peak": self.vector_peak, "launch": self.launch, "threads": self.warp,
        }  # fmt: skip
        if not self.family.has_vector_cores:
            del found["vector_cores"]
        for m in self.memories:
            own = {"capacity": m.capacity, "usable": m.usable, "bandwidth": m.bandwidth, "measured": m.measured,
                   "align": m.alignment}  # fmt: skip
            found |= {f"memory.{m.name}.{key}": figure for key, figure in own.items()}
        for u in self.units:
            found |= {f"unit.{u.dtype}.peak": u.peak, f"unit.{u.dtype}.measured": u.measured}
        for n in self.links:
            own = {"bandwidth": n.bandwidth, "measured": n.measured, "latency": n.latency, "domain": n.domain}
            found |= {f"link.{n.name}.{key}": figure for key, figure in own.items()}
        found |= {f"rate.{r.source}.{r.target}": r.per_cycle for r in self.rates}
        return found | {f"rule.{name}": figure for name, figure in self.rules}

    @cached_property
    def _figures(self) -> dict[str, Figure | None]:
        return self.figures()

    def need(self, key: str) -> float:
        """Return the figure of a key such as `memory.l2.bandwidth` in SI units.

        `memory.NAME.usable` is the capacity where no less is usable. Raises MoecError, which says how to give the
        figure, if it is unknown, and for a key that the chip does not have.
        """
        figures = self._figures
        if key not in figures:
            raise MoecError(f"{self.name} has no figure {key}", todo=near_key(key, figures))
        figure = figures[key]
        if figure is None and key.endswith(".usable"):
            return self.need(key.removesuffix("usable") + "capacity")
        if figure is None:
            example = EXAMPLES[kind_of(key) or "count"]
            raise MoecError(
                f"{key} of {self.name} is unknown, and it is needed",
                todo=f"give it with -D {key}={example} (your figure), or in a TOML of your own: --target my-chip.toml",
            )
        return figure.value


def near_key(key: str, known: dict[str, Figure | None]) -> str:
    """Return advice with the known keys that look like one, or which there are."""
    from difflib import get_close_matches

    if found := get_close_matches(key, list(known), n=3):
        return f"did you mean {' or '.join(found)}?"
    return f"figures: {', '.join(known)}"
