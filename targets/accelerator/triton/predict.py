"""Predicts what Triton makes of a program: which matrix unit its matmuls use, shared memory, registers that spill.

The rules were read off kernels that Triton 3.9 compiled. Where the unit reads both operands from shared memory by itself
(wgmma, tcgen05, and gfx950's loads past the registers) Triton keeps all `stages` buffers of a loaded operand, elsewhere
one less: the last is in registers. Other tiles that are loaded ahead have stages - 1. An operand that is computed has
one buffer where the unit reads it from shared memory, and none elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from ....compiler.ir.dtypes import DTYPES
from ..tile.expr import Call, Expr, shape_of
from ..tile.machine import TALL_ROWS
from ..tile.tiles import Buffer, Dot, For, If, Let, Load, Move, Program, Statement, Store, walk_statements
from ..tile.types import EIGHT
from .architectures import nearest_architecture
from .layouts import COLUMNS, conversion_bytes, row_bytes, store_bytes, warps_along, widest_piece

ASYNC = ("wgmma", "tcgen05")  # units that read the second operand from shared memory
BEHIND = 4  # bytes of a row that a copy past the registers takes at least
PIECE = 4  # rows of a second operand that mma.sync passes for each warp where no loop holds the matmul
ROW = 16  # bytes of a row of a tile of narrow numbers from which their alignment is known to be enough
SPILL_FREE = {"wgmma": 128, "tcgen05": 192, "mma": 96, "mfma": 160, "wmma": 56, "fma": 64}  # 32-bit sums a thread
SIDES = (16, 32)  # of AMD's matmuls: the smaller one where there are no more rows
SCALES = 8  # bytes of a column's scales that AMD's waves pass on
COMPUTED = 32  # fewer of them where operands are computed: these pass through registers
GROUPED = 16  # sums a thread at most where mma's operands are computed in groups, which changes who holds what


def matrix_unit(arch: str, m: int, n: int, dtype: str, warps: int) -> str:
    """Return what a matmul with sums of [m, n] is computed with: wgmma, tcgen05, mma, mfma, wmma, or fma (no matrix unit)."""
    row = nearest_architecture(arch)
    if (dtype == "f32" and not row.exact) or min(m, n) < row.least:
        return "fma"
    tall = row.tall and m >= TALL_ROWS and n >= row.tall_columns and warps % 4 == 0
    return row.tall if tall else row.unit


def predict_units(program: Program, arch: str, warps: int) -> set[str]:
    """Return the units that a program's matmuls are expected to use."""
    found = set()
    for dot in _dots_in(program.body):
        m, n = program.buffers[dot.acc].shape
        found.add(matrix_unit(arch, m, n, program.buffers[dot.a].dtype, warps))
    return found


def predict_shared(program: Program, arch: str, warps: int) -> int:
    """Return the bytes of shared memory (LDS) that Triton is expected to take for a block."""
    origin = _origins_of_moves(program.body)
    looped = {id(dot) for loop in _pipelined_loops(program) for dot in _dots_in(loop.body)}
    once = [
        _shared_without_loop(program, dot, origin, arch, warps)
        for dot in _dots_in(program.body)
        if id(dot) not in looped
    ]
    loops = [_Loop(program, loop, origin, arch, warps).bytes() for loop in _pipelined_loops(program)]
    conversions = [*_stored_conversions(program, arch, warps), *_conversions_without_dots(program, arch, warps)]
    return max([*once, *loops, *conversions], default=0)


def _stored_conversions(program: Program, arch: str, warps: int) -> Iterator[int]:
    """Yield the bytes through which the layout of each stored result of a matmul is converted."""
    results = {program.buffers[dot.acc].shape: program.buffers[dot.a].dtype for dot in _dots_in(program.body)}
    for store in walk_statements(program.body):
        if isinstance(store, Store) and store.stored in program.buffers:
            shape = program.buffers[store.stored].shape
            if shape in results:
                m, n = shape
                bits = DTYPES[program.argument(store.tensor).dtype].bits
                yield conversion_bytes(m, n, bits, matrix_unit(arch, m, n, results[shape], warps), arch, warps)


def _conversions_without_dots(program: Program, arch: str, warps: int) -> Iterator[int]:
    """Yield the bytes through which layouts are converted where no matmul sets them: of stored tiles, and of rows.

    A norm that stores codes beside bf16 holds pieces of 16 columns; bf16 is stored, and its weight read, in narrower ones.
    """
    if any(_dots_in(program.body)):
        return
    threads = warps * nearest_architecture(arch).warp
    statements = list(walk_statements(program.body))
    read = {s.name: (shape_of(*s.at, s.mask), _tensor_bits(program, s)) for s in statements if isinstance(s, Load)}
    stored = [(shape_of(*s.at, s.mask), _tensor_bits(program, s)) for s in statements if isinstance(s, Store)]
    pieces: dict[tuple[int, ...], int] = {}
    for shape, bits in (*read.values(), *stored):
        if len(shape) == 2:
            m, n = shape
            pieces[shape] = max(pieces.get(shape, 1), widest_piece(m, n, bits, threads))
    for shape, bits in stored:
        if shape in pieces:
            m, n = shape
            yield store_bytes(m, n, bits, pieces[shape], threads)
    for s in statements:
        shape = program.buffers[s.name].shape if isinstance(s, Let) and s.name in program.buffers else ()
        if isinstance(s, Let) and shape in pieces:
            m, n = shape
            rows = (read[name][1] for name in s.value.names if name in read and read[name][0] == shape[1:])
            yield from [row_bytes(m, n, bits, pieces[shape], threads, arch) for bits in rows]


def _tensor_bits(program: Program, statement: Load | Store) -> int:
    return max(8, DTYPES[program.argument(statement.tensor).dtype].bits)


def _shared_without_loop(program: Program, dot: Dot, origin: Mapping[str, str], arch: str, warps: int) -> int:
    """Return the bytes of a matmul that no loop holds: its operands' while it runs, AMD's one after the other.

    mma.sync passes the second operand piece by piece, about four rows for each warp.
    """
    a, b = (_buffer_bytes(program.buffers[origin.get(name, name)]) for name in (dot.a, dot.b))
    if nearest_architecture(arch).backend == "hip":
        return max(a, b)
    m, n = program.buffers[dot.acc].shape
    first = program.buffers[dot.a]
    if matrix_unit(arch, m, n, first.dtype, warps) in ASYNC:
        return a + b
    return a + min(b, warps * PIECE * first.shape[1] * DTYPES[first.dtype].bits // 8)


def predict_spills(program: Program, arch: str, warps: int) -> bool:
    """Return whether the sums of the matmuls may be too many for a thread's registers, with what else it holds.

    It errs to the safe side: some that are predicted to spill do not.
    """
    threads = warps * nearest_architecture(arch).warp
    held = _sums(program) / threads
    origin = _origins_of_moves(program.body)
    second = {origin.get(dot.b, dot.b) for dot in _dots_in(program.body)}
    made = [s.value for s in walk_statements(program.body) if isinstance(s, Let) and s.name in second]
    for unit in predict_units(program, arch, warps):
        limit = SPILL_FREE[unit] // (2 if unit == "mfma" and warps > 4 else 1)  # two waves share a unit's registers
        if made:
            limit = GROUPED if unit == "mma" and any(map(_in_groups, made)) else limit - COMPUTED
        if held > limit:
            return True
    return False


def _sums(program: Program) -> int:
    """Return how many numbers the sums of matmuls are that are held at once.

    A sum of codes is added to a total in each step: the totals are held together, of the sums one after the other.
    """
    sizes = {dot.acc: prod(program.buffers[dot.acc].shape) for dot in _dots_in(program.body)}
    coded = {dot.acc for dot in _dots_in(program.body) if program.buffers[dot.a].dtype in EIGHT and not dot.scales}
    if not coded:
        return sum(sizes.values())
    lets = [s for s in walk_statements(program.body) if isinstance(s, Let) and s.name in s.value.names]
    totals = {s.name: prod(program.buffers[s.name].shape) for s in lets if s.name in program.buffers}
    return sum(totals.values()) + max(sizes.values())


def _own_columns(shape: tuple[int, ...], warps: int) -> bool:
    """Return whether each of AMD's waves has columns of its own of a matmul, and all rows of them.

    Waves are added along the side on which more instructions are left for each, along columns where both are equal.
    """
    m, n = shape
    side = SIDES[m > SIDES[0]]
    rows = columns = 1
    while rows * columns < warps:
        if m // side // rows > n // side // columns:
            rows *= 2
        else:
            columns *= 2
    return rows == 1 and columns * side <= n


def _dots_in(body: Sequence[Statement]) -> Iterator[Dot]:
    return (s for s in walk_statements(body) if isinstance(s, Dot))


def _pipelined_loops(program: Program) -> Iterator[For]:
    """Yield the loops that hold loads or matmuls and no further loops: those whose loads run ahead."""
    for statement in walk_statements(program.body):
        if isinstance(statement, For) and not any(isinstance(s, For) for s in walk_statements(statement.body)):
            yield statement


def _origins_of_moves(body: Sequence[Statement]) -> Mapping[str, str]:
    """Return for each name that a move makes the name that it began as."""
    found: dict[str, str] = {}
    for statement in walk_statements(body):
        if isinstance(statement, Move):
            found[statement.name] = found.get(statement.value, statement.value)
    return found


@dataclass
class _Loop:
    program: Program
    loop: For
    origin: Mapping[str, str]
    arch: str
    warps: int
    loaded: dict[str, Buffer] = field(default_factory=dict)
    outer: set[str] = field(default_factory=set)  # loaded somewhere else

    def __post_init__(self) -> None:
        row = nearest_architecture(self.arch)
        self.waves, self.past_registers = row.backend == "hip", row.past_registers

    def bytes(self) -> int:
        statements = list(_flat_statements(self.loop.body))
        for s in statements:
            if isinstance(s, Load) and s.name in self.program.buffers:
                self.loaded[s.name] = self.program.buffers[s.name]
        self.outer = {s.name for s in walk_statements(self.program.body) if isinstance(s, Load)} - set(self.loaded)
        dots = [s for s in statements if isinstance(s, Dot)]
        first = {self.origin.get(d.a, d.a): self._unit(d) for d in dots}
        second = {self.origin.get(d.b, d.b): self._unit(d) for d in dots}
        operands = first | second
        copies = max(self.loop.stages, 1)
        chained = self._chained(statements) if self.past_registers else set()
        total, grouped = 0, self._grouped(statements, dots)
        both = self._both_orders(dots) if copies > 1 else set()
        for name, buffer in self.loaded.items():
            size = _buffer_bytes(buffer)
            if name in both:
                continue
            if name in operands:
                stages = max(2, copies - 1) if name in chained and copies > 1 else copies
                total += size * self._copies(name, operands[name], name in second, stages)
            elif dots and _is_copied_ahead(buffer) and grouped is None and not self._widened(dots):
                total += size * (copies if self.past_registers and copies > 1 else copies - 1)
        if copies == 1:
            return self._unstaged(dots) + self._kept(dots)
        total += max((_buffer_bytes(self.loaded[name]) for name in both), default=0)
        total += self._computed(statements, second) + (grouped or 0) + self._kept(dots)
        return max([total, *self._entering(first)])

    def _unit(self, dot: Dot) -> str:
        m, n = self.program.buffers[dot.acc].shape
        return matrix_unit(self.arch, m, n, self.program.buffers[dot.a].dtype, self.warps)

    def _widened(self, dots: Sequence[Dot]) -> bool:
        """Return whether these are matmuls of f32 on AMD: what is widened to f32 is converted there, not what it was."""
        return self.waves and any(self.program.buffers[d.a].dtype == "f32" for d in dots)

    def _copies(self, name: str, unit: str, second: bool, stages: int) -> int:
        if unit in ASYNC:
            return stages
        if self.past_registers and stages > 1:
            own = second and all(
                _own_columns(self.program.buffers[d.acc].shape, self.warps) and d.transpose
                for d in _dots_in(self.loop.body)
            )
            return 0 if own else stages  # each wave loads its columns past the shared memory
        return stages - 1

    def _grouped(self, statements: Sequence[Statement], dots: Sequence[Dot]) -> int | None:
        """Return the bytes through which AMD's waves pass operands that are computed in groups, whose codes they load late.

        gfx950's waves that have columns of their own pass the scales alone, and none of a group of columns that they
        share. None where no operand is computed so.
        """
        made = {s.name for s in statements if isinstance(s, Let) and _in_groups(s.value)}
        shapes = {}  # of the operands: those of their matmuls
        for dot in dots:
            name = self.origin.get(dot.b, dot.b)
            if name in made:
                shapes[name] = self.program.buffers[dot.acc].shape
        if not shapes or not self.waves:
            return None
        m, n = next(iter(shapes.values()))
        if self.past_registers and m <= SIDES[0] and _own_columns((m, n), self.warps):
            return 0 if n == SIDES[0] * self.warps else n * SCALES
        return max(_buffer_bytes(self.program.buffers[name]) for name in shapes)

    def _chained(self, statements: Sequence[Statement]) -> set[str]:
        """Return the tiles that are loaded by what the same iteration loads, in their places or masks: a stage later."""
        known: set[str] = set()  # loaded in this iteration, or computed from it
        found = set()
        for s in statements:
            late = bool(known & _names_read(s))
            if isinstance(s, Load) and late:
                found.add(s.name)
            if isinstance(s, Load) or (isinstance(s, (Let, Move)) and late):
                known.add(s.name)
        return found

    def _entering(self, first: Iterable[str]) -> Iterator[int]:
        """Yield the bytes through which AMD's waves take first operands that were loaded before the loop, one by one."""
        if self.waves:
            yield from (_buffer_bytes(self.program.buffers[name]) for name in first if name in self.outer)

    def _both_orders(self, dots: Sequence[Dot]) -> set[str]:
        """Return the loaded tiles that are multiplied as they are and transposed: gfx950 keeps them in registers."""
        if not self.past_registers:
            return set()
        orders = [
            {self.origin.get(d.b, d.b) for d in dots if d.transpose is transposed} for transposed in (True, False)
        ]
        return orders[0] & orders[1] & set(self.loaded)

    def _kept(self, dots: Sequence[Dot]) -> int:
        """Return the bytes of first operands that no iteration loads: those from before the loop, and what an iteration computes.

        wgmma and tcgen05 take the latter from registers or tensor memory, AMD's waves the former.
        """
        sizes = {}
        for dot in dots:
            name = self.origin.get(dot.a, dot.a)
            unit, rows = self._unit(dot), self.program.buffers[dot.acc].shape[0]
            converted = unit in ("mma", "fma") or (unit == "mfma" and (rows > 16 or self._widened([dot])))
            if name not in self.loaded and (unit != "mfma" if name in self.outer else converted):
                sizes[name] = _buffer_bytes(self.program.buffers[name])
        return sum(sizes.values())

    def _unstaged(self, dots: Sequence[Dot]) -> int:
        """Return the bytes through which operands pass where nothing is loaded ahead."""
        held: dict[str, int] = {}
        made, passed = 0, 0
        for dot in dots:
            a, b = self.origin.get(dot.a, dot.a), self.origin.get(dot.b, dot.b)
            size = {name: _buffer_bytes(self.program.buffers[name]) for name in (a, b)}
            if self._unit(dot) in ASYNC:
                held |= {name: size[name] for name in (a, b) if name in self.loaded}
                made = max(made, 0 if b in self.loaded else size[b])
            elif self.waves:
                passed = max(passed, size[a], size[b] if b in self.loaded else 0)
            elif self._unit(dot) == "fma":
                passed = max(passed, size[a] + size[b])
            else:
                m, n = self.program.buffers[dot.acc].shape
                _, along = warps_along(m, n, "mma", self.warps)
                piece = along * COLUMNS * size[b] // n  # the columns of one instruction of each warp
                passed = max(passed, size[a], min(size[b], piece))
        return sum(held.values()) + made + passed

    def _computed(self, statements: Sequence[Statement], second: Mapping[str, str]) -> int:
        """Return the most bytes of second operands that are computed, from where they are to their last matmul."""
        last = {self.origin.get(s.b, s.b): i for i, s in enumerate(statements) if isinstance(s, Dot)}
        used, most, whole = 0, 0, 0
        for i, s in enumerate(statements):
            if isinstance(s, Let) and s.name in last and s.name not in self.loaded and second[s.name] in ASYNC:
                used += _buffer_bytes(self.program.buffers[s.name])
                whole += _buffer_bytes(self.program.buffers[s.name])
            most = max(most, used)
            if isinstance(s, Dot) and last[name := self.origin.get(s.b, s.b)] == i and second[name] in ASYNC:
                used -= (
                    0
                    if name in self.loaded or name not in self.program.buffers
                    else _buffer_bytes(self.program.buffers[name])
                )
        return whole if "tcgen05" in second.values() else most  # tcgen05's are all in use until the iteration ends


def _flat_statements(body: Sequence[Statement]) -> Iterator[Statement]:
    for statement in walk_statements(body):
        if not isinstance(statement, (For, If)):
            yield statement


def _names_read(statement: Statement) -> frozenset[str]:
    """Return the names that the value of a statement, or the place that it loads, depends on."""
    match statement:
        case Load(_, _, at, mask):
            return frozenset[str]().union(*(index.names for index in at), mask.names if mask else ())
        case Let(_, value):
            return value.names
        case Move(_, name):
            return frozenset((name,))
    return frozenset()


def _in_groups(expr: Expr) -> bool:
    """Return whether a tile is computed in groups of columns, which are an axis of their own meanwhile."""
    return (isinstance(expr, Call) and expr.function == "reshape") or any(map(_in_groups, expr.operands))


def _buffer_bytes(buffer: Buffer) -> int:
    return prod(buffer.shape) * DTYPES[buffer.dtype].bits // 8


def _is_copied_ahead(buffer: Buffer) -> bool:
    """Return whether a tile can be copied past the registers: rows of enough bytes in a place that is known to be aligned."""
    row = buffer.shape[-1] * DTYPES[buffer.dtype].bits // 8
    return row >= (BEHIND if DTYPES[buffer.dtype].bits >= 32 else ROW)
