"""Split the recipe of a weight into the recipes of its codes, scales and zero points.

A checkpoint's codes pass through the steps that stack, join and reorder weights as the numbers do, as long as the axis
along which codes share scales stays whole. What comes out can be stored as `packed` without computing a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..formats.format import Format
from ..formats.table import ELEMENTS, GROUPS, INTEGER_BITS, NAMED, find_format, format_of
from ..ir.recipes import Recipe, Step
from .steps.table import step

FP8_BLOCK = (128, 128)  # rows and columns of FP8 that share a scale in checkpoints


class NotKept(Exception):
    """Raised where a recipe cannot be split into codes and scales; the text is a part of a sentence."""


@dataclass(frozen=True)
class Codes:
    """Codes u8 and what they stand for: w = scale (code - zero), or an element of a table times the scale.

    `scales` and `zeros` have the shape of the codes, with one element for every `group` codes along `axis`, and where
    `rows` is not 1 for every `rows` codes along the axis before it.
    """

    codes: Recipe
    scales: Recipe
    zeros: Recipe | None
    axis: int
    group: int
    bits: int
    element: str = "int"  # int, a key of formats.table.ELEMENTS, or e4m3
    rows: int = 1

    @property
    def name(self) -> str:
        """The format of the checkpoint, in words."""
        if self.rows > 1:
            return f"{self.element} in blocks of {self.rows} x {self.group}"
        kind = f"{'u' * (self.zeros is not None)}int{self.bits}" if self.element == "int" else self.element
        kind = next((format.name for format in NAMED if _is_in(self, format)), kind)
        return f"{kind} in groups of {self.group}"

    @property
    def items(self) -> list[Recipe]:
        """Codes, scales and zero points, these where there are some."""
        return [self.codes, self.scales, *([self.zeros] if self.zeros is not None else [])]

    def with_items(self, items: Sequence[Recipe], axis: int | None = None) -> Codes:
        """Return the same with other recipes."""
        codes, scales, *zeros = items
        axis = self.axis if axis is None else axis
        return replace(self, codes=codes, scales=scales, zeros=zeros[0] if zeros else None, axis=axis)


def is_stored_quantized(recipe: Recipe) -> bool:
    """Return whether any part of a recipe comes from codes of a checkpoint."""
    if not isinstance(recipe, Step):
        return False
    return recipe.name == "dequantize" or any(map(is_stored_quantized, recipe.items))


def take_apart(recipe: Recipe) -> Codes:
    """Return the codes of a recipe; NotKept says why there are none."""
    if not isinstance(recipe, Step):
        raise NotKept("a part of it is not quantized in the checkpoint")
    attributes = recipe.attributes
    match recipe.name:
        case "dequantize":
            return _codes_of_dequantize(recipe)
        case "cast" if attributes["to"] == "f32" and recipe.items[0].type.dtype == "f32":
            return take_apart(recipe.items[0])
        case "stack" | "concat" | "interleave":
            return _codes_of_join(recipe)
        case "transpose":
            perm = attributes.integers("perm")
            found = take_apart(recipe.items[0])
            if found.rows > 1 and perm.index(found.axis) != perm.index(found.axis - 1) + 1:
                raise NotKept("its blocks of rows and columns would be turned")
            return found.with_items([step("transpose", i, perm=perm) for i in found.items], perm.index(found.axis))
        case "slice":
            return _codes_of_slice(recipe)
        case "reshape":
            return _codes_of_reshape(recipe)
    raise NotKept(f"its codes do not pass through {recipe.name}")


def _codes_of_dequantize(recipe: Step) -> Codes:
    codes, scales, *zeros = recipe.items
    block = recipe.attributes.integers("block")
    bits, element = recipe.attributes.integer("bits", 0), "int"
    if isinstance(codes, Step) and codes.name == "decode":
        bits, element, codes = 4, str(codes.attributes["of"]), codes.items[0]
    if not bits and codes.type.dtype == "f8e4m3" and block[-2:] == FP8_BLOCK and set(block[:-2]) <= {1}:
        group = min(FP8_BLOCK[1], codes.type.sizes[-1])
        codes = step("view", codes, to="u8")
        return Codes(codes, scales, None, len(block) - 1, group, 8, "e4m3", FP8_BLOCK[0])
    if not bits:
        raise NotKept(f"its codes are {codes.type.dtype}")
    if zeros and zeros[0].type.dtype != "u8":
        raise NotKept("its groups have minimums that are no multiples of their scales")
    if recipe.attributes.get("divide"):
        raise NotKept("its numbers are divided by scales")
    sizes = codes.type.sizes
    shared = [i for i, (b, n) in enumerate(zip(block, sizes, strict=True)) if b > 1 and n > 1]
    axis = len(sizes) - 1
    if not shared and sizes[axis] > 1:
        raise NotKept("each of its columns has a scale of its own (GPTQ's desc_act)")
    for i in shared:  # scales shared along other axes are written out
        if i != axis:
            scales, *zeros = (_repeat_along_axis(item, i, block[i], sizes[i]) for item in (scales, *zeros))
    return Codes(codes, scales, zeros[0] if zeros else None, axis, min(block[axis], sizes[axis]), bits, element)


def _repeat_along_axis(item: Recipe, axis: int, times: int, size: int) -> Recipe:
    """Return an item repeated along an axis, cut to a size."""
    repeated = item if times == 1 else step("repeat", item, axis=axis, times=times)
    return repeated if repeated.type.sizes[axis] == size else step("slice", repeated, axis=axis, start=0, stop=size)


def _codes_of_join(recipe: Step) -> Codes:
    parts = _with_common_codes([take_apart(item) for item in recipe.items])
    first = parts[0]
    kinds = {(p.axis, p.group, p.bits, p.element, p.zeros is None, p.rows) for p in parts}
    if len(kinds) > 1:
        raise NotKept(f"its parts are stored differently: {', '.join(sorted({p.name for p in parts}))}")
    axis = recipe.attributes.get("axis")
    if axis == first.axis and any(p.codes.type.sizes[first.axis] % first.group for p in parts):
        raise NotKept("groups would be cut where its parts meet")
    if axis == first.axis and recipe.name == "interleave":
        raise NotKept("columns of different groups would be interleaved")
    cut = recipe.name == "interleave" or any(p.codes.type.sizes[first.axis - 1] % first.rows for p in parts[:-1])
    if recipe.name != "stack" and axis == first.axis - 1 and first.rows > 1 and cut:
        raise NotKept("blocks of rows would be cut where its parts meet")
    items = [step(recipe.name, *column, **recipe.attributes) for column in zip(*(p.items for p in parts), strict=True)]
    return first.with_items(items, first.axis + (recipe.name == "stack"))


def _with_common_codes(parts: list[Codes]) -> list[Codes]:
    """Return integers of several widths or groups as those of the widest codes and of groups that divide all of theirs.

    No number changes: codes count from the same zero points, and a scale is written once for each of the smaller groups.
    """
    first = parts[0]
    if any((p.element, p.axis, p.rows) != ("int", first.axis, 1) for p in parts):
        return parts
    bits, group = max(p.bits for p in parts), math.gcd(*(p.group for p in parts))
    zeros = any(p.zeros is not None for p in parts)
    dtypes = {p.scales.type.dtype for p in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else "f32"
    return [_with_common_form(p, bits, group, zeros, dtype) for p in parts]


def _with_common_form(part: Codes, bits: int, group: int, zeros: bool, dtype: str) -> Codes:
    """Return integer codes in more bits and smaller groups, with zero points and the dtype of scales that are wanted."""
    codes, scales, points = part.codes, part.scales, part.zeros
    half, wanted = 1 << (part.bits - 1), 1 << (bits - 1)
    if points is None and zeros:
        points = step("affine", scales, to="u8", factor=0, add=half)
    elif points is None and half != wanted:  # codes count from the middle of their range, which moves
        codes = step("affine", codes, to="u8", add=wanted - half)
    if scales.type.dtype != dtype:
        scales = step("cast", scales, to=dtype)
    if group != part.group:
        count = -(-codes.type.sizes[part.axis] // group)
        scales = _repeat_along_axis(scales, part.axis, part.group // group, count)
        points = points if points is None else _repeat_along_axis(points, part.axis, part.group // group, count)
    return replace(part, codes=codes, scales=scales, zeros=points, bits=bits, group=group)


def _codes_of_slice(recipe: Step) -> Codes:
    found = take_apart(recipe.items[0])
    options = recipe.attributes
    axis = options.integer("axis")
    shared = found.group if axis == found.axis else found.rows if axis == found.axis - 1 else 1
    if shared == 1 and axis != found.axis:
        return found.with_items([step("slice", item, **options) for item in found.items])
    start, stop = options.integer("start"), options.integer("stop")
    if start % shared or options.get("step", 1) != 1:
        raise NotKept("a slice of it begins within a group")
    codes = step("slice", found.codes, **options)
    ends = {"start": start // shared, "stop": -(-stop // shared)}
    return found.with_items([codes, *(step("slice", i, axis=axis, **ends) for i in found.items[1:])])


def _codes_of_reshape(recipe: Step) -> Codes:
    found = take_apart(recipe.items[0])
    before, after = found.codes.type.sizes, recipe.type.sizes
    behind = math.prod(before[found.axis + 1 :])
    axis = next((k for k in range(len(after)) if math.prod(after[k + 1 :]) == behind and after[k] > 1), None)
    if axis is None or after[axis] != before[found.axis]:
        raise NotKept("a reshape of it changes the axis along which codes share scales")
    if found.rows > 1 and after[axis - 1] != before[found.axis - 1]:
        raise NotKept("a reshape of it changes the rows that share scales")
    groups = found.scales.type.sizes[found.axis]
    grouped = (*after[:axis], groups, *after[axis + 1 :])
    if found.rows > 1:
        grouped = (*grouped[: axis - 1], found.scales.type.sizes[found.axis - 1], *grouped[axis:])
    shapes = [after, *(grouped for _ in found.items[1:])]
    return found.with_items([step("reshape", i, shape=s) for i, s in zip(found.items, shapes, strict=True)], axis)


# --- in a format ---------------------------------------------------------------------------------------------------


def exact_formats(found: Codes) -> Iterator[Format]:
    """Yield the formats that hold the codes and their scales exactly, the fewest bits first, then the largest groups."""
    columns = found.codes.type.sizes[found.axis]
    groups = [g for g in reversed(GROUPS) if columns % g == 0 and (found.group % g == 0 or found.group >= columns)]
    grids = [f for f in (find_format(f"{found.element}_g{g}") for g in groups) if f is not None and f.element != "int"]
    yield from (format for format in (*NAMED, *grids) if _is_in(found, format) and columns % format.group == 0)
    if found.element == "e4m3":
        return
    for bits in INTEGER_BITS:
        if bits >= (found.bits if found.element == "int" else 8):
            for prefix in ("", "u") if found.zeros is None else ("u",):
                yield from (format_of(f"{prefix}int{bits}_g{group}") for group in groups)


def _is_in(found: Codes, format: Format) -> bool:
    """Return whether codes are those of a format that is no integers, one scale for as many of them, and their scales too."""
    alike = (found.element, found.rows, found.group) == (format.element, format.rows, format.group)
    return alike and format.scale in ("f32", found.scales.type.dtype) and not format.tensor_scale


def pack_codes(found: Codes, format: Format) -> Recipe:
    """Return the weight in a format that `exact_formats` yields, the groups along the last axis; NotKept otherwise."""
    last = len(found.codes.type.shape) - 1
    if found.axis != last:
        raise NotKept("codes share scales along another axis than the last")
    columns = found.codes.type.sizes[last]
    codes, scales, *zeros = found.items
    if found.element != "int" and format.element == "int":
        codes, scales = _as_integers(found)
    elif found.zeros is None and format.element == "int" and format.bits > found.bits:
        # codes count from the middle of their range, which moves
        codes = step("affine", codes, to="u8", add=(1 << (format.bits - 1)) - (1 << (found.bits - 1)))
    if format.group != found.group:
        times = max(1, -(-found.group // format.group))
        scales, *zeros = (_repeat_along_axis(item, last, times, columns // format.group) for item in (scales, *zeros))
    return step("packed", codes, scales, *zeros, to=format.name)


def _as_integers(found: Codes) -> tuple[Recipe, Recipe]:
    """Return codes of 8 bits and their scales: E2M1 counts halves, IQ4_NL is a table of integers."""
    times = 2 if found.element == "e2m1" else 1
    numbers = step("decode", found.codes, of=found.element)
    codes = step("affine", numbers, to="u8", factor=times, add=128)
    scales = found.scales if times == 1 else step("affine", found.scales, to="f32", factor=1 / times)
    assert max(abs(v) * times for v in ELEMENTS[found.element]) < 128
    return codes, scales
