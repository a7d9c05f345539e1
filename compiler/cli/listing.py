"""What there is: ops, passes, rules, families and targets, as plain data for `moec list` and `moec targets`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from ..errors import MoecError
from ..errors.progress import begin_phase
from ..ir.pipelines import print_pipeline

if TYPE_CHECKING:
    from ...targets.target import Probed

Rows = list[dict[str, Any]]


def find_row(what: str, rows: Rows, name: str) -> dict[str, Any]:
    """Return the row of a name; MoecError with the names near it."""
    found = next((row for row in rows if row["name"] == name), None)
    if found is None:
        near = get_close_matches(name, [row["name"] for row in rows], n=3)
        todo = f"did you mean {' or '.join(near)}?" if near else f"moec list {what} has all"
        raise MoecError(f"there are no {what} of the name {name!r}", todo=todo)
    return found


def short_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as one of many: of what is said, the first paragraph."""
    return {**row, "doc": _first_paragraph(row["doc"])} if "doc" in row else row


def _first_paragraph(doc: str) -> str:
    return doc.strip().partition("\n\n")[0].replace("\n", " ")


def _json_default(value: Any) -> Any:
    """Return a default as JSON has it: it knows no infinity and no activation."""
    plain = math.isfinite(value) if isinstance(value, float) else isinstance(value, (bool, int, str, tuple, type(None)))
    return value if plain else str(value)


def list_ops() -> Rows:
    """Return every op with its signature and meaning, those of the targets included."""
    from ...targets import declare_kernel_ops
    from ..ops import OPS
    from ..ops.define import REQUIRED

    declare_kernel_ops()
    OPS.bring_all()
    return [
        {
            "name": name,
            "signature": op.text,
            "attributes": {k: "required" if v is REQUIRED else _json_default(v) for k, (_, v) in op.attrs.items()},
            "doc": op.doc,
        }
        for name, op in sorted(OPS.items())
    ]


def list_formats() -> Rows:
    """Return the formats that `--quantize` takes, with the bits a weight and the groups that there are."""
    from ..formats import table

    docs = dict(re.findall(r"^(\w+) {2,}(.+)$", table.__doc__ or "", re.MULTILINE))
    rows: Rows = []
    for name in table.FORMAT_NAMES:
        shown = name.replace("_gN", "_g64")
        kind = re.match(r"[a-z]+", name)
        doc = docs.get(shown) or next((d for n, d in docs.items() if kind and re.match(rf"{kind[0]}\d", n)), "")
        groups = list(table.GROUPS) if name != shown else []
        bits = float(table.format_of(shown).bits_per_weight)
        rows.append({"name": shown, "bits_a_weight": round(bits, 3), "other_groups": groups, "doc": doc})
    return rows


def list_passes() -> Rows:
    """Return every pass with its stages, options and meaning, the targets' lowering among them."""
    from ...targets import TARGETS
    from ..driver import passes_for

    table = passes_for(TARGETS["cpu"])  # every target has these and a lowering of its own
    return [
        {
            "name": name,
            "reads": p.reads,
            "leaves": p.leaves,
            "options": [str(option) for option in p.options.values()],
            "rounds": p.rounds,
            "doc": p.doc,
        }
        for name, p in sorted(table.items())
    ]


def list_rules() -> Rows:
    """Return every rewrite rule with its two sides and the file that it stands in."""
    from ... import passes as folder
    from ..rewrite.patterns import Rule

    found: dict[str, dict[str, Any]] = {}
    for module in (import_module(m.name) for m in iter_modules(folder.__path__, f"{folder.__name__}.")):
        place = module.__name__.partition(".")[2]
        for rule in vars(module).values():
            for each in rule if isinstance(rule, (list, tuple)) else (rule,):
                if isinstance(each, Rule):
                    found.setdefault(each.name, {"name": each.name, "in": place, "doc": each.doc,
                                                 "before": each.before_text, "after": each.after_text})  # fmt: skip
    return [found[name] for name in sorted(found)]


def list_families() -> Rows:
    """Return the model families that moec's tests check."""
    from ..frontends.families import FAMILIES

    columns = ("name", "model_type", "layers", "state", "checked", "needs")
    return [{column: getattr(family, column) for column in columns} for family in FAMILIES.values()]


def list_systems() -> Rows:
    """Return the systems that moec brings along; a file of the user's own may be another one."""
    from ...targets.systems.describe import list_systems as rows

    return rows()


def list_targets(name: str | None = None) -> Rows:
    """Return the targets, or one with all that is known of it; MoecError for an unknown name."""
    from ...targets import TARGETS, unknown_target

    if name is not None and name not in TARGETS:
        raise unknown_target(name)
    chosen = [TARGETS[name]] if name else list(TARGETS.values())
    rows: Rows = [
        {"name": t.name, "pipeline": print_pipeline(t.pipeline), "doc": t.doc if name else _first_paragraph(t.doc)}
        for t in chosen
    ]
    if name and chosen[0].recorded:
        record = chosen[0].recorded()
        broken = [row for row in record.rows if row["found"] != "right"]
        rows[0]["runtime"] = {
            "recorded_with": record.made_with,
            "operators": probe_summary(record.rows),
            "not_right": broken,
        }
    if name and chosen[0].processor:
        rows[0]["processor"] = chosen[0].processor()
    return rows


def accelerator_profile(name: str, options: Mapping[str, str]) -> dict[str, Any] | None:
    """Return an accelerator's profile with figures of `options`, None for a target that is no accelerator."""
    from ...targets.accelerator.chip.describe import describe_profile, is_profile
    from ...targets.accelerator.chip.profile import find_profile

    return describe_profile(find_profile(name, options)) if is_profile(name) else None


def probe_target(name: str, quick: bool = False) -> Probed:
    """Try what the runtime of a target does; MoecError for an unknown target and for one without a probe."""
    from ...targets import TARGETS

    run = None
    if accelerator_profile(name, {}) is None:
        list_targets(name)
        run = TARGETS[name].probe
    if run is None:
        raise MoecError(f"target {name} has no probe")
    with begin_phase("probing", unit="variant") as phase:
        return run(quick=quick, progress=phase.advance)


def probe_summary(rows: Rows) -> Rows:
    """Return for each operator how many of its variants were found to be what."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        start = {"operator": row["operator"], "right": 0, "of these int8 activations": 0, "not right": 0, "GB/s": None}
        entry = found.setdefault(row["operator"], start)
        entry["right" if row["found"] == "right" else "not right"] += 1
        entry["of these int8 activations"] += row["activations"] == "int8"
        if row["speed"]:
            entry["GB/s"] = max(entry["GB/s"] or 0.0, row["speed"])
    return list(found.values())
