"""Products of activations in a quantized format with weights in one: the matrix unit gets codes.

Where scales are f32, each step of the depth is one group of the activations. Its sum of products is the matrix unit's;
it is multiplied by the scales of its row and of the weight and added, in f32, to what the steps before gave. Scales
that are powers of two for 32 codes (MX formats), and E4M3 ones for 16 (NVFP4), the matrix unit takes itself. NVFP4 has a
scale for a matrix too: each row of activations counts as one, so that no token's numbers depend on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ....compiler.errors import MoecError
from ....compiler.formats.format import Format
from ....compiler.formats.table import find_format, format_of
from ..tile.builder import Builder, Layout
from ..tile.packing import Packing, codes_of, scales_of
from ..tile.tiles import Program, round_up
from .choices import RowTile, Tile

LARGEST = 448.0  # of E4M3
FACTORS = "factors"  # the part of rows in a format that holds a scale for each row
FNUZ = "f8e4m3fnuz"  # AMD's older E4M3: the same bits are half of the number, and -0 is none
ROUNDS = 1.5 * 2.0**23  # added to an f32 it leaves a whole number, ties to even


def declare_rows(b: Builder, name: str, dtype: str, *shape: int | str, role: str = "input") -> None:
    """Declare activations as a tensor of a program, those in a format as its codes and scales."""
    form = find_format(dtype)
    if form is None:
        b.tensor(name, dtype, *shape, role=role)
        return
    *lead, width = shape
    b.tensor(f"{name}_codes", codes_of(form), *lead, int(width) * form.bits // 8, role=role)
    b.tensor(f"{name}_scales", scales_of(form), *lead, -(-int(width) // form.group), role=role)
    if form.tensor_scale:
        b.tensor(f"{name}_{FACTORS}", "f32", *lead, role=role)


def begin_sums(b: Builder, weight: Packing, dtype: str, t: Tile, rows: Mapping[str, str], apart: int | None) -> None:
    """Begin a sum for each index vector of weight rows: in the matrix unit, for codes under f32 scales as vectors.

    The rows of a tile are neighbours that begin at a multiple of t.n, or of `apart` more than one (None: they are no
    neighbours). Where they have one scale together, the number of its rows is found here, once.
    """
    for acc, row in rows.items():
        form = find_format(dtype)
        if form is None or form.scale != "f32":
            b.accumulator(acc, t.sums)
            continue
        b.let(acc, f'full({t.m}, {t.n}, 0.0, "f32")', (t.m, t.n), "f32")
        block = _scale_rows(weight)
        if apart is not None and block % t.n == 0 and apart % block == 0:
            b.let(f"{acc}_block", f"min({row}, 0) // {block}")
        elif block > 1:
            b.let(f"{acc}_block", f"{row} // {block}")
        else:
            b.let(f"{acc}_block", row)


def _scale_rows(weight: Packing) -> int:
    return weight.quantized.rows if weight.quantized else 1


def multiply_codes(
    b: Builder, weight: Packing, tensor: str, x: str, form: Format, row: str, depth: int, t: Tile, sums: Mapping[str, str],
    expert: str, middle: Sequence[str],
) -> None:  # fmt: skip
    """Add one step of K to sums that `begin_sums` began; see `multiply`, of which this is the part for codes.

    MoecError for a step that is no group of both, which the search does not try.
    """
    held = weight.quantized
    if held is not None and form.scale == held.scale != "f32":
        _multiply_scaled(b, weight, tensor, x, form, row, depth, t, sums, expert, middle)
        return
    if held is None or held.element != form.element or t.k != form.group or held.group % t.k:
        raise MoecError(f"codes of {form.name} are not multiplied with {weight.format}, {t.k} columns at once")
    k = f"(k + arange({t.k}))[None, :]"
    mask = "live[:, None]" + ("" if depth % t.k == 0 else f" & ({k} < {depth})")
    a = b.operand("a", f"{x}_codes", [f"{row}[:, None]", *middle, k], mask, (t.m, t.k), second=False)
    b.load("a_scale", f"{x}_scales", [row, *middle, f"k // {form.group}"], "live")
    lead = [expert] if expert else []
    for acc, rows in sums.items():
        at = [*lead, f"{rows}[:, None]", k]
        w = b.operand(f"w_{acc}", f"{tensor}_codes", at, "n_live[:, None]", (t.n, t.k), second=True)
        part = b.accumulator(f"{acc}_part", (t.m, t.n))
        b.dot(part, a, w, bits=weight.bits)
        scale, block = f"{acc}_scale", f"{acc}_block"
        each = b.load(scale, f"{tensor}_scales", [*lead, block, f"k // {held.group}"], _live_columns(b, block))
        each = f"{each} * 4.0" if weight.bits == FNUZ else each  # a half for each of the two
        by = f"({each} * a_scale)[:, None]" if b.is_scalar(block) else f"(a_scale[:, None] * ({each})[None, :])"
        b.let(acc, f"{acc} + {b.result(part)} * {by}", (t.m, t.n), "f32")


def _multiply_scaled(
    b: Builder, weight: Packing, tensor: str, x: str, form: Format, row: str, depth: int, t: Tile, sums: Mapping[str, str],
    expert: str, middle: Sequence[str],
) -> None:  # fmt: skip
    """Add one step of K whose codes the matrix unit scales itself."""
    lead = [expert] if expert else []
    a_at, w_at = [f"{row}[:, None]", *middle], {acc: [*lead, f"{rows}[:, None]"] for acc, rows in sums.items()}
    a, a_scale = _load_codes_and_scales(b, "a", x, form, a_at, "live[:, None]", depth, (t.m, t.k), second=False)
    held = format_of(weight.format)
    for acc, at in w_at.items():
        w, scale = _load_codes_and_scales(
            b,
            f"w_{acc}",
            tensor,
            held,
            at,
            "n_live[:, None]",
            round_up(weight.columns, weight.step),
            (t.n, t.k),
            second=True,
        )
        b.scaled_dot(acc, a, w, (a_scale, scale))


def scaled_sums(
    b: Builder, weight: Packing, tensor: str, x: str, dtype: str, row: str, sums: Mapping[str, str], expert: str,
    middle: Sequence[str] = (),
) -> dict[str, str]:  # fmt: skip
    """Return the expressions of finished sums times the scales of x's rows and of the weight's matrix, if they have such."""
    form = find_format(dtype)
    if form is None or not form.tensor_scale:
        return dict(sums)
    b.load("row_factor", f"{x}_{FACTORS}", [row, *middle], "live")
    b.load("matrix_factor", f"{tensor}_tensor_scale", [expert or "0"])
    return {acc: f"({text} * (row_factor * matrix_factor)[:, None])" for acc, text in sums.items()}


def _load_codes_and_scales(
    b: Builder, name: str, tensor: str, form: Format, at: Sequence[str], live: str, depth: int, sizes: tuple[int, int], *,
    second: bool,
) -> tuple[str, str]:  # fmt: skip
    """Add the loads of codes and scales of (rows, columns) from column k on, of a tensor with `depth` columns."""
    rows, columns = sizes
    each, bound = 8 // form.bits, depth if depth % columns else 0
    loaded = []
    for part, step in (("codes", each), ("scales", form.group)):
        place = f"(k // {step} + arange({columns // step}))[None, :]"
        mask = live + (f" & ({place} < {-(-bound // step)})" if bound else "")
        where = [*at, place]
        if part == "codes":
            loaded.append(b.operand(name, f"{tensor}_codes", where, mask, (rows, columns // step), second=second))
        else:
            sizes = (rows, columns // step)
            loaded.append(b.scales(f"{name}_scale", f"{tensor}_scales", where, mask, sizes, second=second))
    codes, scales = loaded
    return codes, scales


def _live_columns(b: Builder, block: str) -> str:
    return "" if b.is_scalar(block) else "n_live"


# --- rounding activations ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantize:
    """acc.quantize of x [T, width] to a format: codes and scales."""

    width: int
    format: str
    dtype: str = "bf16"  # of x
    bits: str = ""  # as in Packing


@contextmanager
def column_loop(b: Builder, width: int, n: int, name: str) -> Iterator[str]:
    """Add a loop over columns, or none where n holds them all; `name` is the index vector, which begins at what is yielded."""
    if n >= width:
        b.let(name, f"arange({n})")
        yield "0"
        return
    with b.loop(f"{name}_first", 0, width, n):
        b.let(name, f"{name}_first + arange({n})")
        yield f"{name}_first"


def quantize_kernel(p: Quantize, t: RowTile, layout: Layout) -> Program:
    """Round t.n columns, whole groups, of t.m rows for each point of the grid; all columns where a row has a scale."""
    form = format_of(p.format)
    b = Builder("quantize", layout, f"y[t] = x[t] in {p.format}: codes, and a scale for each {form.group} of a row")
    b.scalar("T")
    if not form.tensor_scale:
        b.grid("column", f"cdiv({p.width}, {t.n})")
    b.grid("tile", f"cdiv(T, {t.m})")
    b.tensor("x", p.dtype, "T", p.width)
    declare_rows(b, "y", p.format, "T", p.width, role="output")
    b.let("row", f"tile * {t.m} + arange({t.m})")
    b.let("live", "row < T")
    if not form.tensor_scale:
        b.let("c", f"column * {t.n} + arange({t.n})")
        _round_columns(b, p, t, "c", f"column * {t.n}")
        return b.program()
    b.let("most", f'full({t.m}, 0.0, "f32")')
    with column_loop(b, p.width, t.n, "j"):
        _load_columns(b, p, t, "j")
        b.let("most", 'maximum(most, max(abs(cast(x_tile, "f32")), 1))')
    b.let("whole", f"where(most == 0.0, 1.0, most / {form.tensor_scale})")
    b.store(f"y_{FACTORS}", ["row"], "whole", "live")
    with column_loop(b, p.width, t.n, "c") as first:
        _round_columns(b, p, t, "c", first)
    return b.program()


def _load_columns(b: Builder, p: Quantize, t: RowTile, column: str) -> None:
    """Add the load of `x_tile`, the columns that an index vector has of x."""
    b.let("there", f"live[:, None] & ({column} < {p.width})[None, :]", (t.m, t.n), "bool")
    b.load("x_tile", "x", ["row[:, None]", f"{column}[None, :]"], "there", shape=(t.m, t.n))


def _round_columns(b: Builder, p: Quantize, t: RowTile, column: str, first: str) -> None:
    _load_columns(b, p, t, column)
    store_rows(b, "y", p.format, "x_tile", (t.m, t.n), p.width, ("row", column, first), p.bits)


def store_rows(
    b: Builder, name: str, dtype: str, value: str, shape: tuple[int, int], width: int, at: tuple[str, str, str], bits: str = "",
) -> None:  # fmt: skip
    """Store a tile of f32 in a dtype or, whole groups of it, rounded to a format: the counterpart of `declare_rows`.

    What is rounded to a format is what another kernel would be handed, bf16: which one rounds does not change numbers.

    `at` are the index vectors of its rows, of which `live` says which there are, and of its columns, of `width`, and the
    first of these.
    MoecError for a tile that does not hold whole groups, which the search does not try.
    """
    (rows, columns), (row, c, first) = shape, at
    within = "live[:, None]" + ("" if width % columns == 0 else f" & ({c} < {width})[None, :]")
    form = find_format(dtype)
    if form is None:
        b.let(f"{name}_tile", f'cast({value}, "{dtype}")', shape, dtype)
        b.store(name, [f"{row}[:, None]", f"{c}[None, :]"], f"{name}_tile", within)
        return
    groups = columns // form.group
    if columns % form.group:
        raise MoecError(f"{columns} columns are no whole groups of {form.group} of {form.name}")
    apart = (rows, groups, form.group)
    value = value if width % columns == 0 else f"where(({c} < {width})[None, :], {value}, 0.0)"
    b.let("handed", f'cast({value}, "bf16")', shape, "bf16")
    b.let("parted", f'reshape(cast(handed, "f32"), {rows}, {groups}, {form.group})', apart, "f32")
    scale = _add_group_scale(b, form, (rows, groups))
    if form.element == "e2m1":
        _store_pairs(b, name, rows, columns, form.group, width, at)
    else:
        rounded = "parted / where(by == 0.0, 1.0, by)[:, :, None]"
        text = f'bitcast(cast({rounded} * 0.5, "{FNUZ}"), "f8e4m3")' if bits == FNUZ else f'cast({rounded}, "f8e4m3")'
        b.let("coded", text, apart, "f8e4m3")
        b.let("codes", f"reshape(coded, {rows}, {columns})", shape, "f8e4m3")
        b.store(f"{name}_codes", [f"{row}[:, None]", f"{c}[None, :]"], "codes", within)
    b.let("group", f"{first} // {form.group} + arange({groups})")
    within = f"live[:, None] & (group < {-(-width // form.group)})[None, :]"
    b.store(f"{name}_scales", [f"{row}[:, None]", "group[None, :]"], scale, within)


def _add_group_scale(b: Builder, form: Format, shape: tuple[int, int]) -> str:
    """Add `by`, what the groups of `parted` are divided by, and return what is stored of it.

    A format whose scales are in E4M3 takes them under the scale of the row, `whole`.
    """
    if form.tensor_scale:
        b.let("scale", 'cast(max(abs(parted), 2) / (6.0 * whole)[:, None], "f8e4m3")', shape, "f8e4m3")
        b.let("by", 'cast(scale, "f32") * whole[:, None]', shape, "f32")
        return "scale"
    largest = 6.0 if form.element == "e2m1" else LARGEST
    b.let("by", f"max(abs(parted), 2) / {largest}", shape, "f32")
    if form.scale == "f32":
        return "by"
    b.let("exponent", f'(bitcast(by, "i32") + {(1 << 23) - 1}) >> 23', shape, "i32")  # rounded up
    if form.element == "e2m1":  # one below is taken where it errs less, though it cuts the largest numbers
        wide = (*shape, form.group)
        b.let("lower", "maximum(exponent - 1, 0)", shape, "i32")
        for exponent in ("exponent", "lower"):
            b.let("by", f'bitcast({exponent} << 23, "f32")', shape, "f32")
            _nearest_e2m1(b, wide)
            b.let("off", "parted - where(parted < 0.0, 0.0 - near, near) * by[:, :, None]", wide, "f32")
            b.let(f"{exponent}_off", "sum(off * off, 2)", shape, "f32")
        b.let("exponent", "where(lower_off < exponent_off, lower, exponent)", shape, "i32")
    b.let("by", 'bitcast(exponent << 23, "f32")', shape, "f32")
    return 'cast(exponent, "u8")'


def _nearest_e2m1(b: Builder, shape: tuple[int, int, int]) -> None:
    """Add `near`, the E2M1 numbers nearest to those of `parted` over `by`, without signs; ties go to the even code."""
    b.let("size", "abs(parted) / where(by == 0.0, 1.0, by)[:, :, None]", shape, "f32")
    b.let("step", 'where(size < 2.0, 0.5, where(size < 4.0, cast(1.0, "f32"), 2.0))', shape, "f32")
    b.let("near", f"minimum((size / step + {ROUNDS} - {ROUNDS}) * step, 6.0)", shape, "f32")


def _store_pairs(
    b: Builder, name: str, rows: int, columns: int, group: int, width: int, at: tuple[str, str, str]
) -> None:
    """Store `parted` over `by` as E2M1, two neighbours in a byte."""
    apart, paired = (rows, columns // group, group), (rows, columns // 2, 2)
    _nearest_e2m1(b, apart)
    code = 'cast(where(near < 2.0, near * 2.0, where(near < 4.0, near + 2.0, near * 0.5 + 4.0)), "i32")'
    b.let("code", f'{code} + where(parted < 0.0, cast(8, "i32"), 0)', apart, "i32")
    b.let("pairs", f"reshape(code, {rows}, {columns // 2}, 2)", paired, "i32")
    b.let("bytes", "sum(pairs * (1 + 15 * arange(2))[None, None, :], 2)", paired[:2], "i32")
    b.let("j", f"{at[2]} // 2 + arange({columns // 2})")
    there = f"live[:, None] & (j < {width // 2})[None, :]"
    b.store(f"{name}_codes", [f"{at[0]}[:, None]", "j[None, :]"], 'cast(bytes, "u8")', there)
