"""The factors of AWQ (Lin et al. 2023): s = mean|x|^a for each input channel, with the a of 0, 0.1 .. 1 that errs least.

compiler/quantize/awq_scales.py says which weights are scaled and where the inverse goes. The error is that of the outputs,
on inputs that a calibration kept; weights that read the same inputs share their factors, and each expert's down weight
has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from ..formats.table import format_of
from ..ir.module import Module, walk_calls
from ..ir.recipes import Recipe, Step, Tensor, bind_recipe
from ..ir.types import TensorType
from .calibrated import Inputs, inputs_of
from .evaluate import evaluate_recipe
from .sources.source import Box, ElsewhereSource, WeightSource
from .steps.quantized import method_of

STEPS = 10  # the exponent is tried in tenths
TILE = 4 << 20  # bytes of f32 of a weight that are worked on at once
ROWS = 512  # inputs of a weight (of one expert) that the error is taken on
# a weight, with inputs f32[N, K] of all of it and of each expert
Sampled = tuple[Step, torch.Tensor, list[tuple[int | None, torch.Tensor]]]


def fit_awq_factors(module: Module, source: WeightSource, inputs: Mapping[str, Inputs]) -> dict[str, torch.Tensor]:
    """Return the factors of all scaled weights of a program by name, from the inputs that a calibration kept."""
    found: dict[str, torch.Tensor] = {}
    jobs: list[Callable[[], None]] = []

    def fit(place: torch.Tensor, weights: list[tuple[Step, Inputs, int | None]]) -> None:
        place.copy_(_search_factors(weights[0][0], source, None, [_sampled(*each) for each in weights]))

    for name, weights in _scaled_weights(module).items():
        per_expert = len(weights[0][0].sizes) == 2
        quantized = [(w, inputs_of(w, inputs)) for _, w in weights if w.name == "quantize" and method_of(w) == "awq"]
        found[name] = torch.ones(weights[0][0].sizes)
        if per_expert:
            for weight, seen in quantized:
                jobs += [partial(fit, place, [(weight, seen, e)]) for e, place in enumerate(found[name])]
        elif quantized:
            jobs.append(partial(fit, found[name], [(w, i, None) for w, i in quantized]))
    if isinstance(source, ElsewhereSource):
        source.run_all(jobs)
    else:
        for job in jobs:
            job()
    return found


def _scaled_weights(module: Module) -> dict[str, list[tuple[TensorType, Step]]]:
    """Return for each tensor of factors the weights whose columns it scales, quantized ones as they are quantized."""
    found: dict[str, list[tuple[TensorType, Step]]] = {}
    for function, bound in walk_calls(module):
        for const in function.consts:
            weight = bind_recipe(const.recipe, function.weights, bound)
            inner = weight
            while isinstance(inner, Step) and inner.name in ("quantize", "scale"):
                axes: Any = inner.attributes.get("axes")
                if (
                    inner.name == "scale"
                    and axes[-1] == len(inner.type.shape) - 1
                    and not inner.attributes.get("inverse")
                ):
                    factors = inner.items[1]
                    assert isinstance(factors, Tensor) and isinstance(weight, Step)
                    found.setdefault(factors.name, []).append((factors.type, weight))
                inner = inner.items[0]
    return found


def _sampled(weight: Step, seen: Inputs, one: int | None) -> Sampled:
    """Return a weight (one expert of it) with samples of its inputs: of each expert, or of the whole."""
    alone = one is not None or len(weight.type.shape) == 2
    experts = [one] if alone else [*range(weight.type.sizes[0])]
    return weight, _sampled_inputs(seen, one, weight), [(e, _sampled_inputs(seen, e, weight)) for e in experts]


def _search_factors(first: Step, source: WeightSource, box: Box | None, weights: list[Sampled]) -> torch.Tensor:
    """Return the factors f32[K] that make the rounding of some weights, which share their inputs, err least."""
    if isinstance(source, ElsewhereSource):
        found: torch.Tensor = source.run(_search_factors, first, box, weights)
        return found
    level = weights[0][1].abs().sum(0)
    if not float(level.max()) > 0:
        return torch.ones_like(level)
    candidates = []
    for tenth in range(STEPS + 1):
        s = (level / level.max()).clamp(min=1e-4).pow(tenth / STEPS)
        candidates.append(s / (s.max() * s.min()).sqrt())
    errors = torch.zeros(len(candidates))
    for weight, _, sampled in weights:
        format = format_of(weight.type.dtype)
        for expert, x in sampled:
            for numbers in _weight_rows(weight, expert, source):
                for i, s in enumerate(candidates):
                    rounded = format.decode(format.encode(numbers * s), numbers.shape[1]).div_(s)
                    errors[i] += (x @ rounded.sub_(numbers).T).square().sum()
    return candidates[int(errors.argmin())]


def _weight_rows(weight: Step, expert: int | None, source: WeightSource) -> Iterator[torch.Tensor]:
    """Yield the rows f32[N, K] of a weight's own numbers, or of one expert's, a few at a time."""
    *_, rows, width = weight.type.sizes
    step = max(1, TILE // (4 * width))
    lead = () if expert is None else ((expert, expert + 1),)
    for low in range(0, rows, step):
        box = (*lead, (low, min(low + step, rows)), (0, width))
        yield evaluate_recipe(_unscaled_recipe(weight), source, box).reshape(-1, width)


def _unscaled_recipe(weight: Step) -> Recipe:
    recipe: Recipe = weight
    while isinstance(recipe, Step) and recipe.name in ("quantize", "scale"):
        recipe = recipe.items[0]
    return recipe


def _sampled_inputs(seen: Inputs, expert: int | None, weight: Step) -> torch.Tensor:
    """Return some of the inputs of a weight; none of an expert that saw too few."""
    rows = seen.sample(expert, ROWS)
    return torch.zeros(0, weight.type.sizes[-1]) if rows is None else rows
