"""A tensor that torch code makes empty and then fills piece by piece; in the IR it is the pieces' concatenation."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import MoecError
from ...ir.dims import Size
from ...ir.module import Value
from ...ir.types import TensorType
from ...ops.builder import IRBuilder


@dataclass
class Uninitialised:
    """The tensor: its type, and the pieces that were written, all along one axis."""

    type: TensorType
    pieces: list[tuple[int, Size, Size, Value]] = field(default_factory=list)  # axis, start, stop, value
    made: Value | None = None

    def piece(self, axis: int, start: Size, stop: Size) -> Piece:
        """Return a part that can be filled."""
        shape = (*self.type.shape[:axis], stop - start, *self.type.shape[axis + 1 :])
        return Piece(self, axis, start, stop, TensorType(self.type.dtype, shape))

    def complete(self, builder: IRBuilder) -> Value:
        """Return the whole; MoecError unless the pieces cover it exactly."""
        if self.made is None:
            pieces = sorted(self.pieces, key=lambda p: int(p[1]))
            axes = {p[0] for p in pieces}
            ends = [0, *(p[2] for p in pieces)]
            if (
                len(axes) != 1
                or any(p[1] != e for p, e in zip(pieces, ends, strict=False))
                or ends[-1] != self.type.shape[pieces[0][0]]
            ):
                raise MoecError("a tensor made empty is read before all of it is written")
            self.made = builder.add("core.concat", *(p[3] for p in pieces), axis=axes.pop())
        return self.made


@dataclass
class Piece:
    """A part of an uninitialised tensor."""

    whole: Uninitialised
    axis: int
    start: Size
    stop: Size
    type: TensorType

    def fill(self, value: Value) -> None:
        """Write the part."""
        if self.whole.made is not None:
            raise MoecError("a tensor is written after it was read")
        if self.start != self.stop:
            self.whole.pieces.append((self.axis, self.start, self.stop, value))
