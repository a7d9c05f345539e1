"""What a stored format is: one object that everything else asks, from the bits of a code to its encoder.

A format says how many bits a code has, how many codes along the last axis share a scale, and what a code means.
Only weights have such a dtype; an op that reads one computes with the numbers that the codes stand for, in f32.
`table.py` has the formats that there are. A codec, one file each beside this one, computes with torch and is imported
when it is asked for: a program is read and checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

# What a target stores: `codes` u8[..., N, K bits / 8], packed along K, the first code in the lowest bits, integers with
# half of their range added (so that 0 is stored as 8 for 4 bits); `scales` [..., N / rows, K / group] in the format's
# dtype; `zeros` u8[..., N, ceil(K / group bits / 8)], packed as the codes; `tensor_scale` f32[...], one a matrix.
Parts = Mapping[str, "torch.Tensor"]
PART_NAMES = ("codes", "scales", "zeros")  # those that are made row by row, in the order in which they are stored
Cells = Iterator[tuple["torch.Tensor", "torch.Tensor"]]
SCALE_BITS = {"f32": 32, "f16": 16, "bf16": 16, "f8e8m0": 8, "f8e4m3": 8}


class Codec(Protocol):
    """Turns numbers into the parts of a format and back. Everything works on rows: `[..., K]`, groups along K."""

    def encode(self, x: torch.Tensor, format: Format, tensor_scale: float | None) -> Parts:
        """Return the parts of f32[..., K]."""
        ...

    def decode(self, parts: Parts, format: Format, width: int) -> torch.Tensor:
        """Return the numbers f32[..., K] that parts stand for; `width` is K."""
        ...

    def cells(self, x: torch.Tensor, format: Format) -> Cells:
        """Yield, for each width of the grid that `encode` tries, the cells that numbers in groups fall in.

        A cell is as wide as the step between the two codes around a number; beside it stands how far the number lies
        beyond the last code.
        """
        ...


@runtime_checkable
class GroupCodec(Codec, Protocol):
    """A codec that can choose the codes of a group column by column, as gptq does."""

    def search_group(self, x: torch.Tensor, format: Format, importance: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what a group f32[N, G] is rounded with, f32[N] each; errors of a column count by its importance."""
        ...

    def round_column(
        self, column: torch.Tensor, settings: tuple[torch.Tensor, ...], format: Format
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes of f32[N] with what `search_group` found, and the numbers that they stand for."""
        ...

    def stored_parts(self, codes: torch.Tensor, settings: tuple[torch.Tensor, ...], format: Format) -> Parts:
        """Return the parts of codes u8[..., K] and what their groups were rounded with, [..., K / group]."""
        ...


@dataclass(frozen=True)
class Format:
    """A format; `group` codes along the last axis share a scale, for `rows` rows."""

    name: str
    bits: int
    group: int
    codec: Callable[[], Codec] = field(repr=False, compare=False)
    element: str = "int"  # what a code is: int, a key of table.ELEMENTS, or e4m3
    values: tuple[float, ...] = field(
        default=(), repr=False
    )  # the numbers that codes stand for, where a table has them
    zeros: bool = False  # a zero point for each scale
    rows: int = 1
    scale: str = "f32"
    tensor_scale: float = 0.0  # one more f32 scale for a whole matrix, its largest number over this one; 0: none

    @property
    def bits_per_weight(self) -> Fraction:
        """Bits of one weight as stored, with its share of scales and zero points."""
        scale = Fraction(SCALE_BITS[self.scale], self.group * self.rows)
        return self.bits + scale + Fraction(self.bits * self.zeros, self.group)

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts of PART_NAMES that a weight has."""
        return PART_NAMES if self.zeros else PART_NAMES[:2]

    def part(self, name: str, rows: int, width: int) -> tuple[str, tuple[int, int]]:
        """Return the dtype and the shape of a part of a weight [rows, width]."""
        groups = -(-width // self.group)
        match name:
            case "codes":
                return "u8", (rows, -(-width * self.bits // 8))
            case "zeros":
                return "u8", (rows, -(-groups * self.bits // 8))
        return "u8" if self.scale == "f8e8m0" else self.scale, (-(-rows // self.rows), groups)

    def encode(self, x: torch.Tensor, tensor_scale: float | None = None) -> Parts:
        """Return the parts of f32[..., K]; K is a multiple of the group. ValueError for numbers that are not finite.

        `tensor_scale` is the scale of the matrix, computed from `x` if it is not given. Formats whose scales belong to
        several rows want whole blocks of rows.
        """
        parts = self.codec().encode(x, self, tensor_scale)
        if not parts["scales"].float().isfinite().all():
            raise ValueError("some numbers are infinite, not numbers, or too large")
        return parts

    def decode(self, parts: Parts, width: int) -> torch.Tensor:
        """Return the numbers f32[..., K] that parts stand for; `width` is K."""
        return self.codec().decode(parts, self, width)
