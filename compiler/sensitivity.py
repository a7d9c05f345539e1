"""Chooses formats under a budget from what they cost, measured: `--quantize auto`.

A unit is the weights of one role in one layer. Each unit alone is put into a format of 4 bits, and one of 2, and the
program is run from there on: the KL of its predictions to those of the float program is what the format costs. Formats
with other groups, and those of 8 bits, are expected to cost as much more or less as their squared error is larger or
smaller, errors of weights counted by the mean square of what they are multiplied with (KL grows with the square of a
small error). Costs of units are added up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from .calibrate import main_inputs
from .cost import module_costs
from .errors import MoecError
from .formats import Format, find_format
from .ir import Function, Module, Op, Value, bindings
from .plan import Budget, Entry, Plan, Unit, spell_layers
from .recipes import Recipe, bind
from .roles import weight_roles
from .tiled import TiledInterpreter
from .weights.calibrated import weight_key
from .weights.encode import decode, encode
from .weights.pull import pull, tiles
from .weights.sources import WeightSource

TOKENS = 2048  # that sensitivities are measured on
LOGITS = 1 << 26  # numbers; fewer tokens are used with a large vocabulary
_KINDS = {"uint4": (128, 256, 64, 32, 16), "int8": (128, 256, 64, 32), "uint2": (32, 64, 16)}  # the first is measured
NAMES = tuple(f"{kind}_g{group}" for kind, groups in _KINDS.items() for group in groups)
MEASURED = 4  # bits; wider formats cost too little to be told from noise
LEFT_OUT = ("router",)  # roles whose weights stay as they are

Store = Callable[[Module, str], Module]  # (module, layers): what the pass quantize makes of it
Obstacle = Callable[[Op, Format], str | None]  # why the target does not hold an op's weights in a format


@dataclass(frozen=True)
class Weight:
    """One weight of a unit: its bound recipe, and the format names that the target holds it in."""

    recipe: Recipe
    formats: frozenset[str]

    def bytes(self, format: str) -> Fraction:
        """The bytes that it takes in a format."""
        found = find_format(format)
        assert found
        return int(self.recipe.type.elements) * found.bits_per_weight / 8


@dataclass(frozen=True)
class Option:
    """A choice for one or more units, with its bytes and its expected KL."""

    formats: tuple[tuple[Unit, str], ...]
    bytes: Fraction
    kl: float


def find_units(module: Module, holds: Obstacle) -> dict[Unit, list[Weight]]:
    """Return the weights of every unit that can be quantized, in the order of the program."""
    roles = weight_roles(module)
    found: dict[Unit, list[Weight]] = {}

    def visit(function: Function, bound: dict[str, str], layer: int | None) -> None:
        recipes = {c.value.name: bind(c.recipe, function.weights, bound) for c in function.consts}
        for i, op in enumerate(function.ops):
            if op.callee:
                inner = op.attributes.get("layer")
                visit(module.by_name[op.callee], {**bound, **bindings(op)}, inner if isinstance(inner, int) else layer)
            for (j, k), role in roles[function.name].items():
                value = op.operands[k] if i == j else None
                if value is not None and role not in LEFT_OUT and value.type.dtype == "f32":
                    names = frozenset(n for n in NAMES if _fits(op, value, n, holds))
                    found.setdefault((layer, role), []).append(Weight(recipes[value.name], names))

    visit(module.main, {}, None)
    return {unit: weights for unit, weights in found.items() if frozenset.intersection(*(w.formats for w in weights))}


def _fits(op: Op, value: Value, name: str, holds: Obstacle) -> bool:
    format = find_format(name)
    assert format
    return value.type.sizes[-1] % format.group == 0 and not holds(op, format)


# --- measuring -------------------------------------------------------------------------------------------------


@dataclass
class _Reference(TiledInterpreter):
    """Runs the float program; keeps what @main held before each op, and the mean square of what weights are multiplied with."""

    snapshots: dict[int, dict[str, Any]] = field(default_factory=dict)
    squares: dict[str, torch.Tensor] = field(default_factory=dict)

    def before(self, function: Function, i: int, values: Mapping[str, Any], operands: Sequence[Any]) -> bool:
        """Keep the values of @main."""
        if function is self.module.main:
            self.snapshots[i] = dict(values)
        return True

    def seen(self, weight: Recipe, rows: torch.Tensor, chosen: tuple[torch.Tensor, ...] | None = None) -> None:
        """Keep the mean squares f32[K]; of experts the sums over their rows, as shares of all tokens, f32[E, K]."""
        if chosen is None:
            self.squares[weight_key(weight)] = rows.square().mean(0)
        else:
            tokens = self.dims["B"] * self.dims["S"]
            self.squares[weight_key(weight)] = torch.stack([rows[c].square().sum(0) for c in chosen]) / tokens


def measure(
    module: Module,
    source: WeightSource,
    windows: torch.Tensor,
    units: Mapping[Unit, list[Weight]],
    store: Store,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Unit, dict[str, float]]:
    """Return for every unit the expected KL of each format that all of its weights can have."""
    reference = _Reference(module, source, tuple(windows.shape))
    values = dict(zip((p.name for p in module.main.params), main_inputs(module, windows), strict=True))
    logits = next(v.name for v in module.main.results if not v.type.state)
    with torch.no_grad():
        reference.steps(module.main, values, {})
        wanted = _log_softmax(values[logits])
        found = {}
        for number, (unit, weights) in enumerate(units.items()):
            names = [n for n in NAMES if all(n in w.formats for w in weights)]
            errors = {n: sum(_error(w.recipe, n, source, reference.squares) for w in weights) for n in names}
            found[unit] = {}
            for bits, group in itertools.groupby(names, _bits):
                alike = list(group)
                if bits <= MEASURED or not found[unit]:
                    probe = alike[0]
                    changed = store(module, spell_layers({unit: probe}))
                    first = _first_use(changed, unit)
                    state = dict(reference.snapshots[first])
                    runner = TiledInterpreter(changed, source, tuple(windows.shape), numbers=lambda recipe: recipe)
                    runner.steps(changed.main, state, {}, first)
                    kl = _kl(wanted, state[logits])
                found[unit] |= {n: kl * errors[n] / errors[probe] if errors[probe] else 0.0 for n in alike}
            if progress:
                progress(number + 1, len(units))
    return found


def _bits(name: str) -> int:
    format = find_format(name)
    assert format
    return format.bits


def _first_use(module: Module, unit: Unit) -> int:
    """Return the first op of @main that a unit's weights are part of."""
    layer, role = unit
    if layer is not None:
        return next(i for i, op in enumerate(module.main.ops) if op.attributes.get("layer") == layer)
    return min(i for (i, _), r in weight_roles(module)["main"].items() if r == role)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.reshape(-1, logits.shape[-1]), dim=-1)


def _kl(wanted: torch.Tensor, logits: torch.Tensor) -> float:
    """Return the mean KL of predictions f32[..., V] to log-probabilities f32[T, V], a few rows at a time."""
    total = 0.0
    rows = logits.reshape(-1, logits.shape[-1])
    for p, q in zip(wanted.split(256), rows.split(256), strict=True):
        p, q = p.double(), torch.log_softmax(q.double(), dim=-1)
        total += float((p.exp() * (p - q)).nan_to_num(0.0).sum())
    return max(total / len(wanted), 0.0)


def _error(recipe: Recipe, name: str, source: WeightSource, squares: Mapping[str, torch.Tensor]) -> float:
    """Return the squared error of a format, each column counted by the mean square of its inputs."""
    format = find_format(name)
    assert format
    width = recipe.type.sizes[-1]
    weight = squares.get(weight_key(recipe))  # a table that is only looked up has none: all columns count alike
    total = 0.0
    for box in tiles(recipe.type, 4 << 20):
        numbers = pull(recipe, source, box)
        error = (decode(encode(numbers, format), format, width) - numbers).square_()
        if weight is not None:
            error *= weight if weight.dim() == 1 else weight[slice(*box[0]), None]
        total += float(error.sum())
    return total


# --- choosing --------------------------------------------------------------------------------------------------


def choose(
    units: Mapping[Unit, list[Weight]], costs: Mapping[Unit, Mapping[str, float]], budget: int
) -> dict[Unit, tuple[str, float]]:
    """Return a format and its KL for every unit, so that all fit in a number of bytes; MoecError if none does.

    Each unit starts at its smallest format; then the step that saves the most KL for a byte is taken as long as one
    fits (the greedy solution of the knapsack on the lower hull of each unit's options).
    """
    choices = [_hull(options) for options in _options(units, costs)]
    now = [0] * len(choices)
    spent = sum(c[0].bytes for c in choices)
    if spent > budget:
        weights = sum({weight_key(w.recipe): int(w.recipe.type.elements) for u in units.values() for w in u}.values())
        raise MoecError(
            f"the budget of {budget / 1e6:.6g} MB cannot be met",
            todo=f"the least is {float(spent) / 1e6:.6g} MB, {float(spent * 8 / weights):.3f} bits per weight",
        )
    while True:
        steps = []
        for i, options in enumerate(choices):
            for j in range(now[i] + 1, len(options)):
                more = options[j].bytes - options[now[i]].bytes
                if spent + more <= budget:
                    steps.append(((options[now[i]].kl - options[j].kl) / float(more), -i, j, more))
        if not steps:
            break
        _, i, j, more = max(steps)
        now[-i] = j
        spent += more
    formats = [pair for options, at in zip(choices, now, strict=True) for pair in options[at].formats]
    return {unit: (format, costs[unit][format]) for unit, format in formats}


def _options(units: Mapping[Unit, list[Weight]], costs: Mapping[Unit, Mapping[str, float]]) -> list[list[Option]]:
    """Return the options of each unit; units that store the same weight (a tied head) choose together, and share bytes."""
    owners: dict[str, Unit] = {}
    groups: dict[Unit, list[Unit]] = {}
    for unit, weights in units.items():
        owner = next((owners[k] for w in weights if (k := weight_key(w.recipe)) in owners), unit)
        groups.setdefault(owner, []).append(unit)
        owners.update({weight_key(w.recipe): owner for w in weights})
    found = []
    for members in groups.values():
        options = []
        for formats in itertools.product(*(costs[unit] for unit in members)):
            stored = {
                (weight_key(w.recipe), f): w.bytes(f) for u, f in zip(members, formats, strict=True) for w in units[u]
            }
            kl = sum(costs[u][f] for u, f in zip(members, formats, strict=True))
            options.append(Option(tuple(zip(members, formats, strict=True)), sum(stored.values(), Fraction(0)), kl))
        found.append(options)
    return found


def _hull(options: Sequence[Option]) -> list[Option]:
    """Return the options on the lower convex hull of KL over bytes, the smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.kl)):
        if kept and option.kl >= kept[-1].kl:
            continue
        while len(kept) > 1 and _slope(kept[-2], option) <= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


def _slope(a: Option, b: Option) -> float:
    return (b.kl - a.kl) / float(b.bytes - a.bytes)


def make_plan(
    module: Module, source: WeightSource, windows: torch.Tensor, budget: Budget, method: str, store: Store,
    holds: Obstacle, progress: Callable[[int, int], None] | None = None,
) -> Plan:  # fmt: skip
    """Return the plan for a module of stage moe that is not quantized; MoecError if the budget cannot be met."""
    units = find_units(module, holds)
    if not units:
        raise MoecError("there are no weights that the target could hold in fewer bits", todo="leave out --quantize")
    stored = {weight_key(w.recipe): int(w.recipe.type.elements) for u in units.values() for w in u}
    if budget.bits is not None:
        room = int(budget.bits * sum(stored.values()) / 8)
    else:
        assert budget.bytes is not None
        room = budget.bytes - (int(module_costs(module).total.compiled_bytes) - 4 * sum(stored.values()))
    vocabulary = int(next(v for v in module.main.results if not v.type.state).type.shape[-1])
    count = max(1, min(TOKENS, LOGITS // vocabulary) // windows.shape[1])
    costs = measure(module, source, windows[:count], units, store, progress)
    chosen = choose(units, costs, room)
    spent = {(weight_key(w.recipe), f): w.bytes(f) for u, (f, _) in chosen.items() for w in units[u]}
    entries = [
        Entry(unit, chosen[unit][0], int(sum(w.bytes(chosen[unit][0]) for w in units[unit])), chosen[unit][1])
        for unit in units
    ]
    total = sum(spent.values())
    return Plan(
        budget.text, method, round(float(total * 8 / sum(stored.values())), 4), int(total),
        sum(kl for _, kl in chosen.values()), windows[:count].numel(), tuple(entries),
    )  # fmt: skip
