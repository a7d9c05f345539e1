"""How weights and caches are stored: `--weights` as bits and operand types by role.

`fp8` and `fp4` mean what checkpoints of these names hold: router, head and embedding stay bf16, in `fp4` attention too. Any
format of moec may be named (`mxfp4`, `uint4_g64`), and each role by itself: `experts=fp4,attention=fp8`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache

from ...compiler.errors import MoecError
from ...compiler.formats.table import FORMAT_NAMES, find_format
from .workload import Workload, read_roles

ROLES = ("experts", "shared", "dense", "attention", "head", "router", "embedding")
KEPT = ("head", "router", "embedding")  # of these, quantized checkpoints keep bf16
SHORT = {"fp8": "fp8_b128", "fp4": "nvfp4", "int8": "int8_g128", "int4": "uint4_g128", "int2": "uint2_g64"}
WIDE_ATTENTION = ("nvfp4", "mxfp4", "uint2_g64")  # of these, checkpoints keep attention in bf16
PLAIN = {"bf16": 16, "f16": 16, "f32": 32}
CACHES = {"bf16": 2.0, "fp8": 1.0}
FIXED_STATE = 4.0  # bytes of a number of a recurrent state, which engines keep in f32


@dataclass(frozen=True)
class Stored:
    """The bits of a number of one role, and the type in which products with it are computed."""

    bits: float
    dtype: str


@dataclass(frozen=True, eq=False)
class Storage:
    """How the weights of each role and the caches are stored."""

    name: str
    roles: Mapping[str, Stored]
    cache: str
    formats: Mapping[str, str] = field(default_factory=dict)  # by role, of those that are not the checkpoint's

    @property
    def cache_bytes(self) -> float:
        """Bytes of a number of a cache."""
        return CACHES[self.cache]


@lru_cache(maxsize=1024)
def choose_storage(workload: Workload, weights: str | None, cache: str) -> Storage:
    """Return how a model is stored: as its checkpoint, or as `weights` says; MoecError for an unknown format."""
    if cache not in CACHES:
        raise MoecError(f"a cache cannot be stored as {cache}", where="--cache", todo=f"one of {', '.join(CACHES)}")
    if weights is None:
        return Storage("checkpoint", _checkpoint_storage(workload), cache)
    chosen: dict[str, str] = {}
    for part in weights.split(","):
        role, equals, name = part.partition("=")
        if equals and role not in ROLES:
            raise MoecError(
                f"{role!r} is no role of weights", where=f"--weights {weights}", todo=f"roles: {', '.join(ROLES)}"
            )
        if equals:
            chosen[role] = _known_format(name, weights)
        else:
            full = _known_format(part, weights)
            chosen |= {r: full for r in ROLES if r not in KEPT and not (r == "attention" and full in WIDE_ATTENTION)}
    own = {role: Stored(16, "bf16") for role in ROLES}
    return Storage(weights, {**own, **{role: _stored_as(name) for role, name in chosen.items()}}, cache, chosen)


def _known_format(name: str, given: str) -> str:
    full = SHORT.get(name, name)
    if full in PLAIN or find_format(full):
        return full
    known = [*PLAIN, *SHORT, *FORMAT_NAMES]
    near = get_close_matches(name, known, n=2)
    todo = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(known)}"
    raise MoecError(f"no format {name}", where=f"--weights {given}", todo=todo)


def _stored_as(name: str) -> Stored:
    found = find_format(name)
    if found is None:
        return Stored(PLAIN[name], "bf16")
    match found.element:
        case "e2m1":
            dtype = "mxfp4"
        case "e4m3":
            dtype = "f8e4m3"
        case _:
            dtype = "bf16"  # integers are widened: activations stay floats
    return Stored(float(found.bits_per_weight), dtype)


def _checkpoint_storage(workload: Workload) -> dict[str, Stored]:
    """Return the bits that the checkpoint's tensors have, role by role."""
    numbers: dict[str, int] = dict.fromkeys(ROLES, 0)
    stored: dict[str, int] = dict.fromkeys(ROLES, 0)
    for role, elements, size in read_roles(workload):
        numbers[role] += elements
        stored[role] += size
    found = {}
    for role in ROLES:
        bits = 8 * stored[role] / numbers[role] if numbers[role] else 16.0
        found[role] = Stored(bits, "bf16" if bits > 12 else "f8e4m3" if bits > 6 else "mxfp4")
    return found
