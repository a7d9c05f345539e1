"""The graph of a function as SVG: its ops from top to bottom, each a link to what the page says of it."""

from __future__ import annotations

import html

import networkx

from ..ir.module import Function, Op

WIDTH, HEIGHT, ACROSS, DOWN = 176, 36, 16, 34  # pixels of a box, and between boxes


def op_anchor(function: Function, op: Op) -> str:
    """Return the fragment of the page that shows an op."""
    return f"op-{function.name}-{op.results[0].name}"


def graph_svg(function: Function) -> str:
    """Return the graph of a function: ops as links, what one makes for another as lines; a column keeps to its makers."""
    graph: networkx.DiGraph = networkx.DiGraph()
    graph.add_nodes_from(range(len(function.ops)))
    makers = {value.name: i for i, op in enumerate(function.ops) for value in op.results}
    for i, op in enumerate(function.ops):
        graph.add_edges_from((makers[v.name], i) for v in op.inputs if v.name in makers)
    places: dict[int, tuple[float, int]] = {}
    for row, ops in enumerate(networkx.topological_generations(graph)):
        wanted = {i: _column_of_makers(graph, places, i) for i in ops}
        for k, i in enumerate(sorted(ops, key=lambda i: (wanted[i], i))):
            places[i] = (k - (len(ops) - 1) / 2, row)
    return _draw_graph(function, graph, places)


def _column_of_makers(graph: networkx.DiGraph, places: dict[int, tuple[float, int]], node: int) -> float:
    columns = [places[maker][0] for maker in graph.predecessors(node)]
    return sum(columns) / len(columns) if columns else 0.0


def _draw_graph(function: Function, graph: networkx.DiGraph, places: dict[int, tuple[float, int]]) -> str:
    left = min((column for column, _ in places.values()), default=0.0)
    columns = max((column for column, _ in places.values()), default=0.0) - left + 1
    rows = 1 + max((row for _, row in places.values()), default=0)
    wide, high = int(columns * (WIDTH + ACROSS)), rows * (HEIGHT + DOWN)

    def corner(node: int) -> tuple[int, int]:
        column, row = places[node]
        return int((column - left) * (WIDTH + ACROSS)) + ACROSS // 2, row * (HEIGHT + DOWN) + DOWN // 2

    lines = []
    for maker, reader in graph.edges:
        (x1, y1), (x2, y2) = corner(maker), corner(reader)
        a, b, c, d = x1 + WIDTH // 2, y1 + HEIGHT, x2 + WIDTH // 2, y2
        lines.append(f'<path d="M{a} {b}C{a} {b + DOWN} {c} {d - DOWN} {c} {d}"/>')
    boxes = []
    for node, op in enumerate(function.ops):
        (x, y), name = corner(node), html.escape(f"@{op.callee}" if op.callee else op.name)
        readers = " ".join(html.escape(op_anchor(function, function.ops[i])) for i in graph.successors(node))
        kind = "call" if op.callee else op.name.partition(".")[0]
        boxes.append(
            f'<a href="#{html.escape(op_anchor(function, op))}" data-next="{readers}" class="k-{html.escape(kind)}">'
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>'
            f'<text x="{x + 8}" y="{y + 15}">{name}</text>'
            f'<text x="{x + 8}" y="{y + 29}" class="value">%{html.escape(op.results[0].name[:26])}</text></a>'
        )
    title = html.escape(f"the ops of @{function.name}")
    return (
        f'<svg class="graph" role="group" aria-label="{title}" width="{wide}" height="{high}" '
        f'viewBox="0 0 {wide} {high}">{"".join(lines)}{"".join(boxes)}</svg>'
    )
