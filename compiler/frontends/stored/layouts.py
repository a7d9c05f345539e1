"""Recipes for the weights of quantized checkpoints, layout by layout.

Every function takes the tensors of one module and returns f32[out, in] (gpt-oss: f32[experts, in, out]) as a recipe of
`dequantize` on codes that are unpacked where they lie. ValueError and KeyError say what does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.recipes import Recipe, Step, Tensor, step

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # column i of eight lies in this nibble of a word
_FP8 = ("f8e4m3", "f8e5m2")


@dataclass(frozen=True)
class Stored:
    """The tensors of a module by their leaf, the quantization_config, the weight's shape where it is stored too."""

    parts: Mapping[str, Tensor]
    config: Mapping[str, Any]
    shape: tuple[int, ...] | None
    read: Callable[[str], torch.Tensor]

    def __getitem__(self, leaf: str) -> Tensor:
        return self.parts[leaf]

    def __contains__(self, leaf: str) -> bool:
        return leaf in self.parts


Layout = Callable[[Stored], Recipe]


def scaled(stored: Stored) -> Recipe:
    """Return FP8 or int8 numbers times scales for blocks, groups, rows or the tensor; FP4 in bytes beside such scales.

    Sources: DeepSeek V3 and V4 (weight_scale_inv, scale), compressed-tensors (weight_scale, weight_zero_point),
    ModelOpt (weight_scale, weight_scale_2), Mistral (qscale_weight).
    """
    weight = stored["weight"]
    name = next(n for n in ("weight_scale_inv", "weight_scale", "scale", "qscale_weight") if n in stored)
    scale = stored[name]
    if weight.type.dtype == "u8" or (weight.type.dtype == "i8" and scale.type.dtype == "f8e8m0"):
        return float4(
            Stored({**stored.parts, "weight_packed": weight, "weight_scale": scale}, stored.config, None, stored.read)
        )
    if "weight_scale_2" in stored:
        raise ValueError(f"weight_scale_2 beside codes {weight.type}")
    scales, block = _scales(weight, scale, stored.config)
    if weight.type.dtype in _FP8 and "weight_zero_point" not in stored:
        return step("dequantize", weight, scales, block=block)
    if weight.type.dtype != "i8":
        raise ValueError(f"codes cannot be {weight.type}")
    codes = step("affine", weight, to="u8", add=128)
    zeros = []
    if "weight_zero_point" in stored:
        shifted = step("affine", stored["weight_zero_point"], to="u8", add=128)
        zeros = [step("reshape", shifted, shape=scales.type.sizes)]
    return step("dequantize", codes, scales, *zeros, block=block, bits=8)


def _scales(weight: Tensor, scale: Tensor, config: Mapping[str, Any]) -> tuple[Recipe, tuple[int, ...]]:
    """Return scales with the rank of the weight, and the block of the weight that each belongs to."""
    found: Recipe = step("view", scale, to="f8e8m0") if scale.type.dtype == "u8" else scale
    sizes, have = weight.type.sizes, scale.type.sizes
    if scale.type.elements == 1:
        return step("reshape", found, shape=(1,) * len(sizes)), sizes
    if have == sizes[:1]:
        have = (*sizes[:1], *(1 for _ in sizes[1:]))
        found = step("reshape", found, shape=have)
    given = config.get("weight_block_size") or _group_blocks(config)
    if len(have) != len(sizes):
        raise ValueError(f"scales {scale.type} do not fit {weight.type}")
    if given and len(given) == len(sizes) and have == tuple(-(-n // b) for n, b in zip(sizes, given, strict=True)):
        return found, tuple(given)
    if any(n % m for n, m in zip(sizes, have, strict=True)):
        raise ValueError(f"scales {scale.type} do not divide {weight.type}")
    return found, tuple(n // m for n, m in zip(sizes, have, strict=True))


def _group_blocks(config: Mapping[str, Any]) -> Any:
    """Return the block_structure of compressed-tensors where all groups of modules have the same."""
    weights = [g.get("weights") or {} for g in (config.get("config_groups") or {}).values()]
    found = {str(w.get("block_structure")): w.get("block_structure") for w in weights}
    (block,) = found.values() if len(found) == 1 else (None,)
    return tuple(block) if isinstance(block, (list, tuple)) else None


def e2m1(packed: Recipe) -> Recipe:
    """Return the f32 numbers of E2M1 codes that lie two in a byte along the last axis, low nibble first."""
    return step("decode", step("unpack", packed, bits=4, axis=len(packed.type.shape) - 1), of="e2m1")


def float4(stored: Stored) -> Recipe:
    """Return E2M1 in bytes along the last axis, low nibble first: MXFP4 and both kinds of NVFP4.

    The scale of the tensor multiplies in ModelOpt (weight_scale_2) and divides in compressed-tensors
    (weight_global_scale).
    """
    packed, scale = stored["weight_packed"], stored["weight_scale"]
    axis = len(packed.type.shape) - 1
    numbers = e2m1(packed)
    scales: Recipe = step("view", scale, to="f8e8m0") if scale.type.dtype == "u8" else scale
    whole = next((n for n in ("weight_scale_2", "weight_global_scale") if n in stored), None)
    if scale.type.dtype == "f8e4m3" and whole is None:
        raise ValueError("scales E4M3 without weight_scale_2 or weight_global_scale")
    if whole:
        one = step("reshape", stored[whole], shape=(1,) * (axis + 1))
        options = {"divide": True} if whole == "weight_global_scale" else {}
        scales = step("dequantize", scales, one, block=scales.type.sizes, **options)
    group = numbers.type.sizes[-1] // scales.type.sizes[-1]
    return step("dequantize", numbers, scales, block=(*(1 for _ in range(axis)), group))


def gpt_oss(stored: Stored) -> Recipe:
    """Return the MXFP4 experts of gpt-oss: `_blocks` u8[E, out, in / 32, 16], low nibble first, `_scales` u8 E8M0."""
    blocks, scales = stored["_blocks"], stored["_scales"]
    *outer, groups, width = blocks.type.sizes
    block = (*(1 for _ in outer), 2 * width)
    exponents = step("view", scales, to="f8e8m0") if scales.type.dtype == "u8" else scales
    codes = step("reshape", blocks, shape=(*outer, groups * width))
    numbers = step("dequantize", e2m1(codes), exponents, block=block)
    return step("transpose", numbers, perm=(*range(len(outer) - 1), len(outer), len(outer) - 1))


def packed_integers(stored: Stored) -> Recipe:
    """Return pack-quantized integers of compressed-tensors.

    Codes i32[out, in bits / 32] along the rows, zero points i32[out bits / 32, groups] along the columns; both stored
    with half of the range added.
    """
    packed, scale = stored["weight_packed"], stored["weight_scale"]
    rows, columns = stored.shape or (packed.type.sizes[0], 0)
    options = _integer_groups(stored.config)
    bits = {o[0] for o in options if -(-columns * o[0] // 32) == packed.type.sizes[1]}
    if len(bits) != 1 or packed.type.sizes[0] != rows:
        raise ValueError(
            f"weight_shape {[rows, columns]} with {packed.type} and num_bits {sorted({o[0] for o in options})}"
        )
    (width,) = bits
    codes = step("unpack", packed, bits=width, axis=1, size=columns)
    groups = scale.type.sizes[-1]
    zeros: list[Recipe] = []
    if "weight_zero_point" in stored:
        zeros = [step("unpack", stored["weight_zero_point"], bits=width, axis=0, size=rows)]
    if "weight_g_idx" in stored:
        return _by_order(codes, scale, zeros, stored["weight_g_idx"], width)
    sizes = {g for b, g in options if b == width and g and -(-columns // g) == groups}
    group = columns if groups == 1 else sizes.pop() if len(sizes) == 1 else -(-columns // groups)
    scales = step("reshape", scale, shape=(rows, groups)) if scale.type.elements != 1 else _one(scale)
    if scale.type.elements == 1:
        return step("dequantize", codes, scales, *zeros, block=(rows, columns), bits=width)
    return step("dequantize", codes, scales, *zeros, block=(1, group), bits=width)


def _one(scale: Recipe) -> Recipe:
    return step("reshape", scale, shape=(1, 1))


def _integer_groups(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return (num_bits, group_size or 0) of the groups of modules in a config of compressed-tensors."""
    weights = [g.get("weights") or {} for g in (config.get("config_groups") or {}).values()]
    found = [(int(w["num_bits"]), int(w.get("group_size") or 0)) for w in weights if w.get("type", "int") == "int"]
    if not found:
        raise ValueError("config_groups names no integer weights")
    return found


def gptq(stored: Stored) -> Recipe:
    """Return GPTQ weights: codes i32[in bits / 32, out] along the columns, zero points i32[groups, out bits / 32].

    `checkpoint_format` gptq stores zero points less 1 (15 stands for 0), gptq_v2 stores them. Scales belong to groups of
    inputs in order, or, with desc_act, to the inputs that g_idx says.
    """
    packed, scale, zero = stored["qweight"], stored["scales"], stored["qzeros"]
    groups, rows = scale.type.sizes
    columns = (
        stored["g_idx"].type.sizes[0] if "g_idx" in stored else packed.type.sizes[0] * 32 // int(stored.config["bits"])
    )
    bits = packed.type.sizes[0] * 32 // columns
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"{bits} bits")
    codes = step("transpose", step("unpack", packed, bits=bits, axis=0, size=columns), perm=(1, 0))
    scales = step("transpose", scale, perm=(1, 0))
    zeros: Recipe = step("unpack", zero, bits=bits, axis=1, size=rows)
    if (stored.config.get("checkpoint_format") or "gptq") == "gptq":
        zeros = step("affine", zeros, to="u8", add=1, bits=bits)
    zeros = step("transpose", zeros, perm=(1, 0))
    if "g_idx" in stored and (stored.config.get("desc_act") or not _in_order(stored, columns, groups)):
        return _by_order(codes, scales, [zeros], stored["g_idx"], bits)
    return step("dequantize", codes, scales, zeros, block=(1, -(-columns // groups)), bits=bits)


def _in_order(stored: Stored, columns: int, groups: int) -> bool:
    index = stored.read(stored["g_idx"].name)
    return bool(torch.equal(index.long(), torch.arange(columns) // -(-columns // groups)))


def _by_order(codes: Recipe, scales: Recipe, zeros: list[Recipe], index: Recipe, bits: int) -> Step:
    """Return codes with the scale and zero point of the group that `index` gives to each column."""
    own = [step("gather", item, index, axis=1) for item in (scales, *zeros)]
    return step("dequantize", codes, *own, block=(1, 1), bits=bits)


def awq(stored: Stored) -> Recipe:
    """Return AWQ weights (GEMM): codes i32[in, out / 8] and zero points i32[groups, out / 8], both in AWQ's order."""
    packed, scale, zero = stored["qweight"], stored["scales"], stored["qzeros"]
    if int(stored.config.get("bits", stored.config.get("w_bit", 4))) != 4:
        raise ValueError("AWQ has 4 bits")
    columns, groups = packed.type.sizes[0], scale.type.sizes[0]
    if columns % groups:
        raise ValueError(f"{groups} groups of {columns} inputs")
    codes, zeros = (
        step("transpose", step("unpack", item, bits=4, axis=1, order=_AWQ_ORDER), perm=(1, 0))
        for item in (packed, zero)
    )
    scales = step("transpose", scale, perm=(1, 0))
    return step("dequantize", codes, scales, zeros, block=(1, columns // groups), bits=4)
