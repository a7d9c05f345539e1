"""Writes tile programs: statements are added one after the other, and each tile is put where the chip needs it.

Kernels write expressions as text, which is read here, once, into typed nodes; a statement that is wrong is refused
where it is added.

What differs between chips is which memories a tile passes, and that is all in `Layout`: the operands of the
matrix unit come through shared memory on a GPU, through L1 and L0A or L0B on an Ascend, through NRAM and WRAM on a
Cambricon; results leave the matrix unit from registers, tensor memory or L0C. Kernels are written once, without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .expr import Expr
from .scope import Scope
from .tiles import DEVICE, Argument, Buffer, Dot, For, If, Let, Load, Move, Program, Statement, Store


@dataclass(frozen=True)
class Layout:
    """The memories that tiles pass on a chip.

    `first` and `second`: from where a load of that operand of the matrix unit arrives to where the unit reads it.
    `result`: where the unit adds. `vector`: where everything else is computed. `leave`: from the memory after `result`
    to `vector` (empty where they are one, DEVICE in it where the path leads through device memory). `enter`: from after
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
        self._doc = doc
        self._scope = Scope(name)
        self._grid: list[tuple[str, Expr]] = []
        self._scalars: list[str] = []
        self._bodies: list[list[Statement]] = [[]]
        self._stages = 1

    # --- head ---

    def grid(self, name: str, extent: int | str) -> str:
        """Add an axis of the grid and return its variable."""
        self._grid.append((name, self._scope.value(extent)))
        return self._scope.integer(name)

    def scalar(self, *names: str) -> None:
        """Declare ints that the launch gives."""
        self._scalars += map(self._scope.integer, names)

    def tensor(self, name: str, dtype: str, *shape: int | str, role: str = "input") -> str:
        """Declare a tensor."""
        self._scope.tensor(Argument(name, dtype, tuple(map(self._scope.size, shape)), role))
        return name

    def dtype(self, tensor: str) -> str:
        """Return the dtype of a tensor that is declared."""
        return self._scope.arguments[tensor].dtype

    def is_scalar(self, name: str) -> bool:
        """Return whether a name that has a value is one number."""
        return not self._scope.types[name].shape

    # --- body ---

    def let(self, name: str, value: str, shape: Sequence[int] = (), dtype: str = "", memory: str = "") -> str:
        """Compute a value; with a shape it is a tile, in the memory of vectors unless another is named."""
        if shape:
            self._place(name, memory or self.layout.vector, dtype, shape)
        self._add(Let(name, self._scope.value(value)))
        return name

    def load(
        self, name: str, tensor: str, at: Sequence[str], mask: str = "", *, shape: Sequence[int] = (),
        memory: str = "", other: float = 0,
    ) -> str:  # fmt: skip
        """Load a scalar, an index vector, or (with a shape) a tile into the memory of vectors or the one that is named."""
        if shape:
            self._place(name, memory or self.layout.vector, self.dtype(tensor), shape, self._stages)
        self._add(Load(name, tensor, self._values(at), self._scope.mask(mask), other))
        return name

    def operand(
        self, name: str, tensor: str, at: Sequence[str], mask: str, shape: Sequence[int], *, second: bool
    ) -> str:
        """Load a tile as an operand of the matrix unit and return the name that it has there."""
        self.far(name, tensor, at, mask, shape, second=second)
        return self.near(name, second=second)

    def far(self, name: str, tensor: str, at: Sequence[str], mask: str, shape: Sequence[int], *, second: bool) -> str:
        """Load a tile to the first memory of an operand's path, where it may wait until `near` takes it on."""
        return self.load(name, tensor, at, mask, shape=shape, memory=self._path(second)[0])

    def near(self, name: str, *, second: bool) -> str:
        """Take a tile of `far` to where the matrix unit reads it and return the name that it has there."""
        return self._move(name, self._path(second)[1:])

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
        path = self._path(second)
        if self._scope.buffers[name].memory == path[-1]:
            return name
        return self._move(name, (*self.layout.enter, *path))

    def scales(
        self, name: str, tensor: str, at: Sequence[str], mask: str, shape: Sequence[int], *, second: bool
    ) -> str:
        """Load the scales of an operand: along its path where that has two memories, else to the memory of vectors."""
        if len(self._path(second)) == 1:
            return self.load(name, tensor, at, mask, shape=shape)
        return self.operand(name, tensor, at, mask, shape, second=second)

    def accumulator(self, name: str, shape: Sequence[int]) -> str:
        """Begin a sum of the matrix unit: zeros, f32."""
        sizes = ", ".join(map(str, shape))
        return self.let(name, f'full({sizes}, 0.0, "f32")', shape, "f32", self.layout.result)

    def dot(self, acc: str, a: str, b: str, transpose: bool = True, bits: str = "") -> None:
        """Add a bᵀ (or a b) to a sum; with `bits` of the numbers of that dtype that have the operands' bits."""
        self._add(Dot(acc, a, b, transpose, bits=bits))

    def scaled_dot(self, acc: str, a: str, b: str, scales: tuple[str, str]) -> None:
        """Add a bᵀ of codes under scales to a sum; see tiles.Dot."""
        self._add(Dot(acc, a, b, True, scales))

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

    def store(self, tensor: str, at: Sequence[str], value: str, mask: str = "") -> None:
        """Store a tile."""
        self._add(Store(tensor, self._values(at), self._scope.value(value), self._scope.mask(mask)))

    @contextmanager
    def loop(self, var: str, start: int | str, stop: int | str, step: int | str, stages: int = 1) -> Iterator[str]:
        """Add a loop; with `stages` above 1 the tiles loaded in it have so many buffers."""
        bounds = self._scope.value(start), self._scope.value(stop), self._scope.value(step)
        outer, self._stages = self._stages, max(stages, 1)
        self._bodies.append([])
        with self._scope.loop(var, *bounds):
            yield var
        self._stages = outer
        body = tuple(self._bodies.pop())
        self._bodies[-1].append(For(var, *bounds, body, stages))

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Add statements that run if a scalar is not 0."""
        tested = self._scope.value(condition)
        self._bodies.append([])
        with self._scope.when(tested):
            yield
        body = tuple(self._bodies.pop())
        self._bodies[-1].append(If(tested, body))

    def program(self) -> Program:
        """Return the program."""
        (body,) = self._bodies
        scope = self._scope
        return Program(
            scope.program, tuple(self._grid), tuple(scope.arguments.values()), tuple(self._scalars), dict(scope.buffers),
            tuple(body), self._doc,
        )  # fmt: skip

    # --- parts ---

    def _add(self, statement: Let | Load | Store | Move | Dot) -> None:
        self._bodies[-1].append(self._scope.add(statement))

    def _values(self, texts: Sequence[str]) -> tuple[Expr, ...]:
        return tuple(map(self._scope.value, texts))

    def _path(self, second: bool) -> tuple[str, ...]:
        """Return the memories that an operand of the matrix unit passes."""
        return self.layout.second if second else self.layout.first

    def _place(self, name: str, memory: str, dtype: str, shape: Sequence[int], copies: int = 1) -> None:
        buffer = Buffer(memory, dtype, tuple(shape), copies)
        assert self._scope.buffers.get(name, buffer) == buffer, f"{name} has two buffers"
        self._scope.buffers[name] = buffer

    def _move(self, name: str, path: Sequence[str]) -> str:
        source = self._scope.buffers[name]
        for memory in path:
            if memory == source.memory:
                continue
            moved = f"{name}_{memory}"
            # close to the matrix unit two buffers are enough: one is filled while the other is read
            self._place(moved, memory, source.dtype, source.shape, min(self._stages, 2) if memory != DEVICE else 1)
            self._add(Move(moved, name))
            name, source = moved, self._scope.buffers[moved]
        return name
