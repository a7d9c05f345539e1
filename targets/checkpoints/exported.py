"""What a program's weights become in a checkpoint: which are stored as codes, which as other numbers, which as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...compiler.errors import MoecError
from ...compiler.formats.format import Format
from ...compiler.formats.table import find_format
from ...compiler.ir.module import Module, walk_calls
from ...compiler.ir.recipes import Recipe, bind_recipe, steps_of, tensors_of
from .rows import Matrix, NotByRows, find_matrices


@dataclass(frozen=True)
class Weight:
    """A bound weight that is not stored as the checkpoint has it: in a format, or (None) as other numbers."""

    recipe: Recipe
    format: Format | None
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True)
class Exported:
    """The weights of a program that are stored anew, and the tensors that it reads as they are."""

    weights: tuple[Weight, ...]
    plain: frozenset[str]

    def is_shared(self, matrix: Matrix) -> bool:
        """Return whether the program reads the tensor of a matrix as it is too: a head that is the embedding."""
        return any(t.name in self.plain for t in tensors_of(matrix.recipe))

    @property
    def replaced(self) -> frozenset[str]:
        """The modules, or parameters that are no module's weight, whose tensors are stored anew."""
        own = (m for weight in self.weights for m in weight.matrices if not self.is_shared(m))
        return frozenset(owner_of(m.name) for m in own)


def owner_of(name: str) -> str:
    """Return the module that a tensor belongs to; a parameter that is no `weight` of a module is its own."""
    owner, _, leaf = name.rpartition(".")
    return owner if leaf in ("weight", "weight_packed", "qweight") else name


def find_exported(module: Module) -> Exported:
    """Return how the weights of a program are stored; MoecError for one that is no rows of the checkpoint's tensors."""
    found: dict[Recipe, Weight] = {}
    plain: set[str] = set()
    for recipe, place in _bound_weights(module):
        if recipe in found:
            continue
        format = find_format(recipe.type.dtype)
        if format is None and not _is_changed(recipe):
            plain.update(t.name for t in tensors_of(recipe))
            continue
        try:
            found[recipe] = Weight(recipe, format, tuple(find_matrices(recipe)))
        except NotByRows as error:
            todo = "leave its role as it is (role=f32), or compile for a target that has a format of its own"
            raise MoecError(f"a weight cannot go back into a checkpoint: {error}", where=place, todo=todo) from None
    _check_twice(found)
    return Exported(tuple(found.values()), frozenset(plain))


def _bound_weights(module: Module) -> Iterator[tuple[Recipe, str]]:
    for function, bound in walk_calls(module):
        for const in function.consts:
            if any(tensors_of(const.recipe)) and const.value.name in function.uses:
                yield bind_recipe(const.recipe, function.weights, bound), f"{const.value} in @{function.name}"


def _is_changed(recipe: Recipe) -> bool:
    """Return whether a weight that has no format is not what the checkpoint holds: it was scaled, or is decoded."""
    return any(s.name in ("scale", "dequantize") for s in steps_of(recipe))


def _check_twice(found: Mapping[Recipe, Weight]) -> None:
    """Raise MoecError for a tensor that is stored in two forms."""
    owners: dict[str, Recipe] = {}
    for recipe, weight in found.items():
        for matrix in weight.matrices:
            if owners.setdefault(matrix.name, recipe) != recipe:
                kinds = f"{owners[matrix.name].type.dtype} and {recipe.type.dtype}"
                todo = "give all that reads it one format"
                raise MoecError(f"{matrix.name} would be stored twice, as {kinds}", todo=todo)
