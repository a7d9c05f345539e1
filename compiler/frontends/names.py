"""From a model's parameter names to recipes over checkpoint tensors, by transformers' own conversion rules.

transformers loads a checkpoint by renaming tensors and by running small operations on them (stack the experts,
concatenate gate and up, ...). The same rules are run here on `RecipeTensor`s, which hold no data and write down
what is done to them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from ..dtypes import DTYPE_NAMES, TORCH_DTYPES
from ..errors import MoecError
from ..ir import TensorType
from ..recipes import Recipe, Step, Tensor, rename, step


class RecipeTensor(torch.Tensor):
    """A tensor on the meta device that knows by which recipe it is made."""

    recipe: Recipe

    @staticmethod
    def of(recipe: Recipe) -> RecipeTensor:
        """Return a tensor with the recipe's shape and dtype."""
        meta = torch.empty(recipe.type.sizes, dtype=TORCH_DTYPES[recipe.type.dtype], device="meta")
        tensor = torch.Tensor._make_subclass(RecipeTensor, meta)
        tensor.recipe = recipe
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in _STEPS:
            return _STEPS[name](*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            raise MoecError(f"the weight conversion step {name} is not understood")
        return result


def _made(*recipes: Recipe) -> Any:
    tensors = tuple(RecipeTensor.of(r) for r in recipes)
    return tensors[0] if len(tensors) == 1 else tensors


def _stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    stacked = step("stack", *gather_range([t.recipe for t in tensors]))
    if dim == 0:
        return _made(stacked)
    order = list(range(1, len(stacked.type.shape)))
    return _made(step("transpose", stacked, perm=tuple([*order[:dim], 0, *order[dim:]])))


def _cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    return _made(step("concat", *gather_range([t.recipe for t in tensors]), axis=dim % tensors[0].dim()))


def _transpose(x: Any, dim0: int, dim1: int) -> Any:
    perm = list(range(x.dim()))
    perm[dim0], perm[dim1] = perm[dim1], perm[dim0]
    return _made(step("transpose", x.recipe, perm=tuple(perm)))


def _split(x: Any, split_size_or_sections: int | Sequence[int], dim: int = 0) -> Any:
    length, sizes = x.shape[dim], split_size_or_sections
    if isinstance(sizes, int):
        sizes = [min(sizes, length - i) for i in range(0, length, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pieces = [
        step("slice", x.recipe, axis=dim % x.dim(), start=a, stop=a + n) for a, n in zip(starts, sizes, strict=True)
    ]
    return tuple(RecipeTensor.of(p) for p in pieces)


def _chunk(x: Any, chunks: int, dim: int = 0) -> Any:
    return _split(x, -(-x.shape[dim] // chunks), dim)


def _unbind(x: Any, dim: int = 0) -> Any:
    return tuple(_squeeze(piece, dim) for piece in _split(x, 1, dim))


def _reshape(x: Any, *shape: Any) -> Any:
    sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape)
    if -1 in sizes:
        known = -1
        for n in sizes:
            known *= n if n != -1 else -1
        sizes[sizes.index(-1)] = x.numel() // abs(known)
    if tuple(sizes) == tuple(x.shape):
        return x
    return _made(step("reshape", x.recipe, shape=tuple(int(s) for s in sizes)))


def _squeeze(x: Any, dim: int) -> Any:
    return _reshape(x, [n for i, n in enumerate(x.shape) if i != dim % x.dim() or n != 1])


def _unsqueeze(x: Any, dim: int) -> Any:
    shape = list(x.shape)
    shape.insert(dim if dim >= 0 else dim + x.dim() + 1, 1)
    return _reshape(x, shape)


def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    first, last = start_dim % x.dim(), end_dim % x.dim()
    return _reshape(x, [*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :]])


def _unflatten(x: Any, dim: int, sizes: Sequence[int]) -> Any:
    axis, known = dim % x.dim(), math.prod(n for n in sizes if n != -1)
    whole = [x.shape[axis] // known if n == -1 else n for n in sizes]
    return _reshape(x, [*x.shape[:axis], *whole, *x.shape[axis + 1 :]])


def _index(x: Any, index: Any) -> Any:
    """Take slices along axes, and single places, whose axes vanish."""
    places = list(index) if isinstance(index, tuple) else [index]
    if any(p is ... for p in places):
        at = next(i for i, p in enumerate(places) if p is ...)
        places[at : at + 1] = [slice(None)] * (x.dim() - len(places) + 1)
    if not all(isinstance(p, int) or (isinstance(p, slice) and p.step in (None, 1)) for p in places):
        raise MoecError(f"the weight conversion step [{index}] is not understood")
    recipe = x.recipe
    for axis, place in enumerate(places):
        start, stop, _ = (slice(place, place + 1 or None) if isinstance(place, int) else place).indices(x.shape[axis])
        if (start, stop) != (0, x.shape[axis]):
            recipe = step("slice", recipe, axis=axis, start=start, stop=stop)
    kept = [n for i, n in enumerate(recipe.type.sizes) if not (i < len(places) and isinstance(places[i], int))]
    return _reshape(RecipeTensor.of(recipe), kept)


def _to(x: Any, dtype: Any, **kwargs: Any) -> Any:
    if not isinstance(dtype, torch.dtype):  # a device: there is no data here
        return x
    wanted = DTYPE_NAMES[dtype]
    return x if x.recipe.type.dtype == wanted else _made(step("cast", x.recipe, to=wanted))


def _same(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


_STEPS: dict[str, Callable[..., Any]] = {
    "stack": _stack, "cat": _cat, "concat": _cat, "chunk": _chunk, "split": _split, "unbind": _unbind,
    "transpose": _transpose, "reshape": _reshape, "view": _reshape, "squeeze": _squeeze, "unsqueeze": _unsqueeze,
    "contiguous": _same, "clone": _same, "detach": _same, "permute": lambda x, *p: _made(
        step("transpose", x.recipe, perm=tuple(p[0] if isinstance(p[0], (tuple, list)) else p))),
    "flatten": _flatten, "unflatten": _unflatten, "__getitem__": _index, "to": _to,
    "t": lambda x: _transpose(x, 0, 1),
}  # fmt: skip


# --- ranges: 64 recipes that differ in one number are one recipe with {0..63} in its names ------------------------


def gather_range(recipes: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """Return one template where the recipes are alike but for one number that counts up, else the recipes."""
    template = _template(recipes) if len(recipes) > 1 else None
    return (template,) if template is not None else tuple(recipes)


def _template(recipes: Sequence[Recipe]) -> Recipe | None:
    first = recipes[0]
    if isinstance(first, Tensor):
        if any(not isinstance(r, Tensor) or r.type != first.type for r in recipes):
            return None
        name = _name_range([r.name for r in recipes if isinstance(r, Tensor)])
        return Tensor(name, first.type) if name else None
    if not isinstance(first, Step):
        return None
    if any(
        not isinstance(r, Step) or (r.name, r.attrs, r.type) != (first.name, first.attrs, first.type) for r in recipes
    ):
        return None
    if first.name in ("stack", "concat", "interleave"):
        return None
    columns = zip(*(r.items for r in recipes if isinstance(r, Step)), strict=True)
    items = [_template(column) for column in columns]
    if any(item is None for item in items):
        return None
    return Step(first.name, tuple(i for i in items if i is not None), first.attrs, first.type)


def _name_range(names: Sequence[str]) -> str | None:
    parts = [n.split(".") for n in names]
    if len({len(p) for p in parts}) != 1:
        return None
    differing = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    if len(differing) != 1:
        return None
    numbers = [p[differing[0]] for p in parts]
    if not numbers[0].isdigit() or numbers != [str(int(numbers[0]) + i) for i in range(len(numbers))]:
        return None
    parts[0][differing[0]] = f"{{{numbers[0]}..{numbers[-1]}}}"
    return ".".join(parts[0])


# --- the mapping ---------------------------------------------------------------------------------------------------


def map_parameters(model: Any, wanted: Iterable[str], available: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Return a recipe for each wanted parameter name of a transformers model on the meta device.

    `available` are the checkpoint's tensors by name, as recipes, since a stored tensor may need dequantizing first.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    state = model.state_dict()
    wanted = set(wanted)
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    collected: dict[str, Any] = {}
    for original in sorted(available, key=_natural):
        renamed, pattern = rename_source_key(original, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and original in state:
            renamed, pattern = original, None
        if renamed not in state:
            continue
        if pattern is None:
            entry = collected.setdefault(renamed, WeightRenaming(original, renamed))
            pattern = original
        else:
            entry = collected.setdefault(renamed, deepcopy(by_pattern[pattern]))
        entry.add_tensor(renamed, original, pattern, RecipeTensor.of(available[original]))
    recipes: dict[str, Recipe] = {}
    for first_name, entry in collected.items():
        if first_name not in wanted and isinstance(entry, WeightRenaming):
            continue
        for name, made in entry.convert(first_name, model=model, config=model.config).items():
            made = made[0] if isinstance(made, list) else made
            if name in wanted:
                _check_shape(name, made.recipe, state[name])
                recipes[name] = made.recipe
    return recipes


def _check_shape(name: str, recipe: Recipe, parameter: torch.Tensor) -> None:
    if tuple(recipe.type.sizes) != tuple(parameter.shape):
        first = recipe
        while isinstance(first, Step):
            first = first.items[0]
        raise MoecError(
            f"the checkpoint's tensors give {name} the shape {list(recipe.type.sizes)}, "
            f"the config wants {list(parameter.shape)}",
            where=first.name if isinstance(first, Tensor) else "",
            todo="config.json and the weights do not belong together, or a tensor is incomplete",
        )


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def expected_tensors(model: Any, state: Mapping[str, torch.Tensor], dtype: str) -> dict[str, Recipe]:
    """Return the tensors that transformers would save the model's state as, with floats of a dtype.

    This is what a config without weights is imported with.
    """
    from transformers.core_model_loading import revert_weight_conversion

    reverted = revert_weight_conversion(model, dict(state))
    found: dict[str, Recipe] = {}
    for name, tensor in reverted.items():
        kind = dtype if tensor.is_floating_point() else DTYPE_NAMES[tensor.dtype]
        found[name] = Tensor(name, TensorType.of(kind, *tensor.shape))
    return found


def relative_to_layer(recipe: Recipe, layer: int) -> tuple[str, Recipe] | None:
    """Return (prefix with {layer}, recipe with names behind that prefix) if every name has the layer's number first."""
    prefixes = set()
    for tensor in _leaves(recipe):
        found = re.match(rf"(?:[^.\d][^.]*\.)*?{layer}\.", tensor.name)
        if not found:
            return None
        prefixes.add(found[0])
    if len(prefixes) != 1:
        return None
    prefix = prefixes.pop()
    return prefix[: -len(f"{layer}.")] + "{layer}.", rename(recipe, lambda n: n[len(prefix) :])


def apart_from_layer(recipe: Recipe, layer: int) -> Recipe | None:
    """Return the recipe with absolute names where one part is the layer's number, or the number before it, if all have one.

    They become `{layer}` and `{before}`: tensors that lie outside of their layers (`attn_res.attn_queries.0` is layer 1's).
    """
    made: dict[str, str] = {}
    for tensor in _leaves(recipe):
        parts = tensor.name.split(".")
        for number, label in ((layer, "{layer}"), (layer - 1, "{before}")):
            if parts.count(str(number)) == 1 and tensor.name not in made:
                parts[parts.index(str(number))] = label
                made[tensor.name] = "/" + ".".join(parts)
        if tensor.name not in made:
            return None
    return rename(recipe, made.__getitem__)


def names_before(recipe: Recipe) -> bool:
    """Return whether a name of the recipe holds the number of the layer before."""
    return any("{before}" in tensor.name for tensor in _leaves(recipe))


def _leaves(recipe: Recipe) -> Iterable[Tensor]:
    if isinstance(recipe, Tensor):
        yield recipe
    elif isinstance(recipe, Step):
        for item in recipe.items:
            yield from _leaves(item)
