"""The tiling search: enumerates the tiles of a kernel that a chip can run, and ranks them by their predicted time.

What can run is decided on the program of the tile itself: every memory holds its buffers, shapes fit the matrix unit
and the fractals, registers suffice for the threads. What was left out counts as no alternative; a kernel without any
tile is an error that names what did not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from ....compiler.errors import MoecError
from ....compiler.formats.table import find_format
from ....compiler.ir.dtypes import DTYPES
from ..chip.chip import Profile
from ..kernels.choices import TILE_ROWS, Tile
from ..predict.assumed import has_matmul
from ..predict.predict import Prediction, matrix_share, predict_kernel
from ..tile.builder import Layout
from ..tile.count import SCALED, Counts, count_program, unit_dtype_and_depth
from ..tile.machine import chip_of, layout_of
from ..tile.packing import Packing
from ..tile.simulate import Chip
from ..tile.tiles import Dot, Program, memory_footprint, walk_statements
from ..triton.architectures import nearest_architecture
from ..triton.predict import predict_spills

ROWS, COLUMNS, DEPTHS = TILE_ROWS, (32, 64, 128, 256), (32, 64, 128)
SPARED = 0.8  # share of the registers that tiles may take; the rest is for addresses and what the compiler makes up
SLACK = 0.02
TIE = 1.01  # times the least time, up to which predictions count as equal
GROUPS = (1, 4, 16, 64)  # tiles of rows that may run side by side
LEAST_DEPTH = 16  # columns of 16 bits that Triton multiplies at least: it takes a smaller instruction for them
KEPT = 5  # alternatives that a choice remembers


@dataclass(frozen=True)
class KernelTemplate:
    """A kernel to find a tile for: what makes its program, and what is known of a run at one number of tokens.

    `expect(tile)` holds what the counts cannot see (see count.py); `touched` the share of each weight that is needed.
    `shapes` are the choices of (rows, columns, depth), `groups` those of tiles side by side, `staged` whether loads may
    run ahead, `swaps` whether the weight may be the first operand. `renamed` says which operand
    or result of the op an argument of another name is, `appended` which states an argument appends to: argument -> (the
    operand, the result); see bindings.py.
    """

    name: str
    make: Callable[[Tile, Layout], Program]
    scalars: Mapping[str, int]
    shapes: tuple[tuple[int, int, int], ...]
    expect: Callable[[Tile], Mapping[str, float]] = lambda tile: {}
    touched: Mapping[str, float] | None = None
    groups: tuple[int, ...] = (1,)
    staged: bool = True
    swaps: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    appended: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """A tile with its program and prediction."""

    tile: Tile
    program: Program
    prediction: Prediction
    use: Mapping[str, int]  # bytes of each memory, as `footprint` counts them


@dataclass(frozen=True)
class Found:
    """The result of a search: the best choice and the next ones; `tried` and how many of these could run."""

    best: Choice
    others: tuple[Choice, ...]
    tried: int
    fitting: int


@dataclass(frozen=True)
class Fit:
    """The program of a tile with its bytes in each memory and, for each number of warps, why the chip cannot run it.

    `narrow` says of matmuls that are narrower than the chip reads well; they are taken where nothing else fits.
    """

    program: Program
    use: Mapping[str, int]
    why: tuple[str | None, ...]
    narrow: str | None = None


def search_tile(kernel: KernelTemplate, profile: Profile, fits: dict[Tile, Fit] | None = None) -> Found:
    """Return the tile of the least predicted time. MoecError if no tile fits the chip.

    `fits` holds what earlier searches found out about tiles of this kernel on this chip, for other numbers of tokens,
    which a program does not depend on; what this one finds out is added.
    """
    fits = {} if fits is None else fits
    choices: list[Choice] = []
    reasons: dict[str, int] = {}
    tried = 0
    chips = {rows: chip_of(profile, layout_of(profile, rows)) for rows, _, _ in kernel.shapes}
    # bytes and FLOPs do not depend on how many buffers and threads there are: a shape is counted once
    counted: dict[tuple[int, int, int], Counts] = {}
    buffers = (profile.family.stages, (1,)) if kernel.staged else ((1,),)
    for narrow, stages_of in product((False, True), buffers):
        if choices:
            break
        for shape, stages, swapped in product(kernel.shapes, stages_of, (False, True)):
            tile = Tile(*shape, stages, swapped=swapped)
            if swapped and not _wants_swap(kernel, tile, profile):
                continue
            if tile not in fits:
                fits[tile] = _fit_tile(kernel, tile, profile, chips[shape[0]])
            found, why = _choices_of_tile(kernel, tile, fits[tile], profile, counted, narrow)
            tried += len(found) + len(why)
            choices += found
            for reason in why:
                reasons[reason] = reasons.get(reason, 0) + 1
    if not choices:
        worst = max(reasons, key=lambda reason: reasons[reason])
        raise MoecError(f"no tile of {kernel.name} fits {profile.name}: {worst}")
    choices = _rank_choices(choices)
    best, *others = (_in_order(kernel, choice, profile) for choice in choices[: 1 + KEPT])
    return Found(best, tuple(others), tried, len(choices))


def _rank_choices(choices: list[Choice]) -> list[Choice]:
    """Return choices, the best first: of those that are about as fast as any the one with most bytes under way.

    A prediction counts latencies as if all loads came in time; deeper loops and more buffers hide what it does not see.
    """
    ranks = [_rank_by_time(c.prediction) for c in choices]
    limit = TIE * min(ranks)

    def key(pair: tuple[float, Choice]) -> tuple[float, ...]:
        rank, c = pair
        near = rank <= limit
        return (
            not near,
            c.tile.swapped * near,
            -c.tile.stages * near,
            -c.tile.k * near,
            rank,
            sum(c.use.values()),
            c.tile.m,
            c.tile.n,
        )

    return [c for _, c in sorted(zip(ranks, choices, strict=True), key=key)]


def is_swappable(weight: Packing, given: str) -> bool:
    """Return whether a weight may be the first operand: both are loaded as they are multiplied."""
    return weight.quantized is None and find_format(given) is None


def _wants_swap(kernel: KernelTemplate, tile: Tile, profile: Profile) -> bool:
    """Return whether the weight has the rows that the matrix unit wants and x has not, in the same memories."""
    unit = profile.unit("bf16")
    least = min(unit.m, default=0) if unit else 0
    same = layout_of(profile, tile.m) == layout_of(profile, tile.n)
    return kernel.swaps and same and tile.m < least <= tile.n


def _fit_tile(kernel: KernelTemplate, tile: Tile, profile: Profile, chip: Chip) -> Fit:
    program = kernel.make(tile, layout_of(profile, tile.m))
    use = memory_footprint(program, chip.align)
    why = tuple(why_unfit(program, warps, use, chip, profile) for warps in profile.family.warps)
    dots = [s for s in walk_statements(program.body) if isinstance(s, Dot)]
    return Fit(program, use, why, next((n for dot in dots if (n := _why_narrow(program, dot, profile))), None))


def _choices_of_tile(
    kernel: KernelTemplate,
    tile: Tile,
    fit: Fit,
    profile: Profile,
    counted: dict[tuple[int, int, int], Counts],
    narrow: bool,
) -> tuple[list[Choice], list[str]]:
    """Return the choices of a tile with each number of warps, and why the other numbers cannot be."""
    reasons = [reason for reason in fit.why if reason]
    if fit.narrow and not narrow:
        return [], [reason or fit.narrow for reason in fit.why]
    if all(fit.why):
        return [], reasons
    shape = (tile.m, tile.n, tile.k)
    if shape not in counted:
        counted[shape] = _as_computed(count_program(fit.program, kernel.scalars, kernel.expect(tile)), tile, profile)
    found = []
    for warps, reason in zip(profile.family.warps, fit.why, strict=True):
        if reason is None:
            found.append(_best_order(kernel, replace(tile, warps=warps), fit, profile, counted[shape]))
    return found, reasons


def _best_order(kernel: KernelTemplate, tile: Tile, fit: Fit, profile: Profile, counts: Counts) -> Choice:
    """Return a tile with as many tiles of rows side by side as it takes to wait no longer for device memory.

    The program stays that of the plain order: what it takes and computes is the same in every order.
    """
    best = _predict_choice(kernel, tile, fit.program, fit.use, profile, counts)
    for group in kernel.groups[1:]:
        if best.prediction.memory <= best.prediction.cores or counts.axes[1].extent < 2:
            break
        choice = _predict_choice(kernel, tile, fit.program, fit.use, profile, counts, group)
        if choice.prediction.time < best.prediction.time:
            best = choice
    return best


def _predict_choice(
    kernel: KernelTemplate, tile: Tile, program: Program, use: Mapping[str, int], profile: Profile, counts: Counts,
    group: int = 1,
) -> Choice:  # fmt: skip
    prediction = predict_kernel(
        program, counts, kernel.scalars, profile, warps=tile.warps, stages=tile.stages, use=use,
        touched=kernel.touched or {}, share=matrix_share(profile, *tile.sums), group=group,
    )  # fmt: skip
    return Choice(replace(tile, group=max(group, tile.group)), program, prediction, use)


def _in_order(kernel: KernelTemplate, choice: Choice, profile: Profile) -> Choice:
    """Return a choice with the program of its order, and the prediction for that."""
    tile = choice.tile
    if tile.group == 1:
        return choice
    program = kernel.make(tile, layout_of(profile, tile.m))
    counts = _as_computed(count_program(program, kernel.scalars, kernel.expect(tile)), tile, profile)
    return _predict_choice(kernel, tile, program, choice.use, profile, counts)


def _as_computed(counts: Counts, tile: Tile, profile: Profile) -> Counts:
    """Return counts with codes under scales as bf16, where there are too few rows for the unit that scales them."""
    if profile.toolchain != "triton" or tile.m >= nearest_architecture(profile.arch or "").scaled_rows:
        return counts
    dots: dict[str, float] = {}
    for dtype, flops in counts.dots.items():
        name = "bf16" if dtype in SCALED else dtype
        dots[name] = dots.get(name, 0) + flops
    return replace(counts, dots=dots)


def _rank_by_time(p: Prediction) -> float:
    """Return the time, and a share of what else is busy meanwhile: of nearly equal tiles the one with the most slack."""
    return p.time + SLACK * (p.cores + p.cache + p.matrix + p.vector)


def why_unfit(program: Program, warps: int, use: Mapping[str, int], chip: Chip, profile: Profile) -> str | None:
    """Return why a chip cannot run a program, None if it can."""
    for memory, size in use.items():
        if size > chip.capacity.get(memory, 0):
            return f"{memory} holds {chip.capacity.get(memory, 0)} bytes, {size} are needed"
    if "registers" in use and (most := _register_bytes(profile, warps)) < use["registers"]:
        return f"{warps} warps have {most} bytes of registers for tiles, {use['registers']} are needed"
    if profile.toolchain == "triton" and profile.arch and predict_spills(program, profile.arch, warps):
        return f"{warps} warps have too few registers for its sums: they would spill"
    for statement in walk_statements(program.body):
        if isinstance(statement, Dot) and (reason := _no_matmul(program, statement, profile)):
            return reason
    return None


def _register_bytes(profile: Profile, warps: int) -> int:
    each = profile.rule("registers_per_thread") or 255
    return int(SPARED * 4 * each * warps * profile.threads)


def _no_matmul(program: Program, dot: Dot, profile: Profile) -> str | None:
    """Return why the matrix unit cannot multiply these tiles."""
    a, acc = program.buffers[dot.a], program.buffers[dot.acc]
    dtype, depth = unit_dtype_and_depth(program, dot)
    unit = profile.unit(dtype)
    m, n = acc.shape
    if unit is None:
        return None if has_matmul(profile, dtype) else f"{profile.name} does not multiply {dtype}"
    if depth % (min(unit.k, LEAST_DEPTH) if profile.toolchain == "triton" else unit.k):
        return f"{depth} columns are no multiple of the {unit.k} of an instruction"
    if rows := profile.rule("fractal_rows"):
        width = (profile.rule("fractal_bytes") or 32) * 8 // DTYPES[a.dtype].bits
        if m % rows or n % rows or a.shape[1] % width:
            return f"a matmul of {m} x {n} x {a.shape[1]} is not made of fractals of {rows} x {width}"
    return None


def _why_narrow(program: Program, dot: Dot, profile: Profile) -> str | None:
    """Return what the chip does not read or multiply well of a matmul that is narrow; a compiler takes it all the same."""
    a = program.buffers[dot.a]
    dtype, depth = unit_dtype_and_depth(program, dot)
    unit, span = profile.unit(dtype), profile.rule("tile_k_bytes") or 0
    if unit is None:
        return None
    if a.shape[1] * DTYPES[a.dtype].bits // 8 < span:
        return f"{a.shape[1]} columns are less than one span of {span} bytes in shared memory"
    if depth % unit.k:
        return f"{depth} columns are no multiple of the {unit.k} of an instruction"
    return None


def tile_shapes(
    rows: tuple[int, ...], step: int = 1, given: str = "bf16", gathered: int = 0
) -> tuple[tuple[int, int, int], ...]:
    """Return tile shapes of a matmul whose weight is read in multiples of `step` columns, codes 128 at once.

    Rows `given` in 4 bits are read twice as deep too: these are as many bytes. `gathered`: bytes of a row in bf16 that a
    chip gathers fastest, for which tiles may be deeper.
    """
    form = find_format(given)
    depths = [k for k in DEPTHS if k % step == 0] or [128]
    if form is None and gathered > 2 * depths[-1] and gathered // 2 % step == 0:
        depths.append(gathered // 2)
    return tuple(product(rows, COLUMNS, (*depths, 2 * depths[-1]) if form and form.bits == 4 else depths))


def row_choices(rows: float) -> tuple[int, ...]:
    """Return the rows of tiles that make sense for about so many rows: none of which half would be empty, and one more."""
    return tuple(m for m in ROWS if m < 4 * rows) or ROWS[:1]
