"""A profile as plain data and as one line, for `moec targets`."""

from __future__ import annotations

from typing import Any

from .chip import GRADES, RULES, Figure, Origin, Profile, kind_of
from .profile import profile_file
from .quantities import quantity_text

_OPTIONAL = (".usable", ".measured", ".align")  # without one there is nothing to know: the capacity, or no measurement


def is_profile(name: str) -> bool:
    """Return whether a target's name is one of a profile: a shipped one, that of a package, or a TOML file."""
    return name.endswith(".toml") or profile_file(name) is not None


def profile_line(profile: Profile) -> str:
    """Return chip, memory, bandwidth, bf16 peak and what becomes of kernels in one line."""
    memory, unit = profile.memories[0], profile.unit("bf16")
    size = f"{memory.capacity.value / 1e9:,.0f} GB" if memory.capacity else "unknown memory"
    speed = quantity_text(memory.bandwidth.value, "bytes/s") if memory.bandwidth else "unknown bandwidth"
    peak = f"{quantity_text(unit.peak.value, 'FLOP/s')} bf16" if unit and unit.peak else "bf16 peak unknown"
    bins = f" (variants {', '.join(profile.variants)})" if len(profile.variants) > 1 else ""
    return f"{profile.doc or profile.name}: {size} at {speed}, {peak}; {_kernels_text(profile)}{bins}"


def _kernels_text(profile: Profile) -> str:
    match profile.toolchain:
        case "triton":
            return f"kernels compiled for {profile.arch}"
        case "triton-ascend":
            return f"kernels lowered to Linalg for {profile.arch}"
    return "kernels as source and simulation, checked by no compiler"


def describe_profile(profile: Profile) -> dict[str, Any]:
    """Return all that a profile says: figures with value, unit, text, grade, source and note, and what is unknown."""
    figures = profile.figures()
    return {
        "name": profile.name, "doc": profile_line(profile), "vendor": profile.vendor, "family": profile.family.name,
        "toolchain": profile.toolchain, "arch": profile.arch, "variant": profile.variant or None,
        "variants": list(profile.variants), "formats": list(profile.formats),
        "memories": [{"name": m.name, "per": m.per} for m in profile.memories],
        "figures": [_figure_entry(profile, key, figure) for key, figure in figures.items() if figure],
        "units": [_shape_entry(unit.dtype, list(unit.m), list(unit.n), unit.k, unit.cores, unit.origin)
                  for unit in profile.units if unit.m],
        "operands": profile.operands and {
            "left": list(profile.operands.left), "right": list(profile.operands.right),
            "result": profile.operands.result, **_origin_entry(profile.operands.origin),
        },
        "moves": {"paths": [list(pair) for pair in profile.moves], **_origin_entry(profile.moves_origin)},
        "layouts": [{"memory": x.memory, "order": x.order, **_origin_entry(x.origin)} for x in profile.layouts],
        "unknown": [key for key, figure in figures.items() if figure is None and not key.endswith(_OPTIONAL)],
        "grades": GRADES,
    }  # fmt: skip


def _shape_entry(dtype: str, m: list[int], n: list[int], k: int, cores: int, origin: Origin | None) -> dict[str, Any]:
    return {"dtype": dtype, "m": m, "n": n, "k": k, "cores": cores, **_origin_entry(origin)}


def _origin_entry(origin: Origin | None) -> dict[str, Any]:
    return {} if origin is None else {"grade": origin.grade, "source": origin.source, "note": origin.note}


def _figure_entry(profile: Profile, key: str, figure: Figure) -> dict[str, Any]:
    kind = kind_of(key) or "count"
    whole = key.startswith(("unit.i8", "unit.int4"))
    text = quantity_text(figure.value, kind, "OPS" if whole else "FLOPS")
    parts = key.split(".")
    if parts[0] == "memory" and parts[2] in ("capacity", "usable"):
        per = profile.memory(parts[1]).per
        text += "" if per == "device" else f" a {'vector core' if per == 'vector' else per}"
    if parts[0] == "rate":
        text += " a core and cycle"
    note = "; ".join(filter(None, [RULES[parts[1]][1] if parts[0] == "rule" else "", figure.note]))
    return {
        "figure": key, "value": int(figure.value) if figure.value.is_integer() else figure.value, "unit": kind,
        "text": text, "grade": figure.grade, "source": figure.source, "note": note,
    }  # fmt: skip
