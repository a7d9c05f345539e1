"""A source of weights that knows what its weights are multiplied with: the inputs seen on a calibration text."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir import TensorType
from ..recipes import Recipe, Step, step
from .gptq import inverse_factor
from .safetensors_header import TensorInfo
from .sources import Box, WeightSource, cut
from .unchanged import Opened

_KEPT = 4  # factors that are kept: the tiles of a weight come one after the other, to a few threads


@dataclass(frozen=True)
class Inputs:
    """What a weight is multiplied with: `rows` bf16[T, K], and for experts those that each of them is given.

    `chosen` holds for each expert the positions of its rows; None for an expert that saw too few. It is None itself for
    a weight that all rows go through.
    """

    rows: torch.Tensor
    chosen: tuple[torch.Tensor | None, ...] | None = None

    def of(self, expert: int | None) -> torch.Tensor | None:
        """Return the rows f32[N, K] of an expert, or of the whole weight for None."""
        if self.chosen is None or expert is None:
            return self.rows.float()
        rows = self.chosen[expert]
        return None if rows is None else self.rows[rows].float()


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A source with the inputs of quantized weights, by `weight_key`, and with tensors fitted to them. Thread-safe."""

    source: WeightSource
    inputs: Mapping[str, Inputs]
    fitted: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _factors: OrderedDict[tuple[str, int | None], torch.Tensor | None] = field(default_factory=OrderedDict, repr=False)
    _locks: dict[tuple[str, int | None], threading.Lock] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that are there."""
        return self.source.tensors

    @property
    def fingerprint(self) -> str:
        """What stands for the weights in an artifact."""
        return getattr(self.source, "fingerprint", "")

    @property
    def opened(self) -> Opened | None:
        """The files of the source as they were opened; None for weights in memory."""
        return getattr(self.source, "opened", None)

    def read(self, name: str, box: Box | None = None, expected: TensorType | None = None) -> torch.Tensor:
        """Return the part of a tensor in `box`; fitted tensors are at hand."""
        if name in self.fitted:
            return cut(self.fitted[name], box)
        return self.source.read(name, box, expected)

    def factor(self, weight: Recipe, expert: int | None) -> torch.Tensor | None:
        """Return gptq's factor for a weight (of one expert); None where there are no inputs to make it of."""
        key = (weight_key(weight), expert)
        found = self.inputs.get(key[0])
        if found is None:
            return None
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # the threads that work on tiles of the same weight wait for the first of them
            with self._lock:
                if key in self._factors:
                    return self._factors[key]
            rows = found.of(expert)
            factor = None if rows is None else inverse_factor(rows)
            with self._lock:
                self._factors[key] = factor
                while len(self._factors) > _KEPT:
                    self._factors.popitem(last=False)
            return factor


def weight_key(recipe: Recipe) -> str:
    """Return what names a weight whatever the order of its rows: its bound recipe, not quantized, not interleaved."""
    return repr(_plain(recipe))


def unquantized(recipe: Recipe) -> Recipe:
    """Return the recipe of a weight's own numbers: not quantized, and not scaled for that."""
    return _rebuilt(recipe, lambda s: s.items[0] if s.name in ("quantize", "scale") else s)


def _plain(recipe: Recipe) -> Recipe:
    return _rebuilt(unquantized(recipe), _in_order)


def _in_order(found: Step) -> Recipe:
    """Return a step with interleaved rows as one with the rows one behind the other."""
    if found.name != "interleave":
        return found
    axis: Any = found.attributes["axis"]
    match found.items:
        case (Step("slice", (first,)) as a, Step("slice", (second,)) as b) if repr(first) == repr(second):
            half = first.type.sizes[axis] // 2
            spans = [(s.attributes["axis"], s.attributes["start"], s.attributes["stop"]) for s in (a, b)]
            if spans == [(axis, 0, half), (axis, half, 2 * half)]:
                return first
    return step("concat", *found.items, axis=axis)


def _rebuilt(recipe: Recipe, change: Any) -> Recipe:
    if not isinstance(recipe, Step):
        return recipe
    items = tuple(_rebuilt(item, change) for item in recipe.items)
    return change(recipe if items == recipe.items else step(recipe.name, *items, **recipe.attributes))
