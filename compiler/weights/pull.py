"""Evaluate a recipe for a box of its result, reading only what the box needs.

Every step maps the box of its result to boxes of its items, so that a tile of a stacked, transposed, dequantized
tensor costs memory for the tile alone. `tiles` gives the boxes whose bytes, one after the other, are the tensor's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..ir.dtypes import DTYPES, torch_dtype
from ..ir.recipes import Literal, Recipe, Step, Tensor, spread
from .codes import CODES
from .evaluator import Evaluator
from .quantized import QUANTIZED
from .sources.source import Box, WeightSource, check_box, cut, full_box

_FRACTION_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@dataclass(frozen=True)
class Pull:
    """Evaluates recipes on a source; every step is given it for its items."""

    source: WeightSource

    def __call__(self, item: Recipe, part: Box) -> torch.Tensor:
        """Return what a recipe makes in a box."""
        shape = _shape(part)
        if 0 in shape:
            return torch.empty(shape, dtype=torch_dtype(item.type.dtype))
        match item:
            case Tensor():
                return self.source.read(item.name, part, item.type)
            case Literal():
                return _literal(item, part)
        return EVALUATE[item.name](item, part, self)


def pull(recipe: Recipe, source: WeightSource, box: Box | None = None) -> torch.Tensor:
    """Return what a bound recipe (absolute names, see `recipes.bind`) makes, or the part of it in `box`.

    The result is contiguous (strides as of a new tensor), with the dtype of the recipe and the shape of the box; it
    may share memory with the source and must not be written to. Raises MoecError for tensors that the source lacks
    or holds with another type.
    """

    sizes = recipe.type.sizes
    return row_major(Pull(source)(recipe, full_box(sizes) if box is None else check_box(box, sizes)))


def row_major(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with its elements in row-major order and the strides of a new tensor.

    An axis of size 1 may keep any stride in a "contiguous" tensor, and then torch refuses to view it as bytes.
    """
    result = tensor.contiguous()
    return result.as_strided(result.shape, [math.prod(result.shape[k + 1 :]) for k in range(result.dim())])


def _shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _literal(literal: Literal, box: Box) -> torch.Tensor:
    dtype = DTYPES[literal.type.dtype].torch
    wide = torch.tensor(literal.values, dtype=torch.float64 if dtype.is_floating_point else torch.int64)
    numbers = wide.to(dtype)
    if dtype in _FRACTION_BITS and bool(wide.isnan().any()):  # a conversion may give any NaN for one
        numbers = torch.where(wide.isnan(), _nans(wide, dtype), numbers)
    return cut(numbers.reshape(literal.type.sizes), box)


def _nans(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return NaNs with the sign and the first bits of the fraction of f64[N], in another dtype."""
    size, kept = dtype.itemsize * 8, _FRACTION_BITS[dtype]
    bits = wide.view(torch.int64)
    exponent = ((1 << (size - 1 - kept)) - 1) << kept
    fraction = (bits >> (52 - kept)) & ((1 << kept) - 1)
    fraction = torch.where(fraction == 0, 1 << (kept - 1), fraction)  # 0 would be an infinity
    found = ((bits < 0).long() << (size - 1)) | exponent | fraction
    return found.to({16: torch.int16, 32: torch.int32, 64: torch.int64}[size]).view(dtype)


def _allocate(step: Step, box: Box) -> torch.Tensor:
    return torch.empty(_shape(box), dtype=DTYPES[step.type.dtype].torch)


def _stack(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    (low, high), rest = box[0], box[1:]
    items = spread(step, low, high)
    if len(items) == 1:
        return inner(items[0], rest).unsqueeze(0)
    result = _allocate(step, box)
    for i, item in enumerate(items):
        result[i] = inner(item, rest)
    return result


def _concat(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    axis = step.attributes.integer("axis")
    low, high = box[axis]
    result: torch.Tensor | None = None
    position = 0
    for item in spread(step):
        size = item.type.sizes[axis]
        start, stop = max(low, position), min(high, position + size)
        if start < stop:
            part = inner(item, _replace(box, axis, start - position, stop - position))
            if (start, stop) == (low, high):  # the box lies in one item: nothing to copy together
                return part
            result = _allocate(step, box) if result is None else result
            result.narrow(axis, start - low, stop - start).copy_(part)
        position += size
    assert result is not None
    return result


def _interleave(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    axis = step.attributes.integer("axis")
    low, high = box[axis]
    items = spread(step)
    result = _allocate(step, box)
    for i, item in enumerate(items):
        # row r of item i is row r * len(items) + i of the result
        first, end = (-(-(bound - i) // len(items)) for bound in (low, high))
        if first < end:
            rows = slice(first * len(items) + i - low, None, len(items))
            result[(slice(None),) * axis + (rows,)] = inner(item, _replace(box, axis, first, end))
    return result


def _transpose(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    perm = step.attributes.integers("perm")
    source_box = [(0, 0)] * len(perm)
    for span, axis in zip(box, perm, strict=True):
        source_box[axis] = span
    return inner(step.items[0], tuple(source_box)).permute(perm)


def _slice(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    axis, start = step.attributes.integer("axis"), step.attributes.integer("start")
    stride = step.attributes.integer("step") if "step" in step.attributes else 1
    low, high = box[axis]
    # rows between the wanted ones are read too: one long read costs less than many short ones
    part = inner(step.items[0], _replace(box, axis, start + low * stride, start + (high - 1) * stride + 1))
    return part if stride == 1 else part[(slice(None),) * axis + (slice(None, None, stride),)]


def _cast(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    return inner(step.items[0], box).to(DTYPES[step.type.dtype].torch)


def _scale(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    axes = step.attributes.integers("axes")
    start = step.attributes.integer("start") if "start" in step.attributes else 0
    numbers = inner(step.items[0], box)
    low, high = (max(bound, start) for bound in box[axes[-1]])
    if low == high:
        return numbers
    factors = inner(step.items[1], (*(box[axis] for axis in axes[:-1]), (low - start, high - start)))
    spread_ = [1] * len(box)
    for axis, size in zip(axes, factors.shape, strict=True):
        spread_[axis] = size
    factors = factors.reshape(spread_)
    result = numbers.clone()
    part = result.narrow(axes[-1], low - box[axes[-1]][0], high - low)
    part.copy_(part / factors if step.attributes.get("inverse") else part * factors)
    return result


def _reshape(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Evaluate a reshape axis group by axis group.

    A group is the shortest run of axes with the same number of elements before and after ([E, N, D] -> [E*N, D] has
    the groups E,N -> E*N and D -> D). Within a group, the rows of the box are one range of its flat elements, once
    the axes after the first cut one are widened; that range is a few boxes of the item.
    """
    item = step.items[0]
    groups = _axis_groups(item.type.sizes, step.type.sizes)
    wide = [_widen([step.type.sizes[k] for k in after], [box[k] for k in after]) for _, after in groups]
    pieces = []
    for (before, after), spans in zip(groups, wide, strict=True):
        low, high = _flat_range([step.type.sizes[k] for k in after], spans)
        pieces.append(list(_flat_boxes([item.type.sizes[k] for k in before], low, high)))
    whole = _gather(item, pieces, [], inner).reshape([b - a for spans in wide for a, b in spans])
    around = [span for group in wide for span in group]
    inside = tuple(slice(a - w, b - w) for (a, b), (w, _) in zip(box, around, strict=True))
    return whole[inside]


def _gather(item: Recipe, pieces: Sequence[list[Box]], chosen: list[Box], inner: Evaluator) -> torch.Tensor:
    """Return the pieces of an item put together, with one axis for each group of axes."""
    if len(chosen) == len(pieces):
        part = inner(item, tuple(span for group in chosen for span in group))
        return part.reshape([math.prod(_shape(group)) for group in chosen])
    parts = [_gather(item, pieces, [*chosen, piece], inner) for piece in pieces[len(chosen)]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=len(chosen))


def _axis_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """Return the runs of axes (before, after) that have the same number of elements, in order."""
    groups = []
    i = j = 0
    while i < len(before) or j < len(after):
        first, second, left, right = i, j, 0, 0  # 0: nothing taken yet
        while left != right or not left:
            if i < len(before) and (left <= right or j == len(after)):
                left, i = max(left, 1) * before[i], i + 1
                right = max(right, 1)
            else:
                right, j = max(right, 1) * after[j], j + 1
                left = max(left, 1)
        groups.append((range(first, i), range(second, j)))
    return groups


def _widen(sizes: Sequence[int], box: Sequence[tuple[int, int]]) -> Box:
    """Return the smallest box around `box` whose elements are one range in row-major order."""
    axis = 0
    while axis < len(box) and box[axis][1] - box[axis][0] == 1:
        axis += 1
    return (*box[: axis + 1], *full_box(sizes[axis + 1 :]))


def _flat_range(sizes: Sequence[int], box: Box) -> tuple[int, int]:
    """Return the range of flat indices that a box made by `_widen` covers."""
    low = 0
    for size, (start, _) in zip(sizes, box, strict=True):
        low = low * size + start
    return low, low + math.prod(_shape(box))


def _flat_boxes(sizes: Sequence[int], low: int, high: int) -> Iterator[Box]:
    """Yield boxes that cover the flat indices low..high in order: at most two for each axis and one more."""
    if not sizes:
        yield ()
        return
    rest = sizes[1:]
    inner = math.prod(rest)
    row, offset = divmod(low, inner)
    if offset:  # the end of a row that is begun
        stop = min(high, (row + 1) * inner)
        for part in _flat_boxes(rest, offset, stop - row * inner):
            yield ((row, row + 1), *part)
        low, row = stop, row + 1
    last = high // inner
    if row < last and low < high:
        yield ((row, last), *full_box(rest))
        low = last * inner
    if low < high:  # the start of a last row
        for part in _flat_boxes(rest, 0, high - low):
            yield ((last, last + 1), *part)


def _replace(box: Box, axis: int, start: int, stop: int) -> Box:
    return (*box[:axis], (start, stop), *box[axis + 1 :])


# the step's name in recipes.STEPS -> how it is evaluated: (step, box of the result, pull of an item)
EVALUATE: dict[str, Callable[[Step, Box, Evaluator], torch.Tensor]] = {
    "stack": _stack,
    "concat": _concat,
    "interleave": _interleave,
    "transpose": _transpose,
    "slice": _slice,
    "reshape": _reshape,
    "cast": _cast,
    **QUANTIZED,
    **CODES,
    "scale": _scale,
}
