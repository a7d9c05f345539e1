"""Recipes for the weights of quantized checkpoints, layout by layout; layouts_gptq.py has those of GPTQ and AWQ.

Every function takes the tensors of one weight and a scheme that config.json gives it, and returns f32[out, in] (gpt-oss:
f32[experts, in, out]) as a recipe of `dequantize` on codes that are unpacked where they lie. ValueError says what does not
fit; what the config says and the tensors hold has to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...ir.recipes import Recipe, Step, Tensor
from ...ir.types import TensorType
from ...weights.steps.table import step
from .schemes import WHOLE_TENSOR, Block, Scheme

FLOATS = ("f32", "bf16", "f16", "f64")
_FP8 = ("f8e4m3", "f8e5m2")


@dataclass(frozen=True)
class Stored:
    """The tensors of a weight by their role, and how to read the small ones whose values matter."""

    parts: Mapping[str, Tensor]
    read: Callable[[str], torch.Tensor]

    def __getitem__(self, role: str) -> Tensor:
        return self.parts[role]

    def __contains__(self, role: str) -> bool:
        return role in self.parts

    def needed(self, role: str, beside: str) -> Tensor:
        """Return a tensor that the codes need; ValueError names it if it is not there."""
        if role not in self.parts:
            raise ValueError(f"{self.sibling(role, beside)} is missing")
        return self.parts[role]

    def sibling(self, role: str, beside: str) -> str:
        """Return what a tensor would be called beside the codes, of a module or of a parameter with suffixes."""
        module, _, leaf = self.parts[beside].name.rpartition(".")
        return f"{module}.{role}" if leaf in ("weight", "weight_packed", "qweight") else f"{module}.{leaf}_{role}"

    def values(self, role: str) -> torch.Tensor:
        """Return the numbers of a tensor."""
        return self.read(self.parts[role].name)


Layout = Callable[[Stored, Scheme], Recipe]


def scaled_codes(stored: Stored, scheme: Scheme) -> Recipe:
    """Return FP8 or int8 numbers times scales for blocks, groups, rows or the tensor; FP4 in bytes beside such scales.

    Sources: DeepSeek V3 and V4 (weight_scale_inv, scale), compressed-tensors (weight_scale, weight_zero_point),
    ModelOpt (weight_scale, weight_scale_2), Mistral (qscale_weight).
    """
    weight = stored["weight"]
    found = [name for name in ("weight_scale_inv", "weight_scale", "scale", "qscale_weight") if name in stored]
    if len(found) != 1:
        raise ValueError(
            f"{' and '.join(stored[name].name for name in found)} stand beside it"
            if found
            else f"{stored.sibling('weight_scale', 'weight')} is missing"
        )
    scale = stored[found[0]]
    if (scheme.kind, scheme.bits) == ("float", 4):
        return block_scaled_float4(
            Stored({**stored.parts, "weight_packed": weight, "weight_scale": scale}, stored.read), scheme
        )
    wanted = scheme.floats if scheme.kind == "float" else "i8"
    if weight.type.dtype != wanted:
        raise ValueError(f"codes cannot be {weight.type}, config.json speaks of {wanted}")
    if "weight_scale_2" in stored:
        raise ValueError(f"{stored['weight_scale_2'].name} beside codes {weight.type}")
    scales, block = spread_scales(weight.type, scale, scheme)
    zeros = _zero_points(stored, scheme, "weight")
    if weight.type.dtype in _FP8:
        if zeros:
            raise ValueError(f"{zeros[0].name} beside codes {weight.type}")
        return step("dequantize", weight, scales, block=block)
    codes = step("affine", weight, to="u8", add=128)
    if zeros and (zeros[0].type.dtype != "i8" or zeros[0].type.elements != scale.type.elements):
        raise ValueError(f"{zeros[0].name} is {zeros[0].type}, one i8 for each of the scales {scale.type} is wanted")
    shifted = [step("reshape", step("affine", z, to="u8", add=128), shape=scales.type.sizes) for z in zeros]
    return step("dequantize", codes, scales, *shifted, block=block, bits=8)


def _zero_points(stored: Stored, scheme: Scheme, codes: str) -> list[Tensor]:
    """Return the zero points, if there are any; ValueError if the config speaks of some that are not there."""
    if "weight_zero_point" in stored:
        return [stored["weight_zero_point"]]
    if scheme.symmetric is False:
        raise ValueError(f"{stored.sibling('weight_zero_point', codes)} is missing, and `symmetric` is false")
    return []


def spread_scales(codes: TensorType, scale: Tensor, scheme: Scheme) -> tuple[Recipe, tuple[int, ...]]:
    """Return scales with the rank of the codes, and the block of codes that each belongs to.

    What a scale belongs to is what the config says: its blocks or groups, the last of which may be short, its rows, its
    tensor. A config that does not say leaves one scale for the tensor, or one a row. Stacked experts have all that each.
    """
    numbers = scale_numbers(scale, scheme)
    *lead, rows, columns = codes.sizes if len(codes.shape) > 1 else (1, *codes.sizes)
    outer = tuple(lead)
    one = (1,) * len(lead)
    block = scheme.block
    choices: list[tuple[tuple[int, ...], list[tuple[int, ...]], tuple[int, ...]]] = []  # shape, as stored, block
    if block is None or block == WHOLE_TENSOR:
        if lead:
            choices.append(((*outer, 1, 1), [outer, (*outer, 1), (*outer, 1, 1)], (*one, rows, columns)))
        choices.append(((*one, 1, 1), [(), (1,), (*one, 1, 1)], (*outer, rows, columns)))
    if block is None or block == (1, 0):
        flat = [] if lead and rows == columns else [(*outer, rows)]  # of stacked experts: which axis is it?
        choices.append(((*outer, rows, 1), [*flat, (*outer, rows, 1)], (*one, 1, columns)))
    if block and block != WHOLE_TENSOR:
        high, wide = block[0] or rows, min(block[1] or columns, columns) if block[0] == 1 else block[1]
        shape = (*outer, -(-rows // high), -(-columns // wide))
        apart = (*outer, shape[-2], 1, shape[-1], 1)  # as ModelOpt stores FP8 in blocks
        choices.append((shape, [shape, apart], (*one, high, wide)))
    for shape, stored, own in choices:
        if scale.type.sizes in stored and len(shape) == len(codes.shape):
            return step("reshape", numbers, shape=shape) if scale.type.sizes != shape else numbers, own
    wanted = choices[-1][0]
    raise ValueError(f"{scale.name} is {scale.type}, {_describe_block(block)} for {codes} wants {list(wanted)}")


def _describe_block(block: Block | None) -> str:
    if block is None or block == WHOLE_TENSOR:
        return "one scale for the tensor" if block else "one scale for the tensor or a row"
    return "one scale a row" if block == (1, 0) else f"one scale for a block {list(block)} as config.json says"


def scale_numbers(scale: Tensor, scheme: Scheme) -> Recipe:
    """Return scales as numbers: E8M0 may be stored as bytes; ValueError for numbers of a kind that the config excludes."""
    dtype = scale.type.dtype
    if dtype == "u8" and scheme.scale == "e8m0":
        return step("view", scale, to="f8e8m0")
    allowed = {"e8m0": ("f8e8m0",), "e4m3": ("f8e4m3",)}.get(scheme.scale, (*FLOATS, "f8e8m0"))
    if dtype not in allowed:
        raise ValueError(f"{scale.name} is {scale.type}, scales of {' or '.join(allowed)} are wanted")
    return scale


def unpack_e2m1(packed: Recipe) -> Recipe:
    """Return the f32 numbers of E2M1 codes that lie two in a byte along the last axis, low nibble first."""
    return step("decode", step("unpack", packed, bits=4, axis=len(packed.type.shape) - 1), of="e2m1")


def block_scaled_float4(stored: Stored, scheme: Scheme) -> Recipe:
    """Return E2M1 in bytes along the last axis, low nibble first: MXFP4 and both kinds of NVFP4.

    The scale of the tensor multiplies in ModelOpt (weight_scale_2) and divides in compressed-tensors
    (weight_global_scale).
    """
    packed, scale = stored["weight_packed"], stored.needed("weight_scale", "weight_packed")
    if packed.type.dtype not in ("u8", "i8") or (scheme.kind, scheme.bits) != ("float", 4) or scheme.block is None:
        raise ValueError(f"codes {packed.type} where config.json speaks of {scheme.kind} with {scheme.bits} bits")
    numbers = unpack_e2m1(packed)
    *outer, columns = numbers.type.sizes
    group = scheme.block[1] or columns
    if scale.type.sizes != (*outer, -(-columns // group)):
        raise ValueError(f"{scale.name} is {scale.type}, groups of {group} want {[*outer, -(-columns // group)]}")
    scales = scale_numbers(scale, scheme)
    whole = [n for n in ("weight_scale_2", "weight_global_scale") if n in stored]
    if len(whole) != (scheme.scale == "e4m3"):
        lacking = " or ".join(stored.sibling(n, "weight_packed") for n in ("weight_scale_2", "weight_global_scale"))
        beside = " and ".join(stored[n].name for n in whole)
        raise ValueError(f"{beside} beside scales {scale.type}" if whole else f"{lacking} is missing")
    if whole:
        options = {"divide": True} if whole[0] == "weight_global_scale" else {}
        one, block = spread_scales(scales.type, stored[whole[0]], Scheme("float", 8, WHOLE_TENSOR))
        if stored[whole[0]].type.dtype not in FLOATS:
            raise ValueError(f"{stored[whole[0]].name} is {stored[whole[0]].type}")
        scales = step("dequantize", scales, one, block=block, **options)
    return step("dequantize", numbers, scales, block=(*(1 for _ in outer), group))


def gpt_oss(stored: Stored, scheme: Scheme) -> Recipe:
    """Return the MXFP4 experts of gpt-oss: `_blocks` u8[E, out, in / 32, 16], low nibble first, `_scales` u8 E8M0."""
    blocks = stored["blocks"]
    if "scales" not in stored:
        raise ValueError(f"{blocks.name.removesuffix('blocks')}scales is missing")
    if len(blocks.type.shape) != 4 or blocks.type.sizes[-1] * 2 != 32 or scheme.scale != "e8m0":
        raise ValueError(f"blocks of 16 bytes are wanted, not {blocks.type}")
    *outer, groups, width = blocks.type.sizes
    codes = step("reshape", blocks, shape=(*outer, groups * width))
    block = (*(1 for _ in outer), 2 * width)
    scales = stored["scales"]
    if scales.type.sizes != (*outer, groups):
        raise ValueError(f"{scales.name} is {scales.type}, {[*outer, groups]} is wanted")
    numbers = step("dequantize", unpack_e2m1(codes), scale_numbers(scales, scheme), block=block)
    return step("transpose", numbers, perm=(*range(len(outer) - 1), len(outer), len(outer) - 1))


def packed_integers(stored: Stored, scheme: Scheme) -> Recipe:
    """Return pack-quantized integers of compressed-tensors.

    Codes i32[out, in bits / 32] along the rows, zero points i32[out bits / 32, groups] along the columns; both stored
    with half of the range added. `weight_shape` says how many of the codes count.
    """
    packed, scale = stored["weight_packed"], stored.needed("weight_scale", "weight_packed")
    if packed.type.dtype != "i32" or scheme.kind != "int":
        raise ValueError(f"codes {packed.type} where config.json speaks of {scheme.kind} with {scheme.bits} bits")
    rows, columns = _stored_shape(stored)
    if packed.type.sizes != (rows, -(-columns * scheme.bits // 32)):
        raise ValueError(f"{stored['weight_shape'].name} {[rows, columns]} with {packed.type} and {scheme.bits} bits")
    codes = step("unpack", packed, bits=scheme.bits, axis=1, size=columns)
    scales, block = spread_scales(codes.type, scale, scheme)
    found = _zero_points(stored, scheme, "weight_packed")
    wanted = (-(-rows * scheme.bits // 32), scales.type.sizes[-1])
    if found and (found[0].type.dtype != "i32" or found[0].type.sizes != wanted):
        raise ValueError(f"{found[0].name} is {found[0].type}, i32{list(wanted)} is wanted")
    zeros: list[Recipe] = [step("unpack", item, bits=scheme.bits, axis=0, size=rows) for item in found]
    if "weight_g_idx" in stored and not bool((stored.values("weight_g_idx") == -1).all()):
        return by_order(codes, scales, zeros, stored, "weight_g_idx", scheme.bits)
    if not scheme.in_order:
        raise ValueError(f"{stored.sibling('weight_g_idx', 'weight_packed')} is missing, and `actorder` is group")
    return step("dequantize", codes, scales, *zeros, block=block, bits=scheme.bits)


def _stored_shape(stored: Stored) -> tuple[int, int]:
    """Return the sizes that `weight_shape` holds."""
    shape = stored.needed("weight_shape", "weight_packed")
    if shape.type.dtype not in ("i64", "i32") or shape.type.elements != 2:
        raise ValueError(f"{shape.name} is {shape.type}, two integers are wanted")
    rows, columns = stored.values("weight_shape").flatten().tolist()
    return rows, columns


def by_order(codes: Recipe, scales: Recipe, zeros: list[Recipe], stored: Stored, role: str, bits: int) -> Step:
    """Return codes with the scale and zero point of the group that an index gives to each column."""
    index, columns, groups = stored[role], codes.type.sizes[1], scales.type.sizes[1]
    if index.type.dtype not in ("i32", "i64") or index.type.sizes != (columns,):
        raise ValueError(f"{index.name} is {index.type}, one integer for each of {columns} inputs is wanted")
    values = stored.values(role)
    if int(values.min()) < 0 or int(values.max()) >= groups:
        raise ValueError(f"{index.name} points outside the {groups} groups of scales")
    own = [step("gather", item, index, axis=1) for item in (scales, *zeros)]
    return step("dequantize", codes, *own, block=(1, 1), bits=bits)
