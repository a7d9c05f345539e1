"""Recipes for the weights of GPTQ, AWQ and AutoRound checkpoints: integers packed along either axis."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from ...ir.recipes import Recipe, Tensor
from ...weights.steps.table import step
from .layouts import FLOATS, Stored, by_order
from .schemes import Scheme

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # column i of eight lies in this nibble of a word
_BITS = (2, 3, 4, 8)


def gptq_weight(stored: Stored, scheme: Scheme) -> Recipe:
    """Return GPTQ weights: codes i32[in bits / 32, out] along the columns, zero points i32[groups, out bits / 32].

    `checkpoint_format` gptq stores zero points less 1 (15 stands for 0), gptq_v2 stores them. Scales belong to groups of
    inputs in order, or, with desc_act, to the inputs that g_idx says. Symmetric weights need no zero points.
    """
    if scheme.layout == "awq":
        return awq_weight(stored, scheme)
    indexed = _as_indexed(stored, scheme)
    try:
        return _by_columns(stored, indexed)
    except ValueError as error:
        if indexed == scheme:
            raise
        raise ValueError(f"{error}, by the bits and groups that {stored['g_idx'].name} shows") from None


def _by_columns(stored: Stored, scheme: Scheme) -> Recipe:
    """Return GPTQ weights, stored as the scheme says."""
    packed, scale, bits = _packed_codes_and_scales(stored, scheme)
    words, rows = packed.type.sizes
    if bits not in _BITS or words * 32 % bits:
        raise ValueError(f"{packed.type} does not hold codes of {bits} bits, as config.json says")
    columns = words * 32 // bits
    group, groups = _group_counts(scale, scheme, columns, rows)
    codes = step("transpose", step("unpack", packed, bits=bits, axis=0, size=columns), perm=(1, 0))
    scales = step("transpose", scale, perm=(1, 0))
    zeros = _zero_points(stored, scheme, (groups, rows))
    if not _has_order(stored, groups):
        if not scheme.in_order:
            what = "is missing, empty or zero everywhere"
            raise ValueError(f"{stored.sibling('g_idx', 'qweight')} {what}, and `desc_act` is true")
    elif not torch.equal(stored.values("g_idx").long(), torch.arange(columns) // group):
        return by_order(codes, scales, zeros, stored, "g_idx", bits)
    return step("dequantize", codes, scales, *zeros, block=(1, group), bits=bits)


def _has_order(stored: Stored, groups: int) -> bool:
    """Return whether g_idx says anything: tools leave it empty, or zero everywhere, where inputs are in order."""
    if "g_idx" not in stored or not stored["g_idx"].type.elements:
        return False
    return groups == 1 or bool(stored.values("g_idx").any())


def _as_indexed(stored: Stored, scheme: Scheme) -> Scheme:
    """Return the scheme with the bits and the group that g_idx shows where those of config.json do not fit the tensors.

    g_idx has one number for each input, so that it says both without a guess: of one expert, say, that is stored
    otherwise than config.json says of all.
    """
    if not {"g_idx", "qweight", "scales"} <= stored.parts.keys() or scheme.block is None:
        return scheme
    (columns, *_), (words, *_), (groups, *_) = (stored[r].type.sizes for r in ("g_idx", "qweight", "scales"))
    bits = words * 32 // columns if columns else 0
    if bits not in _BITS or bits * columns != words * 32:
        return scheme
    group = scheme.block[1] or columns
    if -(-columns // min(group, columns)) != groups:
        index = stored.values("g_idx").long()
        first = int((index == 0).sum())
        if not first or not torch.equal(index, torch.arange(columns) // first):
            return scheme
        group = first
    return replace(scheme, bits=bits, block=(1, group))


def _packed_codes_and_scales(stored: Stored, scheme: Scheme) -> tuple[Tensor, Tensor, int]:
    packed, scale = stored["qweight"], stored.needed("scales", "qweight")
    if scheme.kind != "int" or not scheme.layout:
        raise ValueError(
            f"codes packed as GPTQ does, where config.json speaks of {scheme.kind} with {scheme.bits} bits"
        )
    if packed.type.dtype != "i32" or len(packed.type.shape) != 2:
        raise ValueError(f"codes are packed in i32 of two axes, not in {packed.type}")
    if scale.type.dtype not in FLOATS or len(scale.type.shape) != 2:
        raise ValueError(f"{scale.name} is {scale.type}, floats [groups, out] are wanted")
    return packed, scale, scheme.bits


def _group_counts(scale: Tensor, scheme: Scheme, columns: int, rows: int) -> tuple[int, int]:
    """Return how many inputs share a scale, and how many groups there are."""
    assert scheme.block is not None
    group = min(scheme.block[1] or columns, columns)
    groups = -(-columns // group)
    if scale.type.sizes != (groups, rows):
        size = scheme.block[1] or -1
        raise ValueError(
            f"{scale.name} is {scale.type}, group_size {size} with {columns} inputs wants {[groups, rows]}"
        )
    return group, groups


def _zero_points(stored: Stored, scheme: Scheme, shape: tuple[int, int]) -> list[Recipe]:
    """Return the zero points [out, groups]; none for symmetric weights, whose zero point is half of the range.

    Tools disagree about whether zero points of symmetric weights are stored less 1: `sym` decides, and what is stored
    has to be one of both. A config that does not speak of `sym` is taken to mean it where all zero points are such.
    """
    groups, rows = shape
    half = 1 << (scheme.bits - 1)
    if "qzeros" not in stored or not stored["qzeros"].type.elements:
        if not scheme.symmetric:
            raise ValueError(f"{stored.sibling('qzeros', 'qweight')} is missing or empty, and `sym` is not true")
        return []
    zero = stored["qzeros"]
    width = -(-rows * scheme.bits // 32)
    if zero.type.dtype != "i32" or zero.type.sizes != (groups, width):
        raise ValueError(f"{zero.name} is {zero.type}, i32{[groups, width]} is wanted")
    if scheme.symmetric is not False:
        found = _constant_code(stored.values("qzeros"), scheme.bits, rows)
        if found in ((half,) if scheme.layout == "awq" else (half, half - 1)):
            return []
        if scheme.symmetric:
            raise ValueError(f"{zero.name} is not {half} (or {half - 1}) everywhere, and config.json says symmetric")
    if scheme.layout == "awq":
        return [step("transpose", step("unpack", zero, bits=4, axis=1, order=_AWQ_ORDER), perm=(1, 0))]
    points: Recipe = step("unpack", zero, bits=scheme.bits, axis=1, size=rows)
    if scheme.zeros_less_one:
        points = step("affine", points, to="u8", add=1, bits=scheme.bits)
    return [step("transpose", points, perm=(1, 0))]


def _constant_code(words: torch.Tensor, bits: int, count: int) -> int | None:
    """Return the number that all packed codes of rows of words are, None if they differ. Bits behind the last count not."""
    first = int(words.flatten()[0]) & ((1 << bits) - 1)
    wanted, used = _repeated_code_words(first, bits, count), _repeated_code_words((1 << bits) - 1, bits, count)
    return first if bool(((words.long() & used) == wanted).all()) else None


@lru_cache(maxsize=256)
def _repeated_code_words(code: int, bits: int, count: int) -> torch.Tensor:
    """Return the words (as integers of 64 bits) that hold a code so many times."""
    whole = int(f"{code:0{bits}b}" * count, 2)
    return torch.tensor([(whole >> (32 * i)) & 0xFFFFFFFF for i in range(-(-count * bits // 32))])


def awq_weight(stored: Stored, scheme: Scheme) -> Recipe:
    """Return AWQ weights (GEMM): codes i32[in, out / 8] and zero points i32[groups, out / 8], both in AWQ's order."""
    packed, scale, bits = _packed_codes_and_scales(stored, scheme)
    if bits != 4:
        raise ValueError(f"AWQ has 4 bits, config.json says {bits}")
    if "g_idx" in stored:
        raise ValueError(f"{stored['g_idx'].name} beside codes of AWQ")
    columns, rows = packed.type.sizes[0], packed.type.sizes[1] * 8
    group, groups = _group_counts(scale, scheme, columns, rows)
    codes = step("transpose", step("unpack", packed, bits=4, axis=1, order=_AWQ_ORDER), perm=(1, 0))
    zeros = _zero_points(stored, scheme, (groups, rows))
    return step("dequantize", codes, step("transpose", scale, perm=(1, 0)), *zeros, block=(1, group), bits=4)
