"""Compiled kernels beside their sources, and what the compiler says they take of the chip.

A tile is chosen by prediction; where its kernel cannot be compiled, or spills registers, the next one in the search's
order takes its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from ....compiler.errors import MoecError, write_error
from ....compiler.ir.notes import Note
from ....compiler.weights.memory import usable_threads
from ..chip.chip import Profile
from ..select.search import Choice
from ..triton.architectures import architecture_of
from ..triton.compile import Compiled, Request, compile_request_of
from ..triton.predict import predict_shared
from ..triton.workers import compile_all
from .ascend_objects import find_environment, lower_kernels
from .spec import Kernels, KernelSpec

SHOWN = 3  # names of kernels in a note

Made: TypeAlias = "Compiled | MoecError"
Compile = Callable[[Sequence[Request], int], Sequence[Made]]


@dataclass(frozen=True)
class Objects:
    """Kernels with what was made of them, and the files: name -> content."""

    kernels: Kernels
    files: Mapping[str, bytes]


def compile_kernels(
    kernels: Kernels, profile: Profile, folder: str, make: Compile = compile_all, make_toolchain: bool = False
) -> Objects:
    """Return the kernels with objects for the chip; their files have names below `folder`.

    Where nothing compiles for the chip here the kernels stay as they are, with the reason in the place of an object.
    `make` compiles; tests give their own. `make_toolchain` makes the environment of triton-ascend if there is none.
    """
    arch = profile.arch or ""
    if profile.toolchain == "triton-ascend":
        return Objects(*lower_kernels(kernels, arch, folder, *find_environment(make_toolchain)))
    if profile.toolchain != "triton":
        return Objects(kernels, {})
    try:
        architecture_of(arch)
        chosen = _choose_compiled(kernels.kernels, arch, make)
    except MoecError as error:  # there is no compiler, or none for this chip
        reason = {"arch": arch, "error": "; ".join(filter(None, (error.what, error.todo)))}
        return Objects(_with_specs(kernels, (replace(k, objects={arch: reason}) for k in kernels.kernels)), {})
    files: dict[str, bytes] = {}
    specs = []
    for kernel, made in chosen:
        entry = _object_entry(kernel, made, arch)
        if isinstance(made, Compiled):
            name = f"{folder}/{kernel.name}{made.suffix}"
            files[name] = made.object
            entry["file"] = name
        specs.append(replace(kernel, objects={arch: entry}))
    return Objects(_with_specs(kernels, specs), files)


def _with_specs(kernels: Kernels, specs: Iterable[KernelSpec]) -> Kernels:
    return replace(kernels, kernels=tuple(specs))


def _choose_compiled(specs: Sequence[KernelSpec], arch: str, make: Compile) -> list[tuple[KernelSpec, Made]]:
    """Compile each kernel's tile, then the next ones of those that fail or spill; equal kernels are compiled once."""
    made: dict[tuple[Any, int], Made] = {}
    orders = [(k.found.best, *k.found.others) for k in specs]
    places = [0] * len(specs)

    def current(i: int) -> Choice:
        return orders[i][places[i]]

    pending = list(range(len(specs)))
    while pending:
        wanted = {key: c for i in pending if (key := _compile_key(c := current(i))) not in made}
        jobs = [compile_request_of(c.program, arch, c.tile.warps) for c in wanted.values()]
        made |= dict(zip(wanted, make(jobs, usable_threads()) if jobs else (), strict=True))
        pending = [
            i for i in pending if not _is_good(made[_compile_key(current(i))]) and places[i] + 1 < len(orders[i])
        ]
        for i in pending:
            places[i] += 1
    for i, order in enumerate(orders):  # none is good: the one that the search chose, if it can be compiled
        if not _is_good(made[_compile_key(current(i))]):
            places[i] = next((n for n, c in enumerate(order) if isinstance(made[_compile_key(c)], Compiled)), 0)
    return [(_with_tile_first(k, places[i]), made[_compile_key(current(i))]) for i, k in enumerate(specs)]


def _compile_key(choice: Choice) -> tuple[str, int]:
    return repr(choice.program), choice.tile.warps


def _is_good(made: Made) -> bool:
    return isinstance(made, Compiled) and not made.spills


def _with_tile_first(kernel: KernelSpec, place: int) -> KernelSpec:
    """Return the kernel with the tile at a place of the search's order, the others after it in their order."""
    order = [kernel.found.best, *kernel.found.others]
    best = order.pop(place)
    return replace(kernel, found=replace(kernel.found, best=best, others=tuple(order)))


def _object_entry(kernel: KernelSpec, made: Made, arch: str) -> dict[str, Any]:
    """Return the entry of an object in kernels.json."""
    if isinstance(made, MoecError):
        return {"arch": arch, "error": made.what}
    predicted = predict_shared(kernel.best.program, arch, kernel.best.tile.warps)
    return {
        "arch": arch, "registers": made.registers, "shared": made.shared, "shared_predicted": predicted,
        "tensor_memory": made.tensor_memory, "spills": made.spills, "scalar_spills": made.scalar_spills,
        "instructions": sorted(made.uses), **({} if made.limit is None else {"register_limit": made.limit}),
    }  # fmt: skip


def missing_objects(kernels: Kernels) -> tuple[Note, ...]:
    """Return notes on the kernels that have no object, by the reason, and on those whose registers spill."""
    found: dict[str, list[str]] = {}
    for kernel in kernels.kernels:
        for arch, entry in kernel.objects.items():
            if "error" in entry:
                found.setdefault(f"no object for {arch}, only source: {entry['error']}", []).append(kernel.name)
            elif entry.get("spills"):
                found.setdefault(f"registers that spill on {arch}, which takes time", []).append(kernel.name)
    return tuple(
        Note(f"{len(names)} of {len(kernels.kernels)} kernels ({_first_names(names)}) have {reason}")
        for reason, names in found.items()
    )


def _first_names(names: Sequence[str]) -> str:
    return ", ".join([*names[:SHOWN], *["..."] * (len(names) > SHOWN)])


def write_files(files: Mapping[str, bytes], folder: Path) -> dict[str, str]:
    """Write files below a folder and return the sha256 of each; MoecError where that fails."""
    for name, content in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise write_error(error, path) from error
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
