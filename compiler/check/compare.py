"""Compares the numbers of two modules: both are interpreted on the same small random inputs and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from ..errors import MoecError
from ..ir.module import Function, Module, walk_calls
from ..ir.recipes import Recipe, bind_recipe, steps_of, tensors_of
from ..ir.types import expand_range
from ..weights.evaluate import evaluate_recipe
from ..weights.sources.source import RandomSource
from ..weights.uncalibrated import without_calibration
from .interpret import interpret, random_inputs

if TYPE_CHECKING:
    from torch import Tensor

# unequal, odd and prime where possible, so that swapped axes show
SMALL = {"B": 2, "S": 5, "P": 3}
OTHERS = (7, 4, 11, 6, 13, 9)


def small_dims(module: Module) -> dict[str, int]:
    """Return a small size for every dim, inside its range and unlike the others where the ranges allow."""
    chosen: dict[str, int] = {}
    for dim in module.dims:
        wishes = [SMALL[dim.name]] if dim.name in SMALL else []
        wishes += [n for n in OTHERS if n not in chosen.values()]
        inside = [n for n in wishes if dim.low <= n <= dim.high]
        chosen[dim.name] = inside[0] if inside else min(max(wishes[0], dim.low), dim.high)
    return chosen


def changed_functions(before: Module, after: Module) -> list[str]:
    """Return the functions whose numbers must agree: changed ones with the same parameter and result types.

    A function with another signature, a new one and a lost one are seen through their callers, which changed too.
    """
    names = []
    for function in after.functions:
        old = before.by_name.get(function.name)
        if old is None or old is function or old == function:
            continue
        if [p.type for p in old.params] == [p.type for p in function.params] and old.types == function.types:
            names.append(function.name)
    return names


def compare_modules(before: Module, after: Module, tolerance: float) -> None:
    """Raise MoecError unless every changed function gives the same numbers, relative to the largest one."""
    bindings: dict[str, Mapping[str, str]] = {}
    for function, bound in walk_calls(before):
        bindings.setdefault(function.name, bound)
    for name in changed_functions(before, after):
        if name in bindings:  # a function that nothing calls has no weights to be run with
            compare_function(before, after, name, bindings[name], tolerance)


def compare_function(before: Module, after: Module, name: str, bound: Mapping[str, str], tolerance: float) -> None:
    """Raise MoecError unless a function gives the same numbers in both modules."""
    source = random_source(before, after)
    dims = small_dims(before)

    def weights(recipe: Recipe) -> Tensor:
        return evaluate_recipe(without_calibration(recipe), source)

    inputs = random_inputs(before, name, dims)
    expected = interpret(before, inputs, weights, name, bound, dims)
    try:
        found = interpret(after, inputs, weights, name, bound, dims)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:  # what torch and references raise
        raise MoecError(f"@{name} no longer runs: {error}", where=f"@{name}", exit_code=1) from error
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        problem = describe_difference(a, b, tolerance)
        if problem:
            raise _wrong_numbers(before.by_name[name], i, problem)


def random_source(*modules: Module) -> RandomSource:
    """Return a source of random weights for modules, with indices inside of what they choose from."""
    return RandomSource(below=dict(bound for module in modules for bound in _index_sizes(module)))


def _index_sizes(module: Module) -> Iterator[tuple[str, int]]:
    """Yield the tensors that hold indices, each with the number of things to choose from."""
    for function, bound in walk_calls(module):
        for const in function.consts:
            for found in steps_of(const.recipe):
                if found.name == "gather":
                    size = found.items[0].type.sizes[found.attributes.integer("axis")]
                    names = tensors_of(bind_recipe(found.items[1], function.weights, bound))
                    yield from ((name, size) for tensor in names for name in expand_range(tensor.name))


def _wrong_numbers(function: Function, index: int, problem: str) -> MoecError:
    value = function.results[index]
    made = function.producers.get(value.name)
    model = ", ".join(made.loc) if made else ""
    where = f"{value} in @{function.name}"
    return MoecError(f"wrong numbers: {value} {problem}", where=where, model=model, exit_code=1)


def describe_difference(expected: Tensor, found: Tensor, tolerance: float) -> str:
    """Return how two tensors differ by more than `tolerance` of the largest number; nothing if they agree."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"is {found.dtype}{list(found.shape)}, before {expected.dtype}{list(expected.shape)}"
    if not expected.dtype.is_floating_point:
        wrong = int((expected != found).sum())
        return f"differs in {wrong} of {expected.numel()} integers" if wrong else ""
    a, b = expected.double(), found.double()
    finite = torch.isfinite(a)
    special = torch.nan_to_num(a[~finite], 0.5), torch.nan_to_num(b[~finite], 0.5)
    if not torch.equal(*special) or not b[finite].isfinite().all():
        return "is infinite or not a number in other places than before"
    if not finite.any():
        return ""
    largest = float(a[finite].abs().max())
    relative = float((a[finite] - b[finite]).abs().max()) / (largest or 1.0)
    return f"differs by {relative:.2g} of the largest number, {tolerance:g} is allowed" if relative > tolerance else ""
