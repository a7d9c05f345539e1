"""Chooses formats under a budget from what they cost, measured: `--quantize auto`.

A unit is the weights of one role in one layer. Each unit alone is put into a format of 4 bits, and one of 2, and the
program is run from there on: the KL of its predictions to those of the float program is what the format costs. All other
formats are expected to cost as much more or less as their squared error is larger or smaller, errors of weights counted
by the mean square of what they are multiplied with (KL grows with the square of a small error). Costs of units are added
up.

Without a calibration text the program is run on tokens drawn at random, and 2 bits too are judged by what 4 cost: that KL
is a sum over the weights of a constant of each times its squared error was found to hold far enough for the choice
(Malinovskii et al. 2024, arXiv:2411.17525).

The experts of a layer are divided into GROUPS by how much they add to the layer's error, those that are used most and
err most first; a group costs its share of what the layer costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..check.live import live_bytes
from ..check.tiled import TiledInterpreter
from ..cost.count import module_costs
from ..errors import MoecError
from ..errors.progress import Phase, begin_phase
from ..formats.format import Format
from ..formats.table import find_format
from ..ir.dims import evaluate
from ..ir.module import Function, Module, Op, Value, call_bindings
from ..ir.recipes import Recipe, bind_recipe
from ..ir.types import TensorType
from ..rewrite.roles import weight_roles
from ..weights.evaluate import evaluate_recipe
from ..weights.sources.source import Box, WeightSource
from ..weights.tiles import tile_boxes
from .allocate import Weight, choose_formats
from .calibrate import (
    LIMIT,
    CalibrationText,
    main_inputs,
    random_windows,
    vocabulary_of,
    windows_in_memory,
    windows_of,
)
from .plan import Budget, Entry, Plan, Unit, spell_layers

BATCHES = 8  # each reads all weights again for every format that is measured: no more tokens than these hold
TOKENS = 2048  # that sensitivities are measured on
LOGITS = 1 << 26  # numbers; fewer tokens are used with a large vocabulary
_KINDS = {
    "uint4": (128, 256, 64, 32, 16), "grid4": (64, 128, 32, 16), "grid3": (64, 128, 32, 16), "int8": (128, 256, 64, 32),
    "uint2": (32, 64, 16),
}  # fmt: skip
NAMES = tuple(f"{kind}_g{group}" for kind, groups in _KINDS.items() for group in groups)
LINEAR = 3  # bits from which on KL is in proportion to the squared error; one format is measured of those, one of fewer
SAMPLED, PART = 1 << 22, 32  # numbers of a weight whose errors are looked at, and neighbouring rows of those
CHUNK = 8 << 20  # bytes of f64 logits that are compared at once
LEFT_OUT = ("router",)  # roles whose weights stay as they are
GROUPS = 4  # of the experts of a layer, by their share of its error, each with a format of its own

Store = Callable[[Module, str], Module]  # (module, layers): what the pass quantize makes of it
Obstacle = Callable[[Op, Format], str | None]  # why the target does not hold an op's weights in a format


def find_units(module: Module, holds: Obstacle) -> dict[Unit, list[Weight]]:
    """Return the weights of every unit that can be quantized, in the order of the program."""
    roles = weight_roles(module)
    found: dict[Unit, list[Weight]] = {}

    def visit(function: Function, bound: dict[str, str], layer: int | None) -> None:
        recipes = {c.value.name: bind_recipe(c.recipe, function.weights, bound) for c in function.consts}
        for i, op in enumerate(function.ops):
            if op.callee:
                inner = op.attributes.get("layer")
                visit(
                    module.by_name[op.callee],
                    {**bound, **call_bindings(op)},
                    inner if isinstance(inner, int) else layer,
                )
            for (j, k), role in roles[function.name].items():
                value = op.operands[k] if i == j else None
                if value is not None and role not in LEFT_OUT and value.type.dtype == "f32":
                    names = frozenset(n for n in NAMES if _fits_groups(op, value, n, holds))
                    found.setdefault(Unit(layer, role), []).append(Weight(recipes[value.name], names))

    visit(module.main, {}, None)
    return {unit: weights for unit, weights in found.items() if frozenset.intersection(*(w.formats for w in weights))}


def _fits_groups(op: Op, value: Value, name: str, holds: Obstacle) -> bool:
    format = find_format(name)
    assert format
    return value.type.sizes[-1] % format.group == 0 and not holds(op, format)


# --- measuring -------------------------------------------------------------------------------------------------


@dataclass
class _Reference(TiledInterpreter):
    """Runs the float program; keeps what @main held before each op, and the mean square of what weights are multiplied with."""

    snapshots: dict[int, dict[str, Any]] = field(default_factory=dict)
    squares: dict[Recipe, torch.Tensor] = field(default_factory=dict)

    def before_op(self, function: Function, i: int, values: Mapping[str, Any], operands: Sequence[Any]) -> bool:
        """Keep the values of @main."""
        if function is self.module.main:
            self.snapshots[i] = dict(values)
        return True

    def observe_inputs(
        self, weight: Recipe, rows: torch.Tensor, chosen: tuple[torch.Tensor, ...] | None = None
    ) -> None:
        """Keep the mean squares f32[K]; of experts the sums over their rows, as shares of all tokens, f32[E, K]."""
        if chosen is None:
            self.squares[weight] = rows.square().mean(0)
        else:
            tokens = self.dims["B"] * self.dims["S"]
            self.squares[weight] = torch.stack([rows[c].square().sum(0) for c in chosen]) / tokens


def measure_sensitivity(
    module: Module,
    source: WeightSource,
    windows: torch.Tensor,
    units: Mapping[Unit, list[Weight]],
    store: Store,
    batch: int | None = None,
    linear: int = LINEAR,
) -> tuple[dict[Unit, list[Weight]], dict[Unit, dict[str, float]]]:
    """Return for every unit the expected KL of each format that all of its weights can have.

    The units come back with the experts of a layer in groups, largest share of the error first. `batch` windows are run
    at once, by default all. KL is taken to be in proportion to the squared error from `linear` bits on.
    """
    probes = {
        unit: _measured_formats([n for n in NAMES if all(n in w.formats for w in ws)], linear)
        for unit, ws in units.items()
    }
    kls: dict[tuple[Unit, str], float] = dict.fromkeys(((u, p) for u, found in probes.items() for p in found), 0.0)
    squares: dict[Recipe, torch.Tensor] = {}
    parts = windows.split(batch or len(windows))
    with begin_phase("measuring formats", len(parts) * len(kls), "format") as phase:
        for part in parts:
            share = len(part) / len(windows)
            measured = _measure_part(module, source, part, list(kls), store, phase)
            for key, kl in measured.kls.items():
                kls[key] += kl * share
            for recipe, found in measured.squares.items():
                squares[recipe] = squares.get(recipe, torch.zeros(())) + found * share
    costs: dict[Unit, dict[str, float]] = {}
    divided: dict[Unit, list[Weight]] = {}
    for unit, weights in units.items():
        alike = {n: probe for probe, names in probes[unit].items() for n in names}
        errors = {
            n: torch.stack([_weighted_errors(w.recipe, n, source, squares) for w in weights]).sum(0) for n in alike
        }
        kl_of = {}
        for n, probe in alike.items():
            whole = float(errors[probe].sum())
            kl_of[n] = kls[unit, probe] * float(errors[n].sum()) / whole if whole else 0.0
        for group, share_of in _expert_groups(unit, errors[next(iter(alike))]):
            divided[group] = [replace(w, experts=group.experts) for w in weights]
            costs[group] = {n: kl * float(share_of(errors[n])) for n, kl in kl_of.items()}
    return divided, costs


def _measured_formats(names: Sequence[str], linear: int) -> dict[str, list[str]]:
    """Return the formats that are measured, each with those that are judged by it."""
    parts = [n for n in names if _format_bits(n) >= linear], [n for n in names if _format_bits(n) < linear]
    return {part[0]: part for part in parts if part}


@dataclass(frozen=True)
class _Measured:
    """What was measured on some windows: KL by unit and format, mean squares of what weights are multiplied with."""

    kls: Mapping[tuple[Unit, str], float]
    squares: Mapping[Recipe, torch.Tensor]


def _measure_part(
    module: Module, source: WeightSource, windows: torch.Tensor, wanted: Sequence[tuple[Unit, str]], store: Store,
    phase: Phase,
) -> _Measured:  # fmt: skip
    """Run the float program on windows, and from each unit on with each of its formats."""
    reference = _Reference(module, source, tuple(windows.shape))
    values = dict(zip((p.name for p in module.main.params), main_inputs(module, windows), strict=True))
    logits = next(v.name for v in module.main.results if not v.type.state)
    kls: dict[tuple[Unit, str], float] = {}
    with torch.no_grad():
        reference.steps(module.main, values, {})
        expected = _log_softmax(values.pop(logits))
        for unit, probe in wanted:
            changed = store(module, spell_layers({unit: probe}))
            first = _first_use(changed, unit)
            state = dict(reference.snapshots[first])
            runner = TiledInterpreter(changed, source, tuple(windows.shape), numbers=lambda recipe: recipe)
            runner.steps(changed.main, state, {}, first)
            kls[unit, probe] = _mean_kl(expected, state[logits])
            phase.step()
    return _Measured(kls, reference.squares)


def _expert_groups(unit: Unit, errors: torch.Tensor) -> list[tuple[Unit, Callable[[torch.Tensor], float]]]:
    """Return the parts of a unit, each with what gives its share of a format's errors f32[E]."""
    count = len(errors)
    if count < 2 * GROUPS:
        return [(unit, lambda found: 1.0)]
    order = errors.argsort(descending=True, stable=True).tolist()
    bounds = [count * i // GROUPS for i in range(GROUPS + 1)]
    parts = [tuple(sorted(order[a:b])) for a, b in itertools.pairwise(bounds)]
    return [(unit._replace(experts=part), partial(_error_share, part)) for part in parts]


def _error_share(experts: tuple[int, ...], errors: torch.Tensor) -> float:
    whole = float(errors.sum())
    return float(errors[list(experts)].sum()) / whole if whole else 0.0


def _format_bits(name: str) -> int:
    format = find_format(name)
    assert format
    return format.bits


def _first_use(module: Module, unit: Unit) -> int:
    """Return the first op of @main that a unit's weights are part of."""
    if unit.layer is not None:
        return next(i for i, op in enumerate(module.main.ops) if op.attributes.get("layer") == unit.layer)
    return min(i for (i, _), r in weight_roles(module)["main"].items() if r == unit.role)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.reshape(-1, logits.shape[-1]), dim=-1)


def _mean_kl(wanted: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the mean KL of predictions f32[..., V] to log-probabilities f32[T, V], a few rows at a time."""
    total = 0.0
    rows = logits.reshape(-1, logits.shape[-1])
    step = max(1, CHUNK // (8 * rows.shape[-1]))
    for p, q in zip(wanted.split(step), rows.split(step), strict=True):
        p, q = p.double(), torch.log_softmax(q.double(), dim=-1)
        total += float((p.exp() * (p - q)).nan_to_num(0.0).sum())
    return max(total / len(wanted), 0.0)


def _weighted_errors(
    recipe: Recipe, name: str, source: WeightSource, squares: Mapping[Recipe, torch.Tensor]
) -> torch.Tensor:
    """Return the squared error of a format, each column counted by the mean square of its inputs: f32[E], or f32[1].

    Of a large weight some rows at equal distances stand for all.
    """
    format = find_format(name)
    assert format
    sizes = recipe.type.sizes
    weight = squares.get(recipe)  # a table that is only looked up has none: all columns count alike
    found = torch.zeros(sizes[0] if len(sizes) == 3 else 1)
    boxes, share = _sampled_boxes(recipe.type)
    for box in boxes:
        numbers = evaluate_recipe(recipe, source, box)
        error = (format.decode(format.encode(numbers), sizes[-1]) - numbers).square_()
        if len(sizes) == 3:
            experts = slice(*box[0])
            found[experts] += (error if weight is None else error * weight[experts, None]).sum(dim=(1, 2))
        else:
            found += (error if weight is None else error * weight).sum()
    return found * share


def _sampled_boxes(type_: TensorType) -> tuple[list[Box], float]:
    """Return boxes of rows that stand for a weight [N, K], or [E, N, K], some of each matrix; and for how many each does."""
    *lead, rows, width = type_.sizes
    matrices = math.prod(lead)
    each = max(1, SAMPLED // (matrices * width))  # rows of a matrix
    if each >= rows:
        return list(tile_boxes(type_, 4 << 20)), 1.0
    part = min(each, PART)
    starts = [rows * i // (each // part) for i in range(each // part)]
    boxes = [
        (*((i, i + 1) for i in at), (start, start + part), (0, width))
        for at in itertools.product(*map(range, lead))
        for start in starts
    ]
    return boxes, rows / (part * len(starts))


# --- the plan ------------------------------------------------------------------------------------------------


def make_plan(
    module: Module, source: WeightSource, text: CalibrationText | None, budget: Budget, method: str, store: Store,
    holds: Obstacle, limit: int = LIMIT,
) -> Plan:  # fmt: skip
    """Return the plan for a module of stage moe that is not quantized; MoecError if the budget cannot be met.

    It is measured on as many windows of the text (None: of tokens drawn at random) at once as `limit` bytes have room
    for, cut shorter where one takes too much.
    """
    windows = windows_of(text, module) if text else random_windows(module)
    units = find_units(module, holds)
    if not units:
        raise MoecError("there are no weights that the target could hold in fewer bits", todo="leave out --quantize")
    stored = {w.key: w.elements for u in units.values() for w in u}
    fixed = 0
    if budget.bits is not None:
        room = int(budget.bits * sum(stored.values()) / 8)
    else:
        assert budget.bytes is not None
        fixed = int(module_costs(module).total.compiled_bytes) - 4 * sum(stored.values())
        room = budget.bytes - fixed
    vocabulary = vocabulary_of(module)
    tokens = min(TOKENS, LOGITS // vocabulary)
    windows, batch = windows_in_memory(module, windows, limit // 3, partial(_bytes_per_window, module, vocabulary))
    count = min(max(1, tokens // windows.shape[1]), batch * BATCHES)
    free = {u: dict.fromkeys(frozenset.intersection(*(w.formats for w in ws)), 0.0) for u, ws in units.items()}
    choose_formats(units, free, room, fixed)  # measuring takes minutes: a budget that cannot be met is told before
    units, costs = measure_sensitivity(module, source, windows[:count], units, store, batch, LINEAR if text else 0)
    chosen = choose_formats(units, costs, room, fixed)
    spent = {(w.key, f): w.bytes(f) for u, (f, _) in chosen.items() for w in units[u]}
    total = sum(spent.values())
    return Plan(
        budget.text, method, round(float(total * 8 / sum(stored.values())), 4), int(total),
        sum(kl for _, kl in chosen.values()), windows[:count].numel(), tuple(_plan_entries(units, chosen)),
    )  # fmt: skip


def _bytes_per_window(module: Module, vocabulary: int, window: int) -> int:
    """Return the bytes that measuring one window takes: values, those that are kept at each op of @main, and logits."""
    dims = {"B": 1, "S": window, "P": 0}
    logits = 4 * vocabulary * window
    kept = sum(4 * evaluate(v.type.elements, dims) for op in module.main.ops for v in op.results) - logits
    return live_bytes(module, dims) - logits + max(0, kept) + 4 * logits


def _plan_entries(units: Mapping[Unit, list[Weight]], chosen: Mapping[Unit, tuple[str, float]]) -> list[Entry]:
    """Return the entries of a plan; groups of a layer's experts that came to the same format are one."""
    alike: dict[tuple[int | None, str, str], list[Unit]] = {}
    for unit, (format, _) in chosen.items():
        alike.setdefault((unit.layer, unit.role, format), []).append(unit)
    found = []
    for (layer, role, format), parts in alike.items():
        everything = all(other in parts for other in chosen if other[:2] == (layer, role))
        experts = () if everything else tuple(sorted(e for part in parts for e in part.experts))
        size = sum(w.bytes(format) for part in parts for w in units[part])
        found.append(Entry(Unit(layer, role, experts), format, int(size), sum(chosen[part][1] for part in parts)))
    return found
