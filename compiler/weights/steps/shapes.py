"""Steps that stack, join, order, cut, reshape, cast and scale weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ...ir.deferred import torch
from ...ir.dtypes import DTYPES
from ...ir.recipes import Recipe, Step, spread_items
from ...ir.types import Attrs, TensorType
from ..sources.source import Box, full_box
from .declare import Evaluator, Types, box_sizes, only_type, weight_step, with_span


def _same_dtype(types: Types) -> str:
    if len({t.dtype for t in types}) != 1:
        raise ValueError(f"items of different dtypes: {', '.join(sorted({t.dtype for t in types}))}")
    return types[0].dtype


def _checked_axis(attributes: Attrs, rank: int) -> int:
    axis = attributes.integer("axis")
    if not 0 <= axis < rank:
        raise ValueError(f"axis {axis} is not in 0..{rank - 1}")
    return axis


def _empty_box(step: Step, box: Box) -> torch.Tensor:
    return torch.empty(box_sizes(box), dtype=DTYPES[step.type.dtype].torch)


def _stack_type(types: Types, attributes: Attrs) -> TensorType:
    if len({t.shape for t in types}) != 1:
        raise ValueError(f"stacking different shapes: {', '.join(sorted({str(t) for t in types}))}")
    return TensorType.of(_same_dtype(types), len(types), *types[0].shape)


@weight_step("stack", _stack_type, spreads=True, moves=True)
def _stack(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Stack items along a new axis 0."""
    (low, high), rest = box[0], box[1:]
    items = spread_items(step, low, high)
    if len(items) == 1:
        return inner(items[0], rest).unsqueeze(0)
    result = _empty_box(step, box)
    for i, item in enumerate(items):
        result[i] = inner(item, rest)
    return result


def _concat_type(types: Types, attributes: Attrs) -> TensorType:
    axis = _checked_axis(attributes, len(types[0].shape))
    rest = {t.shape[:axis] + t.shape[axis + 1 :] for t in types}
    if len(rest) != 1:
        raise ValueError(f"shapes differ off axis {axis}: {', '.join(sorted({str(t) for t in types}))}")
    shape = list(types[0].shape)
    shape[axis] = sum(t.sizes[axis] for t in types)
    return TensorType.of(_same_dtype(types), *shape)


@weight_step("concat", _concat_type, spreads=True, moves=True)
def _concat(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Put items one after the other along `axis`."""
    axis = step.attributes.integer("axis")
    low, high = box[axis]
    result: torch.Tensor | None = None
    position = 0
    for item in spread_items(step):
        size = item.type.sizes[axis]
        start, stop = max(low, position), min(high, position + size)
        if start < stop:
            part = inner(item, with_span(box, axis, start - position, stop - position))
            if (start, stop) == (low, high):  # the box lies in one item: nothing to copy together
                return part
            result = _empty_box(step, box) if result is None else result
            result.narrow(axis, start - low, stop - start).copy_(part)
        position += size
    assert result is not None
    return result


def _interleave_type(types: Types, attributes: Attrs) -> TensorType:
    if len({t.shape for t in types}) != 1:
        raise ValueError(f"interleaving different shapes: {', '.join(sorted({str(t) for t in types}))}")
    return _concat_type(types, attributes)


@weight_step("interleave", _interleave_type, spreads=True, moves=True)
def _interleave(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Interleave along `axis`: rows 0 of every item, rows 1 of every item, ..."""
    axis = step.attributes.integer("axis")
    low, high = box[axis]
    items = spread_items(step)
    result = _empty_box(step, box)
    for i, item in enumerate(items):
        # row r of item i is row r * len(items) + i of the result
        first, end = (-(-(bound - i) // len(items)) for bound in (low, high))
        if first < end:
            rows = slice(first * len(items) + i - low, None, len(items))
            result[(slice(None),) * axis + (rows,)] = inner(item, with_span(box, axis, first, end))
    return result


def _transpose_type(types: Types, attributes: Attrs) -> TensorType:
    item = only_type(types)
    perm = attributes.integers("perm")
    if sorted(perm) != list(range(len(item.shape))):
        raise ValueError(f"perm {perm} does not order the {len(item.shape)} axes of {item}")
    return TensorType.of(item.dtype, *(item.shape[p] for p in perm))


@weight_step("transpose", _transpose_type, moves=True)
def _transpose(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Order the axes as `perm` says."""
    perm = step.attributes.integers("perm")
    source_box = [(0, 0)] * len(perm)
    for span, axis in zip(box, perm, strict=True):
        source_box[axis] = span
    return inner(step.items[0], tuple(source_box)).permute(perm)


def _slice_type(types: Types, attributes: Attrs) -> TensorType:
    item = only_type(types)
    axis = _checked_axis(attributes, len(item.shape))
    start, stop = attributes.integer("start"), attributes.integer("stop")
    step_ = attributes.integer("step", 1)
    if not 0 <= start < stop <= item.sizes[axis] or step_ < 1:
        raise ValueError(f"slice {start}:{stop}:{step_} is outside axis {axis} of {item}")
    shape = list(item.sizes)
    shape[axis] = len(range(start, stop, step_))
    return TensorType.of(item.dtype, *shape)


@weight_step("slice", _slice_type, moves=True)
def _slice(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Take elements `start` to `stop` of `axis`, every `step`-th (1)."""
    axis, start = step.attributes.integer("axis"), step.attributes.integer("start")
    stride = step.attributes.integer("step", 1)
    low, high = box[axis]
    # rows between the wanted ones are read too: one long read costs less than many short ones
    part = inner(step.items[0], with_span(box, axis, start + low * stride, start + (high - 1) * stride + 1))
    return part if stride == 1 else part[(slice(None),) * axis + (slice(None, None, stride),)]


def _reshape_type(types: Types, attributes: Attrs) -> TensorType:
    item = only_type(types)
    result = TensorType.of(item.dtype, *attributes.integers("shape"))
    if result.elements != item.elements:
        raise ValueError(f"{item} cannot take the shape {attributes['shape']}")
    return result


@weight_step("reshape", _reshape_type, moves=True)
def _reshape(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Take the shape `shape`, axis group by axis group.

    A group is the shortest run of axes with the same number of elements before and after ([E, N, D] -> [E*N, D] has
    the groups E,N -> E*N and D -> D). Within a group, the rows of the box are one range of its flat elements, once
    the axes after the first cut one are widened; that range is a few boxes of the item.
    """
    item = step.items[0]
    groups = _axis_groups(item.type.sizes, step.type.sizes)
    wide = [_widen_to_range([step.type.sizes[k] for k in after], [box[k] for k in after]) for _, after in groups]
    pieces = []
    for (before, after), spans in zip(groups, wide, strict=True):
        low, high = _flat_range([step.type.sizes[k] for k in after], spans)
        pieces.append(list(_flat_boxes([item.type.sizes[k] for k in before], low, high)))
    whole = _join_pieces(item, pieces, [], inner).reshape([b - a for spans in wide for a, b in spans])
    around = [span for group in wide for span in group]
    inside = tuple(slice(a - w, b - w) for (a, b), (w, _) in zip(box, around, strict=True))
    return whole[inside]


def _join_pieces(item: Recipe, pieces: Sequence[list[Box]], chosen: list[Box], inner: Evaluator) -> torch.Tensor:
    """Return the pieces of an item put together, with one axis for each group of axes."""
    if len(chosen) == len(pieces):
        part = inner(item, tuple(span for group in chosen for span in group))
        return part.reshape([math.prod(box_sizes(group)) for group in chosen])
    parts = [_join_pieces(item, pieces, [*chosen, piece], inner) for piece in pieces[len(chosen)]]
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


def _widen_to_range(sizes: Sequence[int], box: Sequence[tuple[int, int]]) -> Box:
    """Return the smallest box around `box` whose elements are one range in row-major order."""
    axis = 0
    while axis < len(box) and box[axis][1] - box[axis][0] == 1:
        axis += 1
    return (*box[: axis + 1], *full_box(sizes[axis + 1 :]))


def _flat_range(sizes: Sequence[int], box: Box) -> tuple[int, int]:
    """Return the range of flat indices that a box made by `_widen_to_range` covers."""
    low = 0
    for size, (start, _) in zip(sizes, box, strict=True):
        low = low * size + start
    return low, low + math.prod(box_sizes(box))


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


def _cast_type(types: Types, attributes: Attrs) -> TensorType:
    dtype = attributes.text("to")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return TensorType.of(dtype, *only_type(types).shape)


@weight_step("cast", _cast_type)
def _cast(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Convert to the dtype `to`."""
    return inner(step.items[0], box).to(DTYPES[step.type.dtype].torch)


def _scale_type(types: Types, attributes: Attrs) -> TensorType:
    item, factors = types
    axes = attributes.integers("axes")
    start = attributes.integer("start", 0)
    sizes = [item.sizes[axis] for axis in axes]
    if not axes or list(factors.sizes) != [*sizes[:-1], sizes[-1] - start]:
        raise ValueError(f"factors {factors} do not fit the axes {list(axes)} of {item} from {start} on")
    return TensorType.of(item.dtype, *item.shape)


@weight_step("scale", _scale_type)
def _scale(step: Step, box: Box, inner: Evaluator) -> torch.Tensor:
    """Multiply by factors that lie along `axes`, from `start` (0) of the last of them on; divide with `inverse`."""
    axes = step.attributes.integers("axes")
    start = step.attributes.integer("start", 0)
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


STEPS = (_stack, _concat, _interleave, _transpose, _slice, _reshape, _cast, _scale)
