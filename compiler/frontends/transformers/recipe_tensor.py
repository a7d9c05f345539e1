"""Tensors without data that write down what transformers' weight conversions do to them, as recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...errors import MoecError
from ...ir.dtypes import DTYPES, dtype_name
from ...ir.recipes import Recipe
from ...weights.joined import join_recipes
from ...weights.steps.table import step


class RecipeTensor(torch.Tensor):
    """A tensor on the meta device that knows by which recipe it is made."""

    recipe: Recipe

    @staticmethod
    def of(recipe: Recipe) -> RecipeTensor:
        """Return a tensor with the recipe's shape and dtype."""
        meta = torch.empty(recipe.type.sizes, dtype=DTYPES[recipe.type.dtype].torch, device="meta")
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


def _recipe_tensors(*recipes: Recipe) -> Any:
    tensors = tuple(RecipeTensor.of(r) for r in recipes)
    return tensors[0] if len(tensors) == 1 else tensors


def _stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    stacked = join_recipes("stack", [t.recipe for t in tensors])
    if dim == 0:
        return _recipe_tensors(stacked)
    order = list(range(1, len(stacked.type.shape)))
    return _recipe_tensors(step("transpose", stacked, perm=tuple([*order[:dim], 0, *order[dim:]])))


def _cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    return _recipe_tensors(join_recipes("concat", [t.recipe for t in tensors], axis=dim % tensors[0].dim()))


def _transpose(x: Any, dim0: int, dim1: int) -> Any:
    perm = list(range(x.dim()))
    perm[dim0], perm[dim1] = perm[dim1], perm[dim0]
    return _recipe_tensors(step("transpose", x.recipe, perm=tuple(perm)))


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
    return _recipe_tensors(step("reshape", x.recipe, shape=tuple(int(s) for s in sizes)))


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


def _index_slices(x: Any, index: Any) -> Any:
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
    wanted = dtype_name(dtype)
    return x if x.recipe.type.dtype == wanted else _recipe_tensors(step("cast", x.recipe, to=wanted))


def _return_unchanged(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


_STEPS: dict[str, Callable[..., Any]] = {
    "stack": _stack, "cat": _cat, "concat": _cat, "chunk": _chunk, "split": _split, "unbind": _unbind,
    "transpose": _transpose, "reshape": _reshape, "view": _reshape, "squeeze": _squeeze, "unsqueeze": _unsqueeze,
    "contiguous": _return_unchanged, "clone": _return_unchanged, "detach": _return_unchanged, "permute": lambda x, *p: _recipe_tensors(
        step("transpose", x.recipe, perm=tuple(p[0] if isinstance(p[0], (tuple, list)) else p))),
    "flatten": _flatten, "unflatten": _unflatten, "__getitem__": _index_slices, "to": _to,
    "t": lambda x: _transpose(x, 0, 1),
}  # fmt: skip
