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

from ..formats.format import PART_NAMES
from ..formats.table import find_format, format_of
from .code_steps import CODE_STEPS
from .dtypes import DTYPES
from .types import Attr, Attrs, Keyed, TensorType, attr_key, make_attrs, range_at, range_size


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
    """One step (a key of STEPS) on other recipes. Make it with `step`, which computes the type."""

    name: str
    items: tuple[Recipe, ...]
    attrs: tuple[tuple[str, Attr], ...]
    type: TensorType

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


Recipe = Tensor | Literal | Step


def step(name: str, *items: Recipe, **attributes: Attr) -> Step:
    """Return a step with its type inferred; ValueError says what does not fit."""
    if name not in STEPS:
        raise ValueError(f"there is no weight step {name!r}; there are {', '.join(sorted(STEPS))}")
    attrs = make_attrs(attributes)
    types = [item.type for item in items]
    if name in SPREADING:
        types = [item.type for item in items for _ in range(range_length(item))]
    return Step(name, tuple(items), attrs, STEPS[name](types, Attrs(attrs)))


def tensors(recipe: Recipe) -> Iterator[Tensor]:
    """Yield every checkpoint tensor that a recipe reads, ranges spread out, in order."""
    if isinstance(recipe, Step):
        if recipe.name in SPREADING:
            for item in spread(recipe):
                yield from tensors(item)
        else:
            for item in recipe.items:
                yield from tensors(item)
    elif isinstance(recipe, Tensor):
        yield recipe


def spread(recipe: Step, low: int = 0, high: int | None = None) -> list[Recipe]:
    """Return the items of a `stack` or `concat`, or those from `low` to `high`, with every range in their names spread."""
    found: list[Recipe] = []
    position = 0
    for item in recipe.items:
        length = range_length(item)
        stop = length if high is None else min(length, high - position)
        found += [item if length == 1 else _at(item, i) for i in range(max(0, low - position), stop)]
        position += length
    return found


def _at(template: Recipe, index: int) -> Recipe:
    return rename(template, lambda name: range_at(name, index))


def range_length(recipe: Recipe) -> int:
    """Return how many recipes a template with a range stands for (1 without one)."""
    match recipe:
        case Tensor(name):
            return range_size(name)
        case Literal():
            return 1
    if recipe.name in SPREADING:
        return 1
    lengths = {n for n in map(range_length, recipe.items) if n != 1}
    if len(lengths) > 1:
        raise ValueError(f"ranges of different lengths in one {recipe.name}: {sorted(lengths)}")
    return lengths.pop() if lengths else 1


def rename(recipe: Recipe, function: Callable[[str], str]) -> Recipe:
    """Return the recipe with every name of a tensor, and of a quantized weight, passed through `function`."""
    match recipe:
        case Tensor():
            return replace(recipe, name=function(recipe.name))
        case Step():
            named = tuple((k, function(str(v)) if k == WEIGHT else v) for k, v in recipe.attrs)
            return replace(recipe, items=tuple(rename(item, function) for item in recipe.items), attrs=named)
    return recipe


def bind(recipe: Recipe, prefix: str, bindings: Mapping[str, str]) -> Recipe:
    """Return the recipe with absolute names: the prefix put before relative ones, `{layer}` and such filled in."""

    def absolute(name: str) -> str:
        full = name[1:] if name.startswith("/") else prefix + name
        for key, value in bindings.items():
            full = full.replace("{" + key + "}", value)
        return full

    return rename(recipe, absolute)


# --- the steps: each entry infers the type of the result from the types of the items ---------------------------


def _same_dtype(types: list[TensorType]) -> str:
    if len({t.dtype for t in types}) != 1:
        raise ValueError(f"items of different dtypes: {', '.join(sorted({t.dtype for t in types}))}")
    return types[0].dtype


def _one(types: list[TensorType]) -> TensorType:
    if len(types) != 1:
        raise ValueError(f"one item wanted, {len(types)} given")
    return types[0]


def _axis(attributes: Attrs, rank: int) -> int:
    axis = attributes.integer("axis")
    if not 0 <= axis < rank:
        raise ValueError(f"axis {axis} is not in 0..{rank - 1}")
    return axis


def _stack(types: list[TensorType], attributes: Attrs) -> TensorType:
    if len({t.shape for t in types}) != 1:
        raise ValueError(f"stacking different shapes: {', '.join(sorted({str(t) for t in types}))}")
    return TensorType.of(_same_dtype(types), len(types), *types[0].shape)


def _concat(types: list[TensorType], attributes: Attrs) -> TensorType:
    axis = _axis(attributes, len(types[0].shape))
    rest = {t.shape[:axis] + t.shape[axis + 1 :] for t in types}
    if len(rest) != 1:
        raise ValueError(f"shapes differ off axis {axis}: {', '.join(sorted({str(t) for t in types}))}")
    shape = list(types[0].shape)
    shape[axis] = sum(t.sizes[axis] for t in types)
    return TensorType.of(_same_dtype(types), *shape)


def _interleave(types: list[TensorType], attributes: Attrs) -> TensorType:
    if len({t.shape for t in types}) != 1:
        raise ValueError(f"interleaving different shapes: {', '.join(sorted({str(t) for t in types}))}")
    return _concat(types, attributes)


def _transpose(types: list[TensorType], attributes: Attrs) -> TensorType:
    item = _one(types)
    perm = attributes.integers("perm")
    if sorted(perm) != list(range(len(item.shape))):
        raise ValueError(f"perm {perm} does not order the {len(item.shape)} axes of {item}")
    return TensorType.of(item.dtype, *(item.shape[p] for p in perm))


def _slice(types: list[TensorType], attributes: Attrs) -> TensorType:
    item = _one(types)
    axis = _axis(attributes, len(item.shape))
    start, stop = attributes.integer("start"), attributes.integer("stop")
    step_ = attributes.integer("step", 1)
    if not 0 <= start < stop <= item.sizes[axis] or step_ < 1:
        raise ValueError(f"slice {start}:{stop}:{step_} is outside axis {axis} of {item}")
    shape = list(item.sizes)
    shape[axis] = len(range(start, stop, step_))
    return TensorType.of(item.dtype, *shape)


def _reshape(types: list[TensorType], attributes: Attrs) -> TensorType:
    item = _one(types)
    result = TensorType.of(item.dtype, *attributes.integers("shape"))
    if result.elements != item.elements:
        raise ValueError(f"{item} cannot take the shape {attributes['shape']}")
    return result


def _cast(types: list[TensorType], attributes: Attrs) -> TensorType:
    dtype = attributes.text("to")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return TensorType.of(dtype, *_one(types).shape)


def _scale(types: list[TensorType], attributes: Attrs) -> TensorType:
    item, factors = types
    axes = attributes.integers("axes")
    start = attributes.integer("start", 0)
    sizes = [item.sizes[axis] for axis in axes]
    if not axes or list(factors.sizes) != [*sizes[:-1], sizes[-1] - start]:
        raise ValueError(f"factors {factors} do not fit the axes {list(axes)} of {item} from {start} on")
    return TensorType.of(item.dtype, *item.shape)


def _quantize(types: list[TensorType], attributes: Attrs) -> TensorType:
    item = _one(types)
    format = format_of(attributes.text("to"))
    if item.dtype != "f32" or len(item.shape) < 2:
        raise ValueError(f"f32 with two axes or more is quantized, not {item}")
    if item.sizes[-1] % format.group:
        raise ValueError(f"groups of {format.group} do not divide the {item.sizes[-1]} columns of {item}")
    return TensorType.of(format.name, *item.shape)


def _part_of(name: str) -> StepRule:
    def rule(types: list[TensorType], attributes: Attrs) -> TensorType:
        item = _one(types)
        format = find_format(item.dtype)
        if format is None or name not in format.part_names:
            raise ValueError(f"{item} has no {name}")
        *outer, rows, width = item.sizes
        dtype, sizes = format.part(name, rows, width)
        return TensorType.of(dtype, *outer, *sizes)

    return rule


StepRule = Callable[[list[TensorType], Attrs], TensorType]

STEPS: dict[str, StepRule] = {
    "stack": _stack,  # new axis 0
    "concat": _concat,  # axis
    "interleave": _interleave,  # axis: rows 0 of every item, rows 1 of every item, ...
    "transpose": _transpose,  # perm
    "slice": _slice,  # axis, start, stop, step=1
    "reshape": _reshape,  # shape
    "cast": _cast,  # to
    "scale": _scale,  # by factors that lie along axes, start=0 (on the last of them); inverse=false: divide
    "quantize": _quantize,  # to: a format, method, starved, weight: see quantize_step.py; the numbers are those that the codes stand for
    **{name: _part_of(name) for name in PART_NAMES},  # of a quantized weight, as a target stores them
    **CODE_STEPS,  # what reads quantized checkpoints
}
WEIGHT = "weight"  # the option of quantize that names a weight, for methods that look at what it is multiplied with
FITTED = ".awq"  # how the names of tensors end that no checkpoint has: they are fitted on a calibration text
SPREADING = ("stack", "concat", "interleave")


def steps_of(recipe: Recipe) -> Iterator[Step]:
    """Yield the steps of a recipe, the outermost first."""
    if isinstance(recipe, Step):
        yield recipe
        for item in recipe.items:
            yield from steps_of(item)
