"""How a weight lies in device memory, number by number, and how a kernel turns a tile of it into numbers.

A packing is what kernels.json states of a weight, what the packer writes and what the kernels read. Codes of 4 bits lie
two in a byte by halves: in each block of 128 columns, byte j holds column j in its low bits and column 64 + j in its
high ones, so that a tile splits into two operands without moving a number. Codes that the matrix unit reads as such lie
in pairs of neighbours, the first in the low bits. On an Ascend plain numbers lie in fractals
of 16 rows by 32 bytes (FRACTAL_NZ), which its loads want.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ....compiler.errors import MoecError
from ....compiler.formats.format import Format
from ....compiler.formats.table import find_format
from ....compiler.ir.dtypes import DTYPES
from .builder import Builder
from .tiles import round_up

BLOCK = 128  # columns that codes of 4 bits are packed by; K is padded to a multiple of it
HALF = BLOCK // 2
FRACTAL_ROWS, FRACTAL_BYTES = 16, 32
PLAIN = ("bf16", "f16", "f32")


@dataclass(frozen=True)
class Packing:
    """A weight [experts, N, K] (experts 0: there is no such axis) in a format; K and N as they are in device memory.

    `format` is bf16 or another plain dtype, or a quantized format that kernels read. `pairs` and `bits` are for codes that
    the matrix unit multiplies: those of 4 bits lie in pairs, and the unit takes the bits of E4M3 as another dtype.
    """

    format: str
    rows: int
    columns: int
    experts: int = 0
    fractal: bool = False
    pairs: bool = False
    bits: str = ""

    @cached_property
    def quantized(self) -> Format | None:
        """The quantized format; None for a plain dtype."""
        return find_format(self.format)

    @property
    def element(self) -> str:
        """The dtype of the tensor that holds the numbers or codes."""
        f = self.quantized
        return self.format if f is None else codes_of(f)

    @property
    def operand(self) -> str:
        """The dtype of the tiles that the matrix unit gets."""
        return self.format if self.quantized is None else "bf16"

    @property
    def step(self) -> int:
        """The columns that a loop over K has to take at once, or a multiple of them."""
        f = self.quantized
        return 1 if f is None else BLOCK if f.bits == 4 else max(f.group, BLOCK) if f.group >= 32 else BLOCK

    @cached_property
    def parts(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """The tensors in device memory: suffix of the weight's name -> (dtype, shape)."""
        lead = (self.experts,) if self.experts else ()
        f = self.quantized
        if f is None:
            return {"": (self.element, (*lead, *self._plain_shape()))}
        columns = round_up(self.columns, self.step)
        groups = -(-columns // f.group)
        found = {"codes": (self.element, (*lead, self.rows, columns // 2 if f.bits == 4 else columns))}
        found["scales"] = (scales_of(f), (*lead, -(-self.rows // f.rows), groups))
        if f.zeros:
            found["zeros"] = ("u8", (*lead, self.rows, groups))
        if f.tensor_scale:
            found["tensor_scale"] = ("f32", (max(self.experts, 1),))
        return found

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(int(np.prod(shape)) * DTYPES[dtype].bits // 8 for dtype, shape in self.parts.values())

    def _plain_shape(self) -> tuple[int, ...]:
        if not self.fractal:
            return self.rows, self.columns
        across = FRACTAL_BYTES * 8 // DTYPES[self.element].bits
        return -(-self.columns // across), -(-self.rows // FRACTAL_ROWS), FRACTAL_ROWS, across

    # --- packing ---

    def pack(self, numbers: np.ndarray | None = None, **codes: np.ndarray) -> dict[str, np.ndarray]:
        """Return the parts of plain numbers [.., N, K], or of the codes, scales, zeros and tensor_scale of a format.

        Codes come one in an element, unsigned ones as they are, signed ones as such, E2M1 as its four bits.
        """
        f = self.quantized
        if f is None:
            assert numbers is not None
            return {"": self._pack_plain(numbers.astype(DTYPES[self.element].numpy))}
        given = codes["codes"]
        if f.element == "int" and f.bits == 4 and not f.zeros:
            given = (given.astype(np.int16) + 8).astype(np.uint8)  # signed codes are stored with 8 added
        elif f.element == "int" and f.bits == 8 and f.zeros:
            given = (given.astype(np.int16) - 128).astype(np.int8)  # so are zero points; the difference stays
        wide = round_up(self.columns, self.step) - self.columns
        given = np.pad(given.view(np.uint8), [(0, 0)] * (given.ndim - 1) + [(0, wide)]).view(given.dtype)
        if f.bits == 4:
            halves = given.astype(np.uint8).reshape(*given.shape[:-1], -1, *((HALF, 2) if self.pairs else (2, HALF)))
            halves = np.moveaxis(halves, -1, -2) if self.pairs else halves
            given = (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*given.shape[:-1], -1)
        if self.bits:  # -0, which is no number there
            given = np.where(given.view(np.uint8) == 128, np.uint8(0), given.view(np.uint8))
        found = {"codes": given.view(DTYPES[self.element].numpy) if given.dtype.itemsize == 1 else given}
        for name in ("scales", "zeros", "tensor_scale"):
            if name in self.parts:
                dtype, shape = self.parts[name]
                found[name] = _pad_to(codes[name].astype(DTYPES[dtype].numpy, copy=False), shape)
        return found

    def _pack_plain(self, numbers: np.ndarray) -> np.ndarray:
        if not self.fractal:
            return numbers
        columns, rows, high, across = self._plain_shape()
        lead = [(0, 0)] * (numbers.ndim - 2)
        padded = np.pad(numbers, [*lead, (0, rows * high - self.rows), (0, columns * across - self.columns)])
        return np.moveaxis(padded.reshape(*numbers.shape[:-2], rows, high, columns, across), -2, -4)

    # --- reading ---

    def declare(self, b: Builder, name: str) -> None:
        """Declare the parts as tensors of a program: `name`, or name_codes, name_scales ..."""
        for part, (dtype, shape) in self.parts.items():
            b.tensor(f"{name}_{part}" if part else name, dtype, *shape, role="weight")

    def operands(
        self,
        b: Builder,
        name: str,
        tensor: str,
        expert: str | None,
        row: str,
        live: str,
        k: str,
        sizes: tuple[int, int],
    ) -> list[tuple[str, str, int]]:
        """Add what brings `sizes` = (rows, columns) of the weight to the matrix unit as its second operand, in bf16.

        `row` is an index vector of rows, `live` which of them there are, `k` the first column. Returns the tiles, with
        the first of their columns (after k) as an expression and how many they have: the other operand is split alike.
        """
        f = self.quantized
        lead = [expert] if expert else []
        if f is None:
            return [self._plain_operand(b, name, tensor, lead, row, live, k, sizes)]
        if f.bits == 4:
            assert not self.pairs
            return self._halves(b, name, tensor, lead, row, live, k, sizes)
        return [self._whole(b, name, tensor, lead, row, live, k, sizes)]

    def _plain_operand(
        self, b: Builder, name: str, tensor: str, lead: list[str], row: str, live: str, k: str, sizes: tuple[int, int]
    ) -> tuple[str, str, int]:
        n, width = f"{row}[:, None]", f"({k} + arange({sizes[1]}))[None, :]"
        mask = _both_conditions(
            f"{live}[:, None]", "" if self.columns % sizes[1] == 0 else f"({width} < {self.columns})"
        )
        at = [*lead, n, width]
        if self.fractal:
            _, _, high, across = self._plain_shape()
            at = [*lead, f"{width} // {across}", f"{n} // {high}", f"{n} % {high}", f"{width} % {across}"]
        tile = b.operand(name, tensor, at, mask, sizes, second=True)
        return tile, "0", sizes[1]

    def _scale(
        self, b: Builder, name: str, tensor: str, lead: list[str], row: str, live: str, k: str, rows: int, width: int
    ) -> str:
        """Add the load of the scales of `width` columns from k and return their expression, [rows, groups] or [rows, 1]."""
        f = self.quantized
        assert f is not None
        groups = max(width // f.group, 1)
        n = f"{row} // {f.rows}" if f.rows > 1 else row
        at = [*lead, f"({n})[:, None]", f"({k} // {f.group} + arange({groups}))[None, :]"]
        b.load(f"{name}_scale", f"{tensor}_scales", at, f"{live}[:, None]", shape=(rows, groups))
        text = _SCALES[f.scale][1](f"{name}_scale")
        if f.tensor_scale:
            b.load(f"{name}_whole", f"{tensor}_tensor_scale", lead or ["0"])
            text = f"({text} * {name}_whole)"
        return text

    def _zero(
        self, b: Builder, name: str, tensor: str, lead: list[str], row: str, live: str, k: str, rows: int, width: int
    ) -> str:
        f = self.quantized
        assert f is not None
        if not f.zeros:
            return "8.0" if f.bits == 4 else ""
        groups = max(width // f.group, 1)
        at = [*lead, f"{row}[:, None]", f"({k} // {f.group} + arange({groups}))[None, :]"]
        b.load(f"{name}_zero", f"{tensor}_zeros", at, f"{live}[:, None]", shape=(rows, groups))
        return f'cast({name}_zero, "f32")' + (" - 128.0" if f.bits == 8 else "")

    def _halves(
        self, b: Builder, name: str, tensor: str, lead: list[str], row: str, live: str, k: str, sizes: tuple[int, int]
    ) -> list[tuple[str, str, int]]:
        if sizes[1] != BLOCK:
            raise MoecError(f"codes of 4 bits are read {BLOCK} columns at once, not {sizes[1]}")
        f = self.quantized
        assert f is not None
        rows = sizes[0]
        at = [*lead, f"{row}[:, None]", f"({k} // 2 + arange({HALF}))[None, :]"]
        b.load(f"{name}_codes", f"{tensor}_codes", at, f"{live}[:, None]", shape=(rows, HALF))
        found = []
        for half, code in enumerate((f"({name}_codes & 15)", f"({name}_codes >> 4)")):
            label, first = f"{name}_{half}", f"({k} + {half * HALF})"
            value = _NUMBERS[f.element, f.bits](code)
            scale = self._scale(b, label, tensor, lead, row, live, first, rows, HALF)
            if f.element == "int":
                zero = self._zero(b, label, tensor, lead, row, live, first, rows, HALF)
                value = _apply_by_group(value, rows, HALF, f.group, f"- {zero}" if zero == "8.0" else "-", zero)
            value = _apply_by_group(value, rows, HALF, f.group, "*", scale)
            b.let(label, f'cast({value}, "bf16")', (rows, HALF), "bf16")
            found.append((b.as_operand(label, second=True), str(half * HALF), HALF))
        return found

    def _whole(
        self, b: Builder, name: str, tensor: str, lead: list[str], row: str, live: str, k: str, sizes: tuple[int, int]
    ) -> tuple[str, str, int]:
        f = self.quantized
        assert f is not None
        rows, width = sizes
        at = [*lead, f"{row}[:, None]", f"({k} + arange({width}))[None, :]"]
        b.load(f"{name}_codes", f"{tensor}_codes", at, f"{live}[:, None]", shape=sizes)
        value = _NUMBERS[f.element, f.bits](f"{name}_codes")
        if zero := self._zero(b, name, tensor, lead, row, live, k, rows, width):
            value = _apply_by_group(value, rows, width, f.group, "-", f"({zero})")
        value = _apply_by_group(
            value, rows, width, f.group, "*", self._scale(b, name, tensor, lead, row, live, k, rows, width)
        )
        b.let(name, f'cast({value}, "bf16")', sizes, "bf16")
        return b.as_operand(name, second=True), "0", width


def _e2m1_text(code: str) -> str:
    """Return E2M1 as f32: its three bits of number are the same of an f32 2^126 times smaller, 0.5 among the subnormal."""
    bits = f'cast({code}, "i32")'
    return f'(bitcast(({bits} & 8) << 28 | ({bits} & 7) << 22, "f32") * {2.0**126})'


def _f32_text(text: str) -> str:
    return f'cast({text}, "f32")'


# what kernels read: the element and bits of a code, and the dtype of its scale -> how they become f32
_NUMBERS: Mapping[tuple[str, int], Callable[[str], str]] = {
    ("int", 4): _f32_text, ("int", 8): _f32_text, ("e2m1", 4): _e2m1_text, ("e4m3", 8): _f32_text,
}  # fmt: skip
_SCALES: Mapping[str, tuple[str, Callable[[str], str]]] = {  # with the dtype in device memory
    "f32": ("f32", str),
    "f8e8m0": ("u8", lambda text: f'bitcast(cast({text}, "i32") << 23, "f32")'),  # 2^(byte - 127): an exponent of f32
    "f8e4m3": ("f8e4m3", _f32_text),
}


def codes_of(format: Format) -> str:
    """Return the dtype of the tensor that holds the codes of a format."""
    return "f8e4m3" if format.element == "e4m3" else "u8" if format.bits == 4 else "i8"


def scales_of(format: Format) -> str:
    """Return the dtype of the tensor that holds the scales of a format."""
    return _SCALES[format.scale][0]


def reads_format(format: Format) -> bool:
    """Return whether kernels read weights in a format."""
    return (format.element, format.bits) in _NUMBERS and format.scale in _SCALES


def _apply_by_group(value: str, rows: int, width: int, group: int, operator: str, other: str) -> str:
    """Return value operator other, where `other` [rows, groups] holds one number for `group` columns."""
    if operator.endswith("8.0"):
        return f"({value} {operator})"
    if width <= group:
        return f"({value} {operator} {other})"
    groups = width // group
    return f"reshape(reshape({value}, {rows}, {groups}, {group}) {operator} ({other})[:, :, None], {rows}, {width})"


def _both_conditions(a: str, b: str) -> str:
    return f"{a} & {b}" if b else a


def _pad_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.pad(array, [(0, n - m) for m, n in zip(array.shape, shape, strict=True)])
