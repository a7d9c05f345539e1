"""How a weight step is declared: `@weight_step` on the function that evaluates it, with the rule for its type.

The docstring of the function says what the step does and its options. A step maps the box of its result to boxes of its
items, so that a tile of a stacked, transposed, dequantized tensor costs memory for the tile alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ...ir.deferred import torch
from ...ir.recipes import Recipe, Step
from ...ir.types import Attrs, TensorType
from ..sources.source import Box, WeightSource

Types = list[TensorType]
TypeRule = Callable[[Types, Attrs], TensorType]


class Evaluator(Protocol):
    """Evaluates recipes on a source."""

    @property
    def source(self) -> WeightSource:
        """Where the tensors of the recipes are read."""
        ...

    def __call__(self, item: Recipe, part: Box) -> torch.Tensor:
        """Return what a recipe makes in a box."""
        ...


Evaluate = Callable[[Step, Box, Evaluator], "torch.Tensor"]


@dataclass(frozen=True)
class WeightStep:
    """A declared step: its name in programs, the type of its result, and its evaluation for a box of the result.

    The type is that of items and options; ValueError says what does not fit.
    """

    name: str
    infer: TypeRule
    evaluate: Evaluate
    spreads: bool = False  # an item that is a template with a range stands for as many items
    moves: bool = False  # it moves numbers and changes none
    reads_codes: bool = False  # its items are codes, scales or words of a quantized checkpoint


def weight_step(name: str, infer: TypeRule, **properties: bool) -> Callable[[Evaluate], WeightStep]:
    """Return a decorator that makes a step of the function that evaluates it."""
    return lambda evaluate: WeightStep(name, infer, evaluate, **properties)


# --- what several steps need -------------------------------------------------------------------------------------


def only_type(types: Types) -> TensorType:
    """Return the type of the only item."""
    if len(types) != 1:
        raise ValueError(f"one item wanted, {len(types)} given")
    return types[0]


def box_sizes(box: Box) -> tuple[int, ...]:
    """Return the shape of a box."""
    return tuple(stop - start for start, stop in box)


def with_span(box: Box, axis: int, start: int, stop: int) -> Box:
    """Return the box with another span along an axis."""
    return (*box[:axis], (start, stop), *box[axis + 1 :])
