"""How a weight is made: checkpoint tensors and the steps from them to the wanted tensor.

A recipe is a small tree and never holds bytes (a `Literal`, for small buffers such as rope frequencies, is the
exception). Names are templates: `{layer}` is bound by the call, `{0..63}` stands for 64 names and is spread by
`stack` and `concat`. A name starting with `/` ignores the function's weight prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .types import Attr, Attrs, Keyed, TensorType, attr_key, range_at, range_size


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint, with the dtype and shape that it has there."""

    name: str
    type: TensorType


@dataclass(frozen=True, eq=False)
class Literal(Keyed):
    """Numbers written into the program, in row-major order. Those that differ in a bit are different numbers."""

    type: TensorType
    values: tuple[int | float | bool, ...]

    @cached_property
    def key(self) -> Any:
        """The type and the numbers bit by bit."""
        return self.type, attr_key(self.values)


@dataclass(frozen=True, eq=False)
class Step(Keyed):
    """One step on other recipes. Make it with `step` of weights/steps, which computes the type."""

    name: str
    items: tuple[Recipe, ...]
    attrs: tuple[tuple[str, Attr], ...]
    type: TensorType
    spreads: bool = False  # an item that is a template with a range stands for as many items

    @cached_property
    def key(self) -> Any:
        """All that the step is made of, with its hash: recipes are looked up often, and deep."""
        return _Hashed((self.name, self.items, attr_key(self.attrs), self.type))

    @property
    def attributes(self) -> Attrs:
        """The attributes by name."""
        return Attrs(self.attrs)


class _Hashed(tuple):
    """A tuple that computes its hash once."""

    def __hash__(self) -> int:
        if not hasattr(self, "_hash"):
            self._hash = super().__hash__()
        return self._hash

    def __reduce__(self) -> tuple[type, tuple[tuple[Any, ...]]]:
        """Leave the hash out of a copy for another process, where texts have other hashes."""
        return _Hashed, (tuple(self),)


Recipe = Tensor | Literal | Step


def tensors_of(recipe: Recipe) -> Iterator[Tensor]:
    """Yield every checkpoint tensor that a recipe reads, ranges spread out, in order."""
    if isinstance(recipe, Step):
        if recipe.spreads:
            for item in spread_items(recipe):
                yield from tensors_of(item)
        else:
            for item in recipe.items:
                yield from tensors_of(item)
    elif isinstance(recipe, Tensor):
        yield recipe


def written_tensors(recipe: Recipe) -> Iterator[Tensor]:
    """Yield the tensors of a recipe as they are written, ranges and all."""
    if isinstance(recipe, Tensor):
        yield recipe
    elif isinstance(recipe, Step):
        for item in recipe.items:
            yield from written_tensors(item)


def spread_items(recipe: Step, low: int = 0, high: int | None = None) -> list[Recipe]:
    """Return the items of a `stack` or `concat`, or those from `low` to `high`, with every range in their names spread."""
    found: list[Recipe] = []
    position = 0
    for item in recipe.items:
        length = range_length(item)
        stop = length if high is None else min(length, high - position)
        found += [item if length == 1 else _item_of_range(item, i) for i in range(max(0, low - position), stop)]
        position += length
    return found


def _item_of_range(template: Recipe, index: int) -> Recipe:
    return rename_tensors(template, lambda name: range_at(name, index))


def range_length(recipe: Recipe) -> int:
    """Return how many recipes a template with a range stands for (1 without one)."""
    match recipe:
        case Tensor(name):
            return range_size(name)
        case Literal():
            return 1
    if recipe.spreads:
        return 1
    lengths = {n for n in map(range_length, recipe.items) if n != 1}
    if len(lengths) > 1:
        raise ValueError(f"ranges of different lengths in one {recipe.name}: {sorted(lengths)}")
    return lengths.pop() if lengths else 1


def rename_tensors(recipe: Recipe, function: Callable[[str], str]) -> Recipe:
    """Return the recipe with every name of a tensor, and of a quantized weight, passed through `function`."""
    match recipe:
        case Tensor():
            return replace(recipe, name=function(recipe.name))
        case Step():
            named = tuple((k, function(str(v)) if k == WEIGHT else v) for k, v in recipe.attrs)
            return replace(recipe, items=tuple(rename_tensors(item, function) for item in recipe.items), attrs=named)
    return recipe


def bind_recipe(recipe: Recipe, prefix: str, bindings: Mapping[str, str]) -> Recipe:
    """Return the recipe with absolute names: the prefix put before relative ones, `{layer}` and such filled in."""

    def absolute(name: str) -> str:
        full = name[1:] if name.startswith("/") else prefix + name
        for key, value in bindings.items():
            full = full.replace("{" + key + "}", value)
        return full

    return rename_tensors(recipe, absolute)


WEIGHT = "weight"  # the option of quantize that names a weight, for methods that look at what it is multiplied with
FITTED = ".awq"  # how the names of tensors end that no checkpoint has: they are fitted on a calibration text


def steps_of(recipe: Recipe) -> Iterator[Step]:
    """Yield the steps of a recipe, the outermost first."""
    if isinstance(recipe, Step):
        yield recipe
        for item in recipe.items:
            yield from steps_of(item)
