"""Selects the kernels of routing, of the choice of compressed entries and of hyper-connections."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from ....compiler.ir.dims import evaluate
from ....compiler.ir.module import Op
from ..chip.chip import Profile
from ..kernels.choices import AttentionTile
from ..kernels.compressed import slide_kernel
from ..kernels.entries import Compress, Select, choose_entries, compress_tokens, entry_scores
from ..kernels.hyper import Streams, stream_scores, streams_in, streams_out
from ..kernels.norm import power_of_two
from ..kernels.route import Route, route_kernel
from ..tile.packing import Packing
from .implementations import (
    Computation,
    Implementation,
    Selector,
    Tokens,
    only_implementation,
    operand_types,
    row_shapes,
    row_tile,
)  # fmt: skip
from .search import KernelTemplate, row_choices

ROUTED = (1, 2, 4, 8, 16)  # tokens that one point of routing decides on
SPLITS = (1, 4, 16)  # parts that the long rows of streams may be cut into
FEW = 64  # tokens up to which that is considered
CHOSEN = 1024  # entries that the choice looks at in one step


def _select_route(op: Op, weights: Mapping[str, Packing]) -> Computation:
    operands, a = operand_types(op), dict[str, Any](op.settings)
    there: dict[str, Any] = {name: name in operands for name in ("bias", "given", "expert_scale")}
    p = Route(int(operands["logits"].shape[1]), **a, **there)

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        shapes = tuple((m, 1, 1) for m in ROUTED)
        kernel = KernelTemplate(
            "route", lambda t, layout: route_kernel(p, t.m, layout), {"T": tokens.count}, shapes, staged=False
        )
        return only_implementation(kernel)

    return Computation("route", p, {}, implementations)


# --- compressed entries --------------------------------------------------------------------------------------------


def _select_entry_choice(op: Op, weights: Mapping[str, Packing]) -> Computation:
    a, q = op.settings, operand_types(op)["q"].shape
    p = Select(int(q[2]), int(q[3]), a.integer("k"), a.integer("ratio"))

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        entries = max((tokens.past + tokens.new) // p.ratio, 1)
        scalars = {"B": tokens.batch, "S": tokens.new, "P": tokens.past, "C": entries}
        rows = [m for m in (16, 32, 64, 128) if m >= power_of_two(p.heads)] or [power_of_two(p.heads)]
        scores = KernelTemplate(
            "entry_scores", lambda t, layout: entry_scores(p, AttentionTile(t.m, t.n, t.k, t.stages, t.warps), layout),
            scalars, tuple(product(rows, (32, 64, 128), (64, 128))),
        )  # fmt: skip
        choose = KernelTemplate(
            "choose_entries", lambda t, layout: choose_entries(p, t.n, layout),
            {"B": tokens.batch, "S": tokens.new, "E": entries}, ((1, CHOSEN, 1),), staged=False,
        )  # fmt: skip
        return only_implementation(scores, choose)

    return Computation("select_entries", p, {}, implementations)


def _select_compress_tokens(op: Op, weights: Mapping[str, Packing]) -> Computation:
    operands, a = operand_types(op), op.settings
    width, turned = int(operands["norm"].shape[0]), int(operands["cos"].shape[1])
    p = Compress(width, a.integer("ratio"), turned, a.flag("overlap"), a.number("eps"))
    token = int(operands["x"].shape[2])

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        scalars = {"B": tokens.batch, "S": tokens.new, "P": tokens.past}
        sizes = {name: max(int(evaluate(operands[name].shape[1], tokens.scalars)), 0) for name in ("pending",)}
        kept = max(int(evaluate(op.results[0].type.shape[1], tokens.scalars)), 1)
        entries = max((tokens.past + tokens.new) // p.ratio, 1)
        make = KernelTemplate(
            "compress_tokens", lambda t, layout: compress_tokens(p, row_tile(t), layout), {**scalars, "C": entries},
            tuple((m, n, 1) for m in (4, 8, 16, 32, 64) if m <= p.ratio for n in (power_of_two(width),)), staged=False,
            appended={"entries": ("entries", "all")},
        )  # fmt: skip
        state = KernelTemplate(
            "slide", lambda t, layout: slide_kernel(token, row_tile(t), layout),
            {"B": tokens.batch, "S": tokens.new, "O": sizes["pending"], "Y": kept}, row_shapes(power_of_two(token)), staged=False,
            renamed={"old": "pending", "new": "x"},
        )  # fmt: skip
        return only_implementation(make, state)

    return Computation("compress_tokens", p, {}, implementations)


# --- hyper-connections ---------------------------------------------------------------------------------------------


def _select_streams(op: Op, weights: Mapping[str, Packing]) -> Computation:
    x, a = operand_types(op)["x"].shape, op.settings
    p = Streams(
        int(x[2]), int(x[3]), a.number("eps"), a.number("floor"), a.integer("iterations", 1),
        op.name == "nn.hyper_connection_head",
    )  # fmt: skip

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        count = {"T": tokens.count}
        shapes = tuple((m, power_of_two(p.scores, 16), k) for m in row_choices(tokens.count) for k in (32, 64, 128))
        splits = SPLITS if tokens.count <= FEW else SPLITS[:1]
        return tuple(_streams_implementation(p, split, count, shapes) for split in splits)

    return Computation("streams", p, {}, implementations, matmuls="f32")


def _streams_implementation(
    p: Streams, split: int, count: Mapping[str, int], shapes: tuple[tuple[int, int, int], ...]
) -> Implementation:
    mixed = row_shapes(p.width, (1, 2, 4))
    kernels = (
        KernelTemplate("stream_scores", lambda t, layout: stream_scores(p, t, layout, split), count, shapes),
        KernelTemplate(
            "streams_in", lambda t, layout: streams_in(p, row_tile(t), layout, split), count, mixed, staged=False
        ),
    )
    return Implementation("whole rows" if split == 1 else f"rows in {split} parts", kernels)


def _streams_out(op: Op, weights: Mapping[str, Packing]) -> Computation:
    streams = operand_types(op)["streams"].shape
    p = Streams(int(streams[2]), int(streams[3]), 0.0, 0.0)

    def implementations(tokens: Tokens, profile: Profile) -> tuple[Implementation, ...]:
        return only_implementation(
            KernelTemplate("streams_out", lambda t, layout: streams_out(p, row_tile(t), layout), {"T": tokens.count},
                   row_shapes(p.width, (1, 2, 4)), staged=False)
        )  # fmt: skip

    return Computation("streams_out", p, {}, implementations)


IMPLEMENTATIONS: dict[str, Selector] = {
    "moe.route": _select_route,
    "nn.select_entries": _select_entry_choice,
    "nn.compress_tokens": _select_compress_tokens,
    "nn.hyper_connection_pre": _select_streams,
    "nn.hyper_connection_head": _select_streams,
    "nn.hyper_connection_post": _streams_out,
}
