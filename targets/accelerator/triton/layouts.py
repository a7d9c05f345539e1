"""Predicts the shared memory through which Triton converts layouts: of a matmul's sums before it stores them, of rows.

A matrix unit leaves a thread with pieces of several rows; a store wants neighbouring columns in each thread. Both
layouts, over registers, lanes and warps, are linear in the bits of row and column (Triton's linear layouts), so what
counts of a layout are the bits that a thread holds by itself, in registers. Bits that both layouts hold in registers
are parts of the tile that can pass one after the other through the same memory, except those that make up the widest
access. Where there is no matmul all tiles of a shape have the layout of the widest piece that one of them is read or
written in; a store of a narrower one, and a row that is read by itself, are converted. The rules were read off kernels
that Triton 3.9 compiled.
"""

from __future__ import annotations

from typing import TypeAlias

Held: TypeAlias = "set[tuple[str, int]]"  # what a thread's registers run over: ("row" or "column", power of two)
ACCESS = 128  # bits that a thread reads or writes at once at most
LANES = 32  # threads of a warp
ROWS, COLUMNS = 16, 8  # of a result of the smallest instruction: mma.sync's, and one warp's of wgmma


def conversion_bytes(m: int, n: int, bits: int, unit: str, arch: str, warps: int) -> int:
    """Return the bytes of the layout conversion of sums [m, n] before their store: `bits` each, of mma or wgmma; others 0."""
    if unit not in ("mma", "wgmma"):
        return 0
    stored = _held_by_access(m, n, widest_piece(m, n, bits, LANES * warps), LANES * warps)
    both = len(_held_by_unit(m, n, unit, warps) & stored)
    matrices = bits == 16 and int(arch.removeprefix("sm_")) >= 90  # stmatrix writes pieces of 16 bits that lie apart
    within = 1 if matrices else (ACCESS // bits).bit_length() - 1
    return m * n * bits // 8 >> max(0, both - within)


def widest_piece(m: int, n: int, bits: int, threads: int) -> int:
    """Return how many neighbouring columns of [m, n] a thread reads or writes at once, of `bits` each."""
    return max(1, min(ACCESS // bits, m * n // threads, n))


def store_bytes(m: int, n: int, bits: int, piece: int, threads: int) -> int:
    """Return the bytes of the conversion of a tile whose threads hold pieces of that many columns, before its store."""
    own = widest_piece(m, n, bits, threads)
    held = _held_by_access(m, n, piece, threads) & _held_by_access(m, n, own, threads)
    return 0 if own == piece else _passed_bytes(m * n, bits, held, ACCESS)


def row_bytes(m: int, n: int, bits: int, piece: int, threads: int, arch: str) -> int:
    """Return the bytes of the conversion of a row that is read by itself and spread over a tile [m, n] with such pieces.

    Where pieces are longer than two accesses NVIDIA's threads pass words of their own one by one.
    """
    own = widest_piece(1, n, bits, threads)
    held = _held_by_access(m, n, piece, threads) & _held_by_access(1, n, own, threads)
    words = arch.startswith("sm_") and piece * bits > 2 * ACCESS
    return 0 if own == piece and n >= piece * threads else _passed_bytes(n, bits, held, bits if words else ACCESS)


def _passed_bytes(size: int, bits: int, held: Held, access: int) -> int:
    return size * bits // 8 >> max(0, len(held) - (access // bits).bit_length() + 1)


def warps_along(m: int, n: int, unit: str, warps: int) -> tuple[int, int]:
    """Return how many warps lie along the rows and along the columns of sums of [m, n]: wgmma's in groups of four."""
    rows, columns = (4, 1) if unit == "wgmma" else (1, 1)
    while rows * columns < warps:
        free = m // ROWS // rows
        if free > 1 and (unit == "wgmma" or free >= n // COLUMNS // columns):
            rows *= 2
        else:
            columns *= 2
    return rows, columns


def _held_by_unit(m: int, n: int, unit: str, warps: int) -> Held:
    rows, columns = warps_along(m, n, unit, warps)
    own = (
        _bits_of_axis("column", COLUMNS, n // columns)
        if unit == "wgmma"
        else _bits_of_axis("column", COLUMNS * columns, n)
    )
    return {("column", 1), ("row", COLUMNS)} | own | _bits_of_axis("row", ROWS * rows, m)


def _held_by_access(m: int, n: int, piece: int, threads: int) -> Held:
    """Return what a thread reads or writes: a piece of a row, the same piece of later rows, and what a row is longer than that."""
    along = min(threads, max(1, n // piece))  # threads of a row
    return (
        _bits_of_axis("column", 1, piece)
        | _bits_of_axis("column", piece * along, n)
        | _bits_of_axis("row", threads // along, m)
    )


def _bits_of_axis(axis: str, first: int, end: int) -> Held:
    """Return the powers of two from `first` to below `end`, both powers of two."""
    return {(axis, 1 << i) for i in range(first.bit_length() - 1, end.bit_length() - 1)}
