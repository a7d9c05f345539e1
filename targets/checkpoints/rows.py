"""Which rows of a program's weight are which rows of the checkpoint's tensors, so that codes go back under their names.

Passes stack, join and reorder the rows of weights and leave each row whole. The same steps on the numbers of the rows say
where each row of a tensor went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ...compiler.formats.table import find_format
from ...compiler.ir.recipes import Recipe, Step, Tensor, spread_items, tensors_of
from ...compiler.weights.evaluate import evaluate_recipe
from ...compiler.weights.rows import encode_rows
from ...compiler.weights.sources.source import Box, WeightSource
from ...compiler.weights.steps.quantized import row_tiles
from ...compiler.weights.steps.table import STEPS

NUMBERS = "numbers"  # the one part of a weight that is not quantized
RowParts = Mapping[str, torch.Tensor]  # the parts of a weight's rows, [rows, ...] each


class NotByRows(Exception):
    """Raised for a weight that is not made of whole rows of tensors; the text is a part of a sentence."""


@dataclass(frozen=True)
class Matrix:
    """A tensor of the checkpoint, or what its codes and scales stand for, whose rows a weight has.

    Row `r` of it is row `places[r]` of the weight, counted over all of the weight's leading axes.
    """

    recipe: Recipe
    places: np.ndarray

    @property
    def name(self) -> str:
        """The name of the tensor, of the first where it is made of several."""
        return next(tensors_of(self.recipe)).name


def find_matrices(weight: Recipe) -> list[Matrix]:
    """Return the matrices whose rows make up a bound weight, those of its first rows first; NotByRows says why there are none."""
    found: list[Recipe] = []
    ids = _row_numbers(weight, found).reshape(-1)
    total = sum(map(_row_count, found))
    times, places = np.bincount(ids, minlength=total), np.zeros(total, np.int64)
    places[ids] = np.arange(len(ids))
    matrices, start = [], 0
    for recipe in found:
        own = slice(start, start + _row_count(recipe))
        start = own.stop
        if (times[own] != 1).any() and times[
            own
        ].any():  # a weight may leave out whole matrices: experts of other groups
            raise NotByRows(f"it has a part of {next(tensors_of(recipe)).name} only, or some of its rows twice")
        if times[own].all():
            matrices.append(Matrix(recipe, places[own]))
    return sorted(matrices, key=lambda m: int(m.places.min()))


def _row_count(recipe: Recipe) -> int:
    return int(np.prod(recipe.type.sizes[:-1], dtype=np.int64))


def _row_numbers(recipe: Recipe, found: list[Recipe], codes: bool = False) -> np.ndarray:
    """Return the number of the row at each place of the leading axes; rows count on through the matrices that are found.

    `codes` says that the numbers come from codes of the checkpoint: what makes them of one tensor is a matrix too.
    """
    if isinstance(recipe, Step) and recipe.name in ("quantize", "cast", "scale", "packed"):
        return _row_numbers(recipe.items[0], found, codes or recipe.name == "packed")
    if isinstance(recipe, Step) and STEPS[recipe.name].moves and _keeps_rows(recipe):
        if recipe.spreads:
            items = [_row_numbers(item, found, codes) for item in spread_items(recipe)]
            return _JOINS[recipe.name](items, recipe.attributes.integer("axis", 0))
        return _moved_rows(recipe, _row_numbers(recipe.items[0], found, codes))
    single = len(set(tensors_of(recipe))) == 1
    if not (
        isinstance(recipe, Tensor) or (isinstance(recipe, Step) and recipe.name == "dequantize") or (codes and single)
    ):
        raise NotByRows("it is not made of whole rows of the checkpoint's tensors")
    start = sum(map(_row_count, found))
    found.append(recipe)
    return np.arange(start, start + _row_count(recipe)).reshape(recipe.type.sizes[:-1])


def _keeps_rows(recipe: Step) -> bool:
    """Return whether a step that moves numbers leaves what lies along the last axis together and in its order."""
    last = len(recipe.type.shape) - 1
    options = recipe.attributes
    if recipe.name == "transpose":
        return options.integers("perm")[-1] == last
    if recipe.name == "reshape":
        return recipe.type.shape[-1:] == recipe.items[0].type.shape[-1:]
    return recipe.name == "stack" or options.integer("axis") != last


def _interleaved(items: list[np.ndarray], axis: int) -> np.ndarray:
    stacked = np.stack(items, axis + 1)
    return stacked.reshape(*stacked.shape[:axis], -1, *stacked.shape[axis + 2 :])


_JOINS: Mapping[str, Callable[[list[np.ndarray], int], np.ndarray]] = {
    "stack": lambda items, axis: np.stack(items), "concat": np.concatenate, "interleave": _interleaved,
}  # fmt: skip


def _moved_rows(recipe: Step, rows: np.ndarray) -> np.ndarray:
    """Return the numbers of rows after a step that reorders them, or leaves some of them out."""
    options = recipe.attributes
    match recipe.name:
        case "transpose":
            return rows.transpose(options.integers("perm")[:-1])
        case "slice":
            taken = slice(options.integer("start"), options.integer("stop"), options.integer("step", 1))
            return rows[(slice(None),) * options.integer("axis") + (taken,)]
    return rows.reshape(recipe.type.sizes[:-1])


# --- their parts --------------------------------------------------------------------------------------------------


def matrix_parts(
    weight: Recipe, matrices: list[Matrix], source: WeightSource, tile_bytes: int
) -> Iterator[tuple[Matrix, RowParts]]:
    """Yield the parts of each matrix of a weight as soon as its last row is made, in one pass over the weight.

    A quantized weight has the parts of its format, another the numbers f32. The weight is worked on in tiles of
    `tile_bytes` of f32; matrices of which some rows are made are kept until they are whole.
    """
    owner = np.empty(sum(len(m.places) for m in matrices), np.int64)
    row = np.empty_like(owner)
    for i, matrix in enumerate(matrices):
        owner[matrix.places], row[matrix.places] = i, np.arange(len(matrix.places))
    left = [len(m.places) for m in matrices]
    open_parts: dict[int, dict[str, torch.Tensor]] = {}
    first = 0
    for box in row_tiles(weight, tile_bytes):
        parts = _parts_of_rows(weight, source, box)
        count = len(next(iter(parts.values())))
        owners, rows = owner[first : first + count], row[first : first + count]
        first += count
        for i in dict.fromkeys(owners.tolist()):
            here = np.flatnonzero(owners == i)
            if i not in open_parts:
                open_parts[i] = {
                    name: part.new_empty((len(matrices[i].places), *part.shape[1:])) for name, part in parts.items()
                }
            for name, part in parts.items():
                open_parts[i][name][torch.from_numpy(rows[here])] = part[torch.from_numpy(here)]
            left[i] -= len(here)
            if not left[i]:
                yield matrices[i], open_parts.pop(i)


def _parts_of_rows(weight: Recipe, source: WeightSource, box: Box) -> RowParts:
    """Return the parts of the rows in a box, the leading axes as one."""
    if isinstance(weight, Step) and find_format(weight.type.dtype):
        return {name: part.flatten(0, len(box) - 1) for name, part in encode_rows(weight, source, box).items()}
    numbers = evaluate_recipe(weight, source, (*box, (0, weight.type.sizes[-1]))).float()
    return {NUMBERS: numbers.reshape(-1, weight.type.sizes[-1])}
