"""`moec inspect --html`: a program as one page that needs nothing else: its graph, weights, costs and passes.

Without its script the page is whole: ops and weights are cards that links show. The script adds keys, a search and the theme.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from ...targets.accelerator.predict.work import Amounts, WorkTable, call_counts, module_work, place_of
from ...targets.serving.routing import read_routing
from ..cost.count import Costs, module_costs
from ..cost.parts import model_parts
from ..cost.report import bytes_text, count_text, flops_text
from ..errors import MoecError
from ..ir.module import Function, Module, Op
from ..ops import OPS
from ..text.printer import print_op, print_recipe
from .page_graph import graph_svg, op_anchor
from .page_passes import PassStep, run_steps
from .page_plots import draw_memory, draw_passes, draw_roofline, draw_table
from .page_weights import StoredWeight, expert_tables, sensitivity_table, stored_weights, weight_table
from .predicted import time_text
from .report import Opened, ranges_text
from .svg import draw_svg

LARGEST = 3_000_000  # bytes of a page


@dataclass(frozen=True)
class Content:
    """What a page is made of: the program with its figures, what each op takes in one decoded token, and the passes."""

    report: Mapping[str, Any]
    costs: Costs
    amounts: Mapping[str, Amounts]  # by place of the op
    weights: Sequence[StoredWeight]
    manifest: Mapping[str, Any]
    folder: Path
    steps: Sequence[PassStep]
    no_steps: str
    loads: Sequence[Sequence[int]]

    @property
    def module(self) -> Module:
        """The program."""
        return self.costs.module


def inspect_page(opened: Opened, report: Mapping[str, Any], source: str, routing: str | None = None) -> str:
    """Return the page of a source; MoecError where matplotlib is not installed, and for a program too large for a page.

    `report` is what report.inspect_source found of it, `routing` the file that says how often experts were chosen.
    """
    module, loads = opened.counted, read_routing(routing) if routing else ()
    work = WorkTable(module, tuple(module_work(module)))
    past = report["per_token"]["context"]
    amounts = dict(zip((w.place for w in work.works), work.at(1, 1, past), strict=True))
    steps, no_steps = run_steps(opened.module, opened.manifest, source)
    content = Content(
        report, module_costs(module), amounts, stored_weights(module), opened.manifest, Path(source), steps, no_steps, loads
    )  # fmt: skip
    sections = [
        ("overview", "overview", _overview(content)),
        *((f"fn-{f.name}", f"@{f.name}", _function_section(content, f)) for f in module.functions),
        ("weights", "weights", _weights_section(content)),
        ("costs", "costs", _costs_section(content)),
        ("passes", "passes", _passes_section(content)),
    ]
    cards = [card for f in module.functions for card in _cards_of(content, f)]
    page = Template(Path(__file__).with_suffix(".html").read_text("utf-8")).substitute(
        title=_text(f"{report['source'] or source} (stage {report['stage']})"),
        links="\n".join(f'<a href="#{_text(anchor)}">{_text(name)}</a>' for anchor, name, _ in sections),
        body="\n".join(
            f'<section id="{_text(anchor)}"><h2>{_text(name)}</h2>\n{body}</section>' for anchor, name, body in sections
        ),
        cards="\n".join(cards),
    )
    if len(page.encode()) > LARGEST:
        ops = sum(len(f.ops) for f in module.functions)
        todo = "moec inspect without --html, or moec compile --stop-after moe, show it as text"
        raise MoecError(f"a page of {ops} ops would be larger than {bytes_text(LARGEST)}", source, todo=todo)
    return page


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]], finds: Sequence[str] = ()) -> str:
    """Return a table; a column is a heading and whether it holds numbers, cells are HTML, `finds` what a search looks at."""
    marks = [' class="n"' if number else "" for _, number in columns]
    head = "".join(f"<th{mark}>{_text(name)}</th>" for mark, (name, _) in zip(marks, columns, strict=True))
    lines = []
    for i, row in enumerate(rows):
        find = f' data-find="{_text(finds[i].lower())}"' if finds else ""
        lines.append(f"<tr{find}>{''.join(f'<td{m}>{c}</td>' for m, c in zip(marks, row, strict=True))}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _heat(table: dict[str, Any], name: str, caption: str) -> str:
    high = max(2.0, 0.17 * len(table["cells"]) + 1.0)
    return _figure(draw_svg(draw_table, table, name, min(high, 9.0)), caption)


def _overview(content: Content) -> str:
    report, per_token, state = content.report, content.report["per_token"], content.report["state"]
    at = f"at {per_token['context']:,} past tokens"
    parts = {
        "weights": report["bytes"]["compiled"], f"states {at}": state["bytes"],
        "weights read for a token": per_token["compiled_bytes_read"],
        "states read for a token": per_token["state_bytes_read"],
    }  # fmt: skip
    rows = [
        ("parameters", count_text(report["parameters"]["total"])),
        ("of routed experts", count_text(report["parameters"]["experts"])),
        ("active for a token", count_text(report["parameters"]["active"])),
        ("weights in the checkpoint", bytes_text(report["bytes"]["checkpoint"])),
        ("weights in this program", bytes_text(report["bytes"]["compiled"])),
        ("states for each token", bytes_text(state["bytes_per_token"])),
        (f"FLOPs of a decoded token {at}", flops_text(per_token["flops"])),
        ("target", _text(report["target"] or "none yet")),
    ]
    kinds = _table(
        (("kind", False), ("layers", False), ("ops", True), ("parameters", True), ("bytes", True), ("FLOPs a token", True)),
        [
            (
                f'<a href="#fn-{_text(kind["function"])}">@{_text(kind["function"])}</a>', ranges_text(kind["layers"]),
                str(kind["ops"]), count_text(kind["parameters"]["total"]), bytes_text(kind["bytes"]["compiled"]),
                flops_text(kind["per_token"]["flops"]),
            )
            for kind in report["kinds"]
        ],
    )  # fmt: skip
    keys = (
        "Keys: arrows walk a graph, Enter shows an op, Escape closes it, / searches the tables. "
        "Every figure is counted from the program; nothing was run or measured."
    )
    drawn = _figure(
        draw_svg(draw_memory, parts, high=2.2), "Bytes that the program holds, and reads for one decoded token."
    )
    return f"<p>{keys}</p>{_table((('', False), ('', True)), rows)}{drawn}<h3>kinds of layers</h3>{kinds}"


def _function_section(content: Content, function: Function) -> str:
    kind = next((k for k in content.report["kinds"] if k["function"] == function.name), None)
    layers = ranges_text(kind["layers"]) if kind else ""
    calls = call_counts(content.module)[function.name]
    head = f"layers {layers}" if layers else f"run {calls} time{'s' * (calls != 1)} a step"
    takes = ", ".join(f"%{v.name}: {v.type}" for v in function.params if not v.type.state)
    states = sum(v.type.state for v in function.params)
    more = f", and {states} states" if states else ""
    return (
        f"<p>{_text(head)}; {len(function.ops)} ops, {len(function.consts)} weights. Takes <code>{_text(takes)}</code>{more}.</p>"
        f'<div class="scroll">{graph_svg(function)}</div>'
    )


# --- cards ---------------------------------------------------------------------------------------------------------


def _cards_of(content: Content, function: Function) -> list[str]:
    weights = {c.value.name for c in function.consts}
    cards = [_op_card(content, function, op, weights) for op in function.ops]
    for const in function.consts:
        value = const.value
        readers = [op for op in function.uses.get(value.name, []) if op is not None]
        links = ", ".join(
            f'<a href="#{_text(op_anchor(function, op))}">%{_text(op.results[0].name)}</a>' for op in readers
        )
        recipe = print_recipe(const.recipe)
        shown = recipe if len(recipe) < 2000 else f"{recipe[:2000]} ... ({len(recipe)} characters)"
        rows = (
            ("type", f"<code>{_text(value.type)}</code>"), ("bytes of one layer", bytes_text(int(value.type.bytes))),
            ("made by", f"<code>{_text(shown)}</code>"), ("read by", links),
        )  # fmt: skip
        cards.append(_card(_weight_anchor(function, value.name), f"weight %{value.name} of @{function.name}", "", rows))
    return cards


def _op_card(content: Content, function: Function, op: Op, weights: set[str]) -> str:
    operands = []
    for value in op.inputs:
        name = _text(f"%{value.name}")
        if value.name in weights:
            name = f'<a href="#{_text(_weight_anchor(function, value.name))}">{name}</a>'
        elif maker := function.producers.get(value.name):
            name = f'<a href="#{_text(op_anchor(function, maker))}">{name}</a>'
        operands.append(f"{name} <code>{_text(value.type)}</code>")
    readers = [user for v in op.results for user in function.uses.get(v.name, []) if user is not None]
    links = [f'<a href="#{_text(op_anchor(function, user))}">%{_text(user.results[0].name)}</a>' for user in readers]
    rows = [
        ("operands", "<br>".join(operands)),
        ("read by", ", ".join(dict.fromkeys(links)) or "the function's return"),
    ]
    if op.callee:
        rows.append(("runs", f'<a href="#fn-{_text(op.callee)}">@{_text(op.callee)}</a>'))
    if op.loc:
        rows.append(("of the source", _text(", ".join(op.loc))))
    if found := content.amounts.get(place_of(function, op)):
        rows.append(("one decoded token", _amounts_text(found)))
    rows.append(("in the program", f"<code>{_text(print_op(op)[:1500])}</code>"))
    doc = "" if op.callee else OPS[op.name].doc.strip().partition("\n\n")[0]
    return _card(op_anchor(function, op), f"%{op.results[0].name} = {op.name} in @{function.name}", doc, rows)


def _card(anchor: str, title: str, doc: str, rows: Iterable[tuple[str, str]]) -> str:
    listed = "".join(f"<dt>{name}</dt><dd>{cell}</dd>" for name, cell in rows)
    about = f"<p>{_text(doc)}</p>" if doc else ""
    return (
        f'<article class="card" id="{_text(anchor)}" tabindex="-1"><button type="button">close</button>'
        f"<h3>{_text(title)}</h3>{about}<dl>{listed}</dl></article>"
    )


def _weight_anchor(function: Function, name: str) -> str:
    return f"weight-{function.name}-{name}"


def _amounts_text(found: Amounts) -> str:
    moved = ", ".join(f"{bytes_text(round(getattr(found, k)))} of {k}" for k in ("weights", "activations", "states"))
    return f"{flops_text(round(found.flops))}; {moved}"


# --- sections ------------------------------------------------------------------------------------------------------


def _weights_section(content: Content) -> str:
    columns = (
        ("weight", False), ("function", False), ("format", False), ("bits a weight", True), ("parameters", True),
        ("bytes, all layers", True),
    )  # fmt: skip
    rows = [
        (
            f'<a href="#{_text(_weight_anchor(w.function, w.first))}">{_text(w.name)}</a>',
            f"@{_text(w.function.name)}", _text(w.format), f"{w.bits:.2f}", count_text(w.parameters), bytes_text(w.bytes),
        )
        for w in content.weights
    ]  # fmt: skip
    finds = [f"{w.name} {w.function.name} {w.format}" for w in content.weights]
    parts = [
        _heat(
            weight_table(content.module, content.weights),
            "bits",
            "Bits of a weight, scales included, by layer; -1 is outside of the layers.",
        )
    ]
    if (table := sensitivity_table(content.folder)) is not None:
        parts.append(
            _heat(
                table,
                "sensitivity",
                "What the chosen formats are expected to cost, by role and layer; -1 is outside of the layers.",
            )
        )
    for name, table, caption in expert_tables(content.folder, content.manifest, content.loads):
        parts.append(_heat(table, name, caption))
    return "".join(parts) + _table(columns, rows, finds)


def _costs_section(content: Content) -> str:
    parts = model_parts(content.module)
    calls = call_counts(content.module)
    points: dict[str, list[tuple[float, float]]] = {}
    rows, finds = [], []
    for function in content.module.functions:
        for op in function.ops:
            found = content.amounts.get(place_of(function, op))
            if found is None:
                continue
            moved = found.weights + found.activations + found.states
            if moved and found.flops:
                points.setdefault(parts.part_of(op.loc), []).append((found.flops / moved, found.flops))
            rows.append((
                f'<a href="#{_text(op_anchor(function, op))}">%{_text(op.results[0].name)}</a>', _text(op.name),
                f"@{_text(function.name)}", str(calls[function.name]), flops_text(round(found.flops)),
                bytes_text(round(found.weights)), bytes_text(round(found.activations)), bytes_text(round(found.states)),
                f"{found.flops / moved:.3g}" if moved else "",
            ))  # fmt: skip
            finds.append(f"{op.results[0].name} {op.name} {function.name}")
    columns = (
        ("value", False), ("op", False), ("function", False), ("calls", True), ("FLOPs of a call", True), ("weights", True),
        ("activations", True), ("states", True), ("FLOPs a byte", True),
    )  # fmt: skip
    drawn = draw_svg(draw_roofline, {"points": points, "roofs": {}, "label": "FLOPs of one call"}, "ops")
    caption = "Each op of one decoded token, by part of the model: what is far left reads much for what it computes."
    return _figure(drawn, caption) + _predicted_part(content) + _table(columns, rows, finds)


def _predicted_part(content: Content) -> str:
    """Return the ops of a step on a chip under its roofs, where one was asked for."""
    found = content.report.get("predicted")
    if found is None:
        return "<p>With <code>--target</code> and the name of a chip the ops stand here under its roofs, with their times.</p>"
    points: dict[str, list[tuple[float, float]]] = {}
    rows = []
    for function in found["functions"]:
        for op in function["ops"]:
            flops, moved = sum(op["flops"].values()), sum(op["bytes"].values())
            if flops and moved:
                points.setdefault(op["bound"], []).append((flops / moved, flops / op["time"] / 1e12))
            rows.append((
                f"@{_text(function['function'])}", _text(op["op"]), flops_text(flops), bytes_text(moved),
                time_text(op["time"]), _text(op["bound"]), f"{op['share']:.1%}",
            ))  # fmt: skip
    roofs = {name: (rate / 1e12, bandwidth / 1e12) for name, (rate, bandwidth) in found["roofs"].items()}
    data = {"points": points, "roofs": roofs, "label": "TFLOP/s reached"}
    columns = (
        ("function", False), ("op", False), ("FLOPs", True), ("bytes", True), ("time", True), ("bound by", False), ("share", True),
    )  # fmt: skip
    step = f"{found['batch']} sequences, {found['new']} new tokens after {found['past']:,}: {time_text(found['time'])}"
    caption = f"A step on {found['target']} as predicted ({step}): ops by what bounds them, under the chip's roofs."
    return _figure(draw_svg(draw_roofline, data, "chip"), caption) + _table(columns, rows)


def _passes_section(content: Content) -> str:
    if not content.steps:
        return f"<p>{_text(content.no_steps)}</p>"
    high = 0.2 * len(content.steps) + 1.0
    parts = [_figure(draw_svg(draw_passes, content.steps, high=high), "When each pass ran; pale: it changed nothing.")]
    for number, step in enumerate(content.steps, 1):
        if not step.changed:
            parts.append(f"<p>{number}. {_text(step.name)}: changed nothing ({step.seconds:.3f} s)</p>")
            continue
        lines = "".join(f'<span class="{_line_kind(line)}">{_text(line)}</span>' for line in step.lines)
        parts.append(
            f"<details><summary>{number}. {_text(step.name)}: {step.ops} statements after it ({step.seconds:.3f} s)</summary>"
            f"<pre>{lines}</pre></details>"
        )
    return "".join(parts)


def _line_kind(line: str) -> str:
    return {"+": "plus", "-": "minus", "@": "at"}.get(line[:1], "same")
