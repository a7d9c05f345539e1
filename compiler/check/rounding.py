"""Checks a pass that stores weights in fewer bits: what it rounds, and that it does nothing else.

Outputs alone say little about such a pass: a rounded score turns a router's choice, and then the numbers of a token have
no bound. So the rounding is taken out of the program, which then has to give the numbers that it gave before; each weight
without its rounding has to be the weight that stood there; and each rounding is held to what its format promises. Ops
that round activations are taken out as well, and what is cached counts as not rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import MoecError
from ..formats.bounds import rounding_bounds
from ..formats.table import find_format
from ..ir.module import Function, Module, Op, Value, walk_calls
from ..ir.names import Names
from ..ir.recipes import FITTED, Recipe, Step, bind_recipe, steps_of
from ..ir.types import TensorType
from ..ops import OPS
from ..ops.builder import IRBuilder
from ..weights.demote import is_demotion
from ..weights.evaluate import evaluate_recipe
from ..weights.sources.safetensors_header import TensorInfo
from ..weights.sources.source import Box, WeightSource, full_box
from ..weights.steps.table import step
from ..weights.uncalibrated import without_calibration
from .compare import compare_modules, random_source

if TYPE_CHECKING:
    from torch import Tensor

EXACT = 1e-6  # of the size of a weight: factors of awq are multiplied with and divided by in f32
_HALF_UNIT = {"bf16": 2.0**-8, "f16": 2.0**-11}  # of a float just above a power of two, half of its last place


def compare_rounded(before: Module, after: Module, tolerance: float) -> None:
    """Raise MoecError unless a module is another one with some weights rounded as their formats say.

    `tolerance` is that of the outputs without the rounding, as in `check.compare_modules`.
    """
    old = {s for f in before.functions for s in _rounding_steps(f)}
    plain = after.with_functions({f.name: _without_rounding(f, old) for f in after.functions})
    source = random_source(before, after)
    _compare_weights(before, plain, source)
    compare_modules(before, plain, tolerance)
    seen: set[str] = set()
    for function, bound in walk_calls(after):
        if function.name not in seen:
            seen.add(function.name)
            for const in function.consts:
                for found in steps_of(const.recipe):
                    if _is_rounding(found) and found not in old:
                        _check_step(_bind_step(found, function, bound), f"{const.value} in @{function.name}", source)


def _bind_step(found: Step, function: Function, bound: Mapping[str, str]) -> Step:
    made = bind_recipe(found, function.weights, bound)
    assert isinstance(made, Step)
    return made


# --- without the rounding --------------------------------------------------------------------------------------


def _is_rounding(recipe: Step) -> bool:
    return recipe.name == "quantize" or is_demotion(recipe)


def _rounding_steps(function: Function) -> Iterator[Step]:
    return (s for c in function.consts for s in steps_of(c.recipe) if _is_rounding(s))


def _without_rounding(function: Function, kept: set[Step]) -> Function:
    """Return the function with its weights not rounded, but for the steps that are kept, and no activations either."""
    function = _without_rounded_values(function)
    consts = tuple(
        replace(c, recipe=found) if (found := _recipe_without_rounding(c.recipe, kept)) is not c.recipe else c
        for c in function.consts
    )
    return (
        function
        if all(a is b for a, b in zip(consts, function.consts, strict=True))
        else replace(function, consts=consts)
    )


def _without_rounded_values(function: Function) -> Function:
    """Return the function with nothing brought to a quantized format.

    What reads the result of an op that does only that reads its operand; one that rounds what it computes, as its
    attribute `to` says, does not. Caches are as wide as what is computed with them.
    """
    builder = IRBuilder(function.name, function.params, function.consts, Names(function.names))
    plain: dict[str, Value] = {}
    for op in function.ops:
        op = _with_wide_states(replace(op, operands=tuple(v and plain.get(v.name, v) for v in op.operands)))
        if not any(find_format(v.type.dtype) for v in op.results):
            builder.ops.append(op)
        elif len(op.inputs) == 1 and "to" in op.attributes:
            plain[op.results[0].name] = op.inputs[0]
        else:
            attributes = {name: value for name, value in op.attributes.items() if name != "to"}
            hints = [v if not find_format(v.type.dtype) else f"{v.name}.plain" for v in op.results]
            results = builder.add_all(op.name, *op.operands, hints=hints, **attributes)
            plain |= {old.name: new for old, new in zip(op.results, results, strict=True)}
    return replace(function, ops=tuple(builder.ops))


def _with_wide_states(op: Op) -> Op:
    """Return an op that does not round what it caches."""
    if not op.attributes.get("cache") or op.name not in OPS or not OPS[op.name].stored:
        return op
    return op.become(op.name, *op.operands, **{name: a for name, a in op.attributes.items() if name != "cache"})


def _recipe_without_rounding(recipe: Recipe, kept: set[Step]) -> Recipe:
    if not isinstance(recipe, Step) or not any(_is_rounding(s) and s not in kept for s in steps_of(recipe)):
        return recipe
    items = tuple(_recipe_without_rounding(item, kept) for item in recipe.items)
    if _is_rounding(recipe) and recipe not in kept:
        return items[0]
    if recipe.spreads and len({i.type.dtype for i in items}) > 1:  # some were rounded, some are short already
        items = tuple(i if i.type.dtype == "f32" else step("cast", i, to="f32") for i in items)
    return step(recipe.name, *items, **recipe.attributes)


# --- each weight -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NothingFitted:
    """A source with ones for the factors that a calibration would fit."""

    source: WeightSource

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that are there."""
        return self.source.tensors

    def read(self, name: str, box: Box | None = None, expected: TensorType | None = None) -> Tensor:
        """Return the part of a tensor in `box`."""
        found = self.source.read(name, box, expected)
        return torch.ones_like(found) if name.endswith(FITTED) else found


def _compare_weights(before: Module, after: Module, random: WeightSource) -> None:
    """Raise MoecError where an op reads another weight than before."""
    source = _NothingFitted(random)
    seen: set[tuple[str, str]] = set()
    for (old, bound), (new, other) in zip(walk_calls(before), walk_calls(after), strict=False):
        alike = bound == other and [op.name for op in old.ops] == [op.name for op in new.ops]
        if (old.name, new.name) in seen or not alike:
            continue  # a function whose ops became others is judged by its outputs
        seen.add((old.name, new.name))
        first, second = _bound_recipes(old, bound), _bound_recipes(new, bound)
        for was, now in zip(old.ops, new.ops, strict=True):
            for name, found in _changed_weights(was, first, now, second):
                what = _other_numbers(*found, source)
                if what:
                    raise MoecError(f"wrong weight: {name} {what}", f"{name} in @{new.name}", exit_code=1)


def _bound_recipes(function: Function, bound: Mapping[str, str]) -> dict[str, Recipe]:
    return {c.value.name: bind_recipe(c.recipe, function.weights, bound) for c in function.consts}


def _changed_weights(
    was: Op, first: Mapping[str, Recipe], now: Op, second: Mapping[str, Recipe]
) -> Iterator[tuple[str, tuple[Recipe, Recipe]]]:
    """Yield the weights of an op whose recipe changed, with the recipes before and after."""
    for old, new in zip(was.operands, now.operands, strict=True):
        if old and new and old.name in first and new.name in second and first[old.name] != second[new.name]:
            yield str(new), (first[old.name], second[new.name])


def _other_numbers(old: Recipe, new: Recipe, source: WeightSource) -> str:
    """Return how the numbers of a weight differ; nothing if they are the same. Kept codes have to be the same exactly."""
    if old.type.sizes != new.type.sizes:
        return f"is {list(new.type.sizes)}, before {list(old.type.sizes)}"
    fitted = any(s.name == "scale" for s in steps_of(new))
    for box in _matrix_boxes(old):
        a, b = (evaluate_recipe(without_calibration(recipe), source, box).double() for recipe in (old, new))
        if torch.equal(a, b):
            continue
        error, size = float((a - b).norm()), float(a.norm())
        if not (fitted and error <= EXACT * size):
            place = f" (expert {box[0][0]})" if len(box) > 2 else ""
            return f"without its rounding is another weight than before{place}: off by {_relative_error_text(error, size)} of its norm"
    return ""


def _check_step(rounding: Step, where: str, source: WeightSource) -> None:
    """Raise MoecError unless what a step makes of random numbers is as near to them as its format promises."""
    (item,) = rounding.items
    for box in _matrix_boxes(item):
        numbers, found = (
            evaluate_recipe(without_calibration(recipe), source, box).double() for recipe in (item, rounding)
        )
        errors = numbers - found
        bound, rows = _error_bounds(numbers, rounding.type.dtype)
        far = ~(errors.norm(dim=-1) <= rows)  # not >: what is no number is caught too
        if not float(errors.norm()) <= bound or bool(far.any()):
            size = float(numbers.norm())
            place = f" of expert {box[0][0]}" if len(box) > 2 else ""
            row = f"; {int(far.sum())} rows by more than a row may be" if bool(far.any()) else ""
            raise MoecError(
                f"wrong weight: {rounding.type.dtype}{place} is off by {_relative_error_text(float(errors.norm()), size)} of its norm, "
                f"rounding by {_relative_error_text(bound, size)} at most{row}", where, exit_code=1,
            )  # fmt: skip


def _error_bounds(numbers: Tensor, dtype: str) -> tuple[float, Tensor]:
    """Return how large the error of all numbers may be, and that of each row."""
    format = find_format(dtype)
    if format is None:
        rows = numbers.norm(dim=-1) * _HALF_UNIT[dtype]
        return float(rows.norm()), rows
    whole, rows = rounding_bounds(numbers, format)
    return float(whole.norm()), rows


def _matrix_boxes(recipe: Recipe) -> Iterator[Box]:
    """Yield boxes of one matrix each; a weight without matrices is one box."""
    sizes = recipe.type.sizes
    if len(sizes) < 3:
        yield full_box(sizes)
        return
    for i in range(sizes[0]):
        yield ((i, i + 1), *full_box(sizes[1:]))


def _relative_error_text(error: float, size: float) -> str:
    return f"{error / (size or 1.0):.2g}"
