"""How `moec targets NAME` shows an accelerator's profile to people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .table import make_table, print_parts, stdout_console


def show_profile(profile: dict[str, Any]) -> None:
    """Print what describe.describe returned: figures with grade and source, shapes, paths, and what is unknown."""
    sources: dict[str, int] = {}
    head = [profile["doc"], _family_text(profile)]
    if profile["variant"]:
        head.append(f"variant {profile['variant']} of {', '.join(profile['variants'])}: choose with -D variant=NAME")
    parts: list[Table | str] = [*head, "", _figure_table(profile["figures"], sources), ""]
    if profile["units"]:
        parts += [_shape_table(profile["units"], sources), ""]
    parts += [_path_table(profile, sources), ""]
    if profile["unknown"]:
        parts += [f"unknown: {', '.join(profile['unknown'])}", ""]
    used = {row["grade"] for key in ("figures", "units", "layouts") for row in profile[key]}
    used |= {row["grade"] for row in (profile["moves"], profile["operands"] or {}) if "grade" in row}
    parts += ["grades: " + "; ".join(f"{g} {text}" for g, text in profile["grades"].items() if g in used), "sources:"]
    parts += [f"  {number} {source}" for source, number in sources.items()]
    print_parts(stdout_console(), *parts)


def _family_text(profile: dict[str, Any]) -> str:
    toolchain = f"{profile['toolchain']} for {profile['arch']}" if profile["toolchain"] else "none"
    return f"family {profile['family']}, toolchain {toolchain}, formats {', '.join(profile['formats'])}"


def _source_numbers(source: str, sources: dict[str, int]) -> str:
    """Return the numbers under which the addresses of a source are listed, which are given as they come."""
    return " ".join(str(sources.setdefault(one, len(sources) + 1)) for one in source.split("; "))


def _figure_table(rows: list[dict[str, Any]], sources: dict[str, int]) -> Table:
    columns = (("figure", False), ("value", True), ("grade", False), ("source", True), ("note", False))
    return make_table(
        columns,
        [(r["figure"], r["text"], r["grade"], _source_numbers(r["source"], sources), r["note"]) for r in rows],
    )


def _shape_table(rows: list[dict[str, Any]], sources: dict[str, int]) -> Table:
    columns = (
        ("matrix unit", False), ("m", True), ("n", True), ("k", True), ("cores", True), ("grade", False),
        ("source", True), ("note", False),
    )  # fmt: skip
    cells = [
        (
            r["dtype"], _choices_text(r["m"]), _choices_text(r["n"]), str(r["k"]), str(r["cores"]), r.get("grade", ""),
            _source_numbers(r["source"], sources), r.get("note", ""),
        )
        for r in rows
    ]  # fmt: skip
    return make_table(columns, cells)


def _choices_text(values: list[int]) -> str:
    """Return choices as a list, or as first..last/step where they are many."""
    if len(values) < 4:
        return ", ".join(map(str, values))
    return f"{values[0]}..{values[-1]}/{values[1] - values[0]}"


def _path_table(profile: dict[str, Any], sources: dict[str, int]) -> Table:
    """Return a table of the paths between memories, of what the matrix unit reads and writes, and of layouts."""
    rows: list[tuple[str, str, dict[str, Any]]] = []
    reached: dict[str, list[str]] = {}
    for source, target in profile["moves"]["paths"]:
        reached.setdefault(source, []).append(target)
    rows += [(f"{source} copies to", ", ".join(targets), profile["moves"]) for source, targets in reached.items()]
    if operands := profile["operands"]:
        rows += [
            ("matrix unit reads left from", ", ".join(operands["left"]), operands),
            ("matrix unit reads right from", ", ".join(operands["right"]), operands),
            ("matrix unit writes to", operands["result"], operands),
        ]
    rows += [(f"{layout['memory']} holds matrices as", layout["order"], layout) for layout in profile["layouts"]]
    cells = []
    said = set()
    for label, text, origin in rows:
        note = origin.get("note", "")
        cells.append(
            (label, text, origin["grade"], _source_numbers(origin["source"], sources), "" if note in said else note)
        )
        said.add(note)
    return make_table((("paths", False), ("", False), ("grade", False), ("source", True), ("note", False)), cells)
