"""An interpreter that holds no weight whole: the numbers of a program on a long text, in little memory.

All tokens go through an op before the next op runs, so that every weight is read once, a tile of rows (or an expert) at
a time. What is held is the values that are still to be read: one layer's activations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import MoecError
from ..ir.module import Function, Module, Op, call_bindings
from ..ir.recipes import Recipe, bind_recipe, tensors_of
from ..ops.activation import apply_activation
from ..weights.evaluate import evaluate_recipe
from ..weights.sources.source import Box, WeightSource, full_box
from ..weights.tiles import tile_boxes
from ..weights.uncalibrated import without_quantization
from .interpret import run_op
from .live import score_heads

TILE = 16 << 20  # bytes of f32 weights that a linear works with at once
SCORES = 128 << 20  # bytes of scores that attention works with at once


@dataclass
class TiledInterpreter:
    """Interprets a module of stage moe with its weights a tile at a time.

    `numbers` gives the recipe whose numbers stand for a weight's: by default the one before it is quantized. Subclasses
    observe or change what passes by `before_op`, `observe_inputs`, `observe_routing` and `rows_for_expert`.
    """

    module: Module
    source: WeightSource
    shape: Sequence[int]  # windows and their length
    numbers: Callable[[Recipe], Recipe] = without_quantization
    tile: int = TILE
    scores: int = SCORES
    layer_done: Callable[[], None] = lambda: None  # called as each call of @main has run

    @property
    def dims(self) -> dict[str, int]:
        """The dims of a program that reads all windows at once."""
        return {"B": int(self.shape[0]), "S": int(self.shape[1]), "P": 0}

    def run(self, function: Function, inputs: Sequence[Any], bound: Mapping[str, str]) -> tuple[torch.Tensor, ...]:
        """Run a function on tensors in the order of its parameters."""
        values: dict[str, Any] = {p.name: t for p, t in zip(function.params, inputs, strict=True)}
        with torch.no_grad():
            self.steps(function, values, bound)
        return tuple(values[v.name] for v in function.results)

    def steps(self, function: Function, values: dict[str, Any], bound: Mapping[str, str], first: int = 0) -> None:
        """Run the ops of a function from one on; values are freed after their last use."""
        recipes = {c.value.name: bind_recipe(c.recipe, function.weights, bound) for c in function.consts}
        last_use = {v.name: i for i, op in enumerate(function.ops) for v in op.inputs}
        keep = {v.name for v in function.results}
        for i, op in enumerate(function.ops[first:], first):
            operands = [v and recipes.get(v.name, values.get(v.name)) for v in op.operands]
            if not self.before_op(function, i, values, operands):
                continue
            for value, tensor in zip(op.results, self.op(op, operands, bound), strict=True):
                values[value.name] = tensor
            if op.callee and function is self.module.main:
                self.layer_done()
            for value in op.inputs:
                if last_use[value.name] == i and value.name not in keep:
                    values.pop(value.name, None)

    def before_op(self, function: Function, i: int, values: Mapping[str, Any], operands: Sequence[Any]) -> bool:
        """Return whether the next op has to run; called before each op."""
        return True

    def observe_inputs(
        self, weight: Recipe, rows: torch.Tensor, chosen: tuple[torch.Tensor, ...] | None = None
    ) -> None:
        """Observe rows f32[T, K] that are multiplied by a weight, by each expert those that are routed to it."""

    def rows_for_expert(self, weight: Recipe, expert: int, token: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the rows that an expert works on: those of its tokens, and maybe others among all, in order."""
        return token

    def observe_routing(self, op: Op, bound: Mapping[str, str], counts: Sequence[int]) -> None:
        """Observe how many rows are routed to each expert."""

    def op(self, op: Op, operands: Sequence[Any], bound: Mapping[str, str]) -> Sequence[torch.Tensor]:
        """Run one op; operands are tensors, and bound recipes for weights."""
        if op.callee:
            return self.run(self.module.by_name[op.callee], operands, {**bound, **call_bindings(op)})
        match op.name:
            case "core.linear" if isinstance(operands[1], Recipe):
                return (self.linear(*operands),)
            case "nn.embedding" if isinstance(operands[1], Recipe):
                return (self.embedding(*operands),)
            case "moe.experts" if isinstance(operands[3], Recipe) and isinstance(operands[4], Recipe):
                return (self.experts(op, operands, bound),)
            case "moe.grouped_linear" if isinstance(operands[1], Recipe):
                return (self.grouped(*operands),)
            case "nn.gated_mlp" if isinstance(operands[1], Recipe) and isinstance(operands[2], Recipe):
                return (self.gated_mlp(op, operands),)
        tensors = [self.tensor(v) for v in operands]
        if op.name.endswith("attention"):
            return self.attention(op, tensors)
        return run_op(op, tensors, self.dims)

    def tensor(self, value: Any, box: Box | None = None) -> Any:
        """Return a tensor for a tensor, None, or a weight, of which a box may be asked for."""
        return evaluate_recipe(self.numbers(value), self.source, box) if isinstance(value, Recipe) else value

    def linear(self, x: torch.Tensor, weight: Recipe, bias: Any) -> torch.Tensor:
        """Multiply with a weight, a tile of its rows at a time."""
        rows = x.reshape(-1, x.shape[-1])
        self.observe_inputs(weight, rows)
        y = torch.empty(len(rows), weight.type.sizes[0])
        for box in tile_boxes(
            weight.type if weight.type.dtype in ("f32", "f64") else without_quantization(weight).type, self.tile
        ):
            if box[1] != (0, rows.shape[1]):
                raise MoecError(
                    "a row of a weight is larger than a tile", model=", ".join(t.name for t in tensors_of(weight))[:80]
                )
            y[:, slice(*box[0])] = rows @ self.tensor(weight, box).T
        if bias is not None:
            y += self.tensor(bias)
        return y.reshape(*x.shape[:-1], y.shape[1])

    def embedding(self, ids: torch.Tensor, table: Recipe) -> torch.Tensor:
        """Look up the rows of a table, each distinct one read once."""
        distinct, places = ids.unique(return_inverse=True)
        width = table.type.sizes[1]
        rows = [self.tensor(table, ((i, i + 1), (0, width))) for i in distinct.tolist()]
        return torch.cat(rows)[places]

    def experts(self, op: Op, operands: Sequence[Any], bound: Mapping[str, str]) -> torch.Tensor:
        """Run routed experts one after the other; the formula stands at moe.experts."""
        x, ids, gates, up, down, up_bias, down_bias = operands
        up_bias, down_bias = self.tensor(up_bias), self.tensor(down_bias)
        act = op.settings.activation("act")
        # a gate of 0 is no choice: groups of experts fill up with those
        places = [torch.where((ids == e) & (gates != 0)) for e in range(up.type.sizes[0])]
        self.observe_routing(op, bound, [len(token) for token, _ in places])
        given = tuple(self.rows_for_expert(up, e, token, len(x)) for e, (token, _) in enumerate(places))
        self.observe_inputs(up, x, given)
        y = torch.zeros_like(x)
        hidden = torch.empty(sum(map(len, given)), down.type.sizes[2])
        spans = []
        end = 0
        for e, ((token, choice), rows) in enumerate(zip(places, given, strict=True)):
            start, end = end, end + len(rows)
            spans.append(torch.arange(start, end))
            if start == end:
                continue
            h = torch.nn.functional.linear(x[rows], self.tensor(up, _expert_box(up, e))[0], _expert_bias(up_bias, e))
            h = apply_activation(h, act)
            hidden[start:end] = h
            own = h if rows is token else h[torch.searchsorted(rows, token)]
            own = torch.nn.functional.linear(
                own, self.tensor(down, _expert_box(down, e))[0], _expert_bias(down_bias, e)
            )
            y.index_add_(0, token, own * gates[token, choice, None])
        self.observe_inputs(down, hidden, tuple(spans))
        return y

    def grouped(self, rows: torch.Tensor, weight: Recipe, offsets: torch.Tensor, bias: Any) -> torch.Tensor:
        """Multiply the rows of each expert with its matrix, one after the other."""
        spans = list(itertools.pairwise(offsets.tolist()))
        self.observe_inputs(weight, rows, tuple(torch.arange(start, stop) for start, stop in spans))
        y, bias = torch.empty(len(rows), weight.type.sizes[1]), self.tensor(bias)
        for e, (start, stop) in enumerate(spans):
            if start < stop:
                w = self.tensor(weight, _expert_box(weight, e))[0]
                y[start:stop] = torch.nn.functional.linear(rows[start:stop], w, _expert_bias(bias, e))
        return y

    def gated_mlp(self, op: Op, operands: Sequence[Any]) -> torch.Tensor:
        """Run a gated layer matrix by matrix; the formula stands at nn.gated_mlp."""
        x, up, down, up_bias, down_bias, gate = operands
        act = op.settings.activation("act")
        h = self.linear(x, up, up_bias)
        y = self.linear(apply_activation(h, act), down, down_bias)
        return y if gate is None else y * torch.sigmoid(torch.nn.functional.linear(x, self.tensor(gate)))

    def attention(self, op: Op, tensors: Sequence[Any]) -> Sequence[torch.Tensor]:
        """Run an op that mixes the tokens of a window, a few windows at a time."""
        count = self.dims["B"]
        batched = [v is not None and str(v.type.shape[0]) == "B" for v in op.operands]
        scores = 4 * self.dims["S"] ** 2 * score_heads(op)
        step = max(1, min(count, self.scores // scores))
        parts = [
            run_op(
                op,
                [t[i : i + step] if b else t for t, b in zip(tensors, batched, strict=True)],
                {**self.dims, "B": min(step, count - i)},
            )
            for i in range(0, count, step)
        ]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def _expert_box(weight: Recipe, e: int) -> Box:
    return ((e, e + 1), *full_box(weight.type.sizes[1:]))


def _expert_bias(bias: torch.Tensor | None, e: int) -> torch.Tensor | None:
    return None if bias is None else bias[e]
