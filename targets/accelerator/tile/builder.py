"""Writes tile programs: statements are added one after the other, and each tile goes where the chip wants it.

What differs between chips is which memories a tile passes on its way, and that is all in `Layout`: the operands of the
matrix unit come through shared memory on a GPU, through L1 and L0A or L0B on an Ascend, through NRAM and WRAM on a
Cambricon; results leave the matrix unit from registers, tensor memory or L0C. Kernels are written once, without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .tiles import DEVICE, Argument, Buffer, Dot, For, If, Let, Load, Move, Program, Statement, Store


@dataclass(frozen=True)
class Layout:
    """The memories that tiles pass on a chip.

    `first` and `second`: from where a load of that operand of the matrix unit arrives to where the unit reads it.
    `result`: where the unit adds. `vector`: where everything else is computed. `leave`: from the memory behind `result`
    to `vector` (empty where they are one, DEVICE in it where the way leads through device memory). `enter`: from behind
    `vector` to the first memory of the operands, for tiles that are computed before they are multiplied.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    result: str
    vector: str
    leave: tuple[str, ...] = ()
    enter: tuple[str, ...] = ()

    @property
    def operands(self) -> tuple[str, str, str]:
        """The memories of the matrix unit's first and second operand and of its sums."""
        return self.first[-1], self.second[-1], self.result


class Builder:
    """Collects the parts of one program."""

    def __init__(self, name: str, layout: Layout, doc: str = "") -> None:
        """Begin a program."""
        self.layout = layout
        self._name, self._doc = name, doc
        self._grid: list[tuple[str, str]] = []
        self._arguments: list[Argument] = []
        self._scalars: list[str] = []
        self._buffers: dict[str, Buffer] = {}
        self._bodies: list[list[Statement]] = [[]]
        self._stages = 1

    # --- head ---

    def grid(self, name: str, extent: int | str) -> str:
        """Add an axis of the grid and return its variable."""
        self._grid.append((name, str(extent)))
        return name

    def scalar(self, *names: str) -> None:
        """Declare ints that the launch gives."""
        self._scalars += names

    def tensor(self, name: str, dtype: str, *shape: int | str, role: str = "input") -> str:
        """Declare a tensor."""
        self._arguments.append(Argument(name, dtype, shape, role))
        return name

    def dtype(self, tensor: str) -> str:
        """Return the dtype of a tensor that is declared."""
        return next(a.dtype for a in self._arguments if a.name == tensor)

    # --- body ---

    def let(self, name: str, value: str, shape: Sequence[int] = (), dtype: str = "", memory: str = "") -> str:
        """Compute a value; with a shape it is a tile, in the memory of vectors unless another is named."""
        if shape:
            self._place(name, memory or self.layout.vector, dtype, shape)
        self._add(Let(name, value))
        return name

    def load(
        self, name: str, tensor: str, at: Sequence[str], mask: str = "", *, shape: Sequence[int] = (),
        memory: str = "", other: float = 0,
    ) -> str:  # fmt: skip
        """Load a scalar, an index vector, or (with a shape) a tile into the memory of vectors or the one that is named."""
        if shape:
            self._place(name, memory or self.layout.vector, self.dtype(tensor), shape, self._stages)
        self._add(Load(name, tensor, tuple(at), mask, other))
        return name

    def operand(
        self, name: str, tensor: str, at: Sequence[str], mask: str, shape: Sequence[int], *, second: bool
    ) -> str:
        """Load a tile as an operand of the matrix unit and return the name that it has there."""
        way = self.layout.second if second else self.layout.first
        self.load(name, tensor, at, mask, shape=shape, memory=way[0])
        return self._move(name, way[1:])

    def far(self, name: str, tensor: str, at: Sequence[str], mask: str, shape: Sequence[int], *, second: bool) -> str:
        """Load a tile to the first memory on an operand's way, where it may wait until `near` takes it on."""
        way = self.layout.second if second else self.layout.first
        return self.load(name, tensor, at, mask, shape=shape, memory=way[0])

    def near(self, name: str, *, second: bool) -> str:
        """Take a tile of `far` to where the matrix unit reads it and return the name that it has there."""
        return self._move(name, (self.layout.second if second else self.layout.first)[1:])

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Give back at the end what the matrix unit's own memories took, on chips where operands pass two memories."""
        if max(len(self.layout.first), len(self.layout.second)) == 1:
            yield
        else:
            with self.when("1"):
                yield

    def as_operand(self, name: str, *, second: bool) -> str:
        """Take a computed tile to where the matrix unit reads it and return the name that it has there."""
        way = self.layout.second if second else self.layout.first
        if self._buffers[name].memory == way[-1]:
            return name
        return self._move(name, (*self.layout.enter, *way))

    def accumulator(self, name: str, shape: Sequence[int]) -> str:
        """Begin a sum of the matrix unit: zeros, f32."""
        sizes = ", ".join(map(str, shape))
        return self.let(name, f'full({sizes}, 0.0, "f32")', shape, "f32", self.layout.result)

    def dot(self, acc: str, a: str, b: str, transpose: bool = True) -> None:
        """Add a bᵀ (or a b) to a sum."""
        self._add(Dot(acc, a, b, transpose))

    def result(self, acc: str) -> str:
        """Return the name of a finished sum where vectors are computed."""
        return self._move(acc, self.layout.leave)

    def rescale_dot(self, total: str, by: str, a: str, b: str, shape: Sequence[int]) -> None:
        """Set total = total by + a b, where `total` [M, N] f32 lies in the memory of vectors.

        Where the matrix unit adds there too it adds to the total itself, elsewhere it begins a sum of its own.
        """
        if self.layout.result == self.layout.vector:
            self.let(total, f"{total} * {by}", shape, "f32")
            self.dot(total, a, b, transpose=False)
            return
        product = self.accumulator(f"{total}_new", shape)
        self.dot(product, a, b, transpose=False)
        self.let(total, f"{total} * {by} + {self.result(product)}", shape, "f32")

    def store(self, tensor: str, at: Sequence[str], value: str, mask: str = "", add: bool = False) -> None:
        """Store a tile, or add it."""
        self._add(Store(tensor, tuple(at), value, mask, add))

    @contextmanager
    def loop(self, var: str, start: int | str, stop: int | str, step: int | str, stages: int = 1) -> Iterator[str]:
        """Add a loop; with `stages` above 1 the tiles loaded in it have so many buffers."""
        outer, self._stages = self._stages, max(stages, 1)
        self._bodies.append([])
        yield var
        body = tuple(self._bodies.pop())
        self._stages = outer
        self._add(For(var, str(start), str(stop), str(step), body, stages))

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Add statements that run if a scalar is not 0."""
        self._bodies.append([])
        yield
        body = tuple(self._bodies.pop())
        self._add(If(condition, body))

    def program(self) -> Program:
        """Return the program."""
        (body,) = self._bodies
        return Program(
            self._name, tuple(self._grid), tuple(self._arguments), tuple(self._scalars), dict(self._buffers),
            tuple(body), self._doc,
        )  # fmt: skip

    # --- parts ---

    def _add(self, statement: Statement) -> None:
        self._bodies[-1].append(statement)

    def _place(self, name: str, memory: str, dtype: str, shape: Sequence[int], copies: int = 1) -> None:
        buffer = Buffer(memory, dtype, tuple(shape), copies)
        assert self._buffers.get(name, buffer) == buffer, f"{name} has two buffers"
        self._buffers[name] = buffer

    def _move(self, name: str, way: Sequence[str]) -> str:
        source = self._buffers[name]
        for memory in way:
            if memory == source.memory:
                continue
            moved = f"{name}_{memory}"
            # close to the matrix unit two buffers are enough: one is filled while the other is read
            self._place(moved, memory, source.dtype, source.shape, min(self._stages, 2) if memory != DEVICE else 1)
            self._add(Move(moved, name))
            name, source = moved, self._buffers[moved]
        return name
