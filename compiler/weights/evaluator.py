"""The type of the function that evaluates the items of a weight step: from a recipe and a box to numbers."""

from __future__ import annotations

from typing import Protocol

import torch

from ..ir.recipes import Recipe
from .sources.source import Box, WeightSource


class Evaluator(Protocol):
    """Evaluates recipes on a source."""

    @property
    def source(self) -> WeightSource:
        """Where the tensors of the recipes are read."""
        ...

    def __call__(self, item: Recipe, part: Box) -> torch.Tensor:
        """Return what a recipe makes in a box."""
        ...
