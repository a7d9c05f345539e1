"""`ort.*` ops on quantized weights. Their weights come in parts: codes, scales, zero points (see formats/format.py).

Integers of `bits` bits in groups along the last axis; without zero points half of the range is subtracted. `accuracy` is
ONNX Runtime's accuracy_level: at 4 activations are rounded to int8 for each group, at 0 they stay f32.
"""

from __future__ import annotations

from typing import Any

from ...compiler.formats.table import format_of, integers_of
from ...compiler.ir.activation import SILU, Activation
from ...compiler.ir.deferred import torch
from ...compiler.ir.dims import Size, size
from ...compiler.ir.types import TensorType
from ...compiler.ops import OPS, op
from ...compiler.ops.compressed import block_linear
from ...compiler.ops.define import Attributes, Types, inference_error
from ...compiler.ops.moe import experts
from .ops import INTERLEAVED


def dequantize_parts(codes: Any, scales: Any, zeros: Any, bits: int, group: int, format: str = "") -> torch.Tensor:
    """Return the numbers f32[..., K] of the parts of integers, or of a format by its name."""
    found = format_of(format) if format else integers_of(bits, group, zeros is not None)
    parts = {"codes": codes, "scales": scales, **({"zeros": zeros} if zeros is not None else {})}
    return found.decode(parts, codes.shape[-1] * 8 // bits)


def _checked_width(
    name: str, codes: TensorType, scales: TensorType, zeros: TensorType | None, attributes: Attributes
) -> Size:
    """Return K of a weight in parts; the parts must fit each other."""
    bits, group = attributes["bits"], attributes["group"]
    width = codes.shape[-1] * 8 / bits
    groups = width / group
    wanted = (*codes.shape[:-1], groups)
    if scales.shape != wanted:
        raise inference_error(
            f"{name}: the scales of {codes} with {bits} bits in groups of {group} are f32{list(wanted)}, not {scales}"
        )
    packed = (*codes.shape[:-1], -((-groups * bits) // 8))
    if zeros is not None and zeros.shape != packed:
        raise inference_error(f"{name}: the zero points of {codes} are u8{list(packed)}, not {zeros}")
    return width


def _infer_decode(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    codes, scales = types
    format = format_of(attributes["format"])
    if scales.dtype != format.part("scales", 1, format.group)[0]:
        raise inference_error(f"ort.decode: scales of {format.name} are not {scales}")
    width = _checked_width("ort.decode", codes, scales, None, {"bits": format.bits, "group": format.group})
    return (TensorType("f32", (*codes.shape[:-1], width)),)


@op(
    "ort.decode",
    "codes: u8[*X, C], scales: A[*X, G] -> y: f32[*X, K]",
    infer=_infer_decode,
    flops=lambda o, r, a: r[0].elements,
)
def decode(codes, scales, *, format: str):
    """Return the numbers that codes stand for, in a format that no operator reads."""
    return dequantize_parts(codes, scales, None, format_of(format).bits, format_of(format).group, format)


# --- weights in a grid, by moec's own kernels ---------------------------------------------------------------------


def _infer_grid_linear(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, *weight = types
    (numbers,) = _infer_decode(tuple(weight), attributes)
    return OPS["core.linear"].infer((x, numbers, None), {})


@op(
    "ort.grid_linear",
    "x: f32[*X, K], codes: u8[N, C], scales: A[N, G] -> y: f32[*X, N]",
    infer=_infer_grid_linear,
    flops=lambda o, r, a: 2 * r[0].elements * o[0].shape[-1],
)
def grid_linear(x, codes, scales, *, format: str):
    """Multiply by a weight stored [out, in] in a grid, by moec's own kernel: x wᵀ. It rounds activations to int8."""
    return torch.nn.functional.linear(x, decode(codes, scales, format=format))


def _infer_grid_experts(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, ids, gates, *weights = types
    numbers = (_infer_decode(tuple(weights[i : i + 2]), {"format": attributes["format"]})[0] for i in (0, 2))
    return OPS["moe.experts"].infer((x, ids, gates, *numbers, None, None), {"act": attributes["act"]})


def _grid_experts_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    x, ids, gates, *weights = operands
    numbers = (_infer_decode(tuple(weights[i : i + 2]), {"format": attributes["format"]})[0] for i in (0, 2))
    return OPS["moe.experts"].flops((x, ids, gates, *numbers, None, None), results, {"act": attributes["act"]})


_GRID_PARTS = ("up_codes", "up_scales", "down_codes", "down_scales")


@op(
    "ort.grid_experts",
    "x: f32[T, D], ids: i64[T, K], gates: f32[T, K], up_codes: u8[E, N, C], up_scales: A[E, N, G],"
    " down_codes: u8[E, D, H], down_scales: A[E, D, J] -> y: f32[T, D]",
    infer=_infer_grid_experts,
    flops=_grid_experts_flops,
    domains={"ids": lambda types, attributes: types[3].shape[0]},
    rows=dict.fromkeys(_GRID_PARTS, lambda types, attributes: types[1].elements),
)
def grid_experts(
    x, ids, gates, up_codes, up_scales, down_codes, down_scales, *, format: str, act: Activation = INTERLEAVED
):
    """Compute moe.experts on weights in a grid, by moec's own kernel, which rounds activations to int8."""
    up, down = decode(up_codes, up_scales, format=format), decode(down_codes, down_scales, format=format)
    return experts(x, ids, gates, up, down, None, None, act=act)


# --- linear, embedding -----------------------------------------------------------------------------------------


def _infer_matmul_nbits(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, codes, scales, zeros, _ = types
    if _checked_width("ort.matmul_nbits", codes, scales, zeros, attributes) != x.shape[-1]:
        raise inference_error(f"ort.matmul_nbits: {codes} does not fit {x}")
    return (TensorType("f32", (*x.shape[:-1], codes.shape[0])),)


@op(
    "ort.matmul_nbits",
    "x: f32[*X, K], codes: u8[N, C], scales: f32[N, G], zeros: u8[N, Z]?, b: f32[N]? -> y: f32[*X, N]",
    infer=_infer_matmul_nbits,
    flops=lambda o, r, a: 2 * r[0].elements * o[0].shape[-1],
)
def matmul_nbits(x, codes, scales, zeros, b, *, bits: int, group: int, accuracy: int = 0):
    """Multiply by a quantized weight stored [out, in]: x wᵀ + b."""
    return torch.nn.functional.linear(x, dequantize_parts(codes, scales, zeros, bits, group), b)


def _block_matmul(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, codes, scales, zeros = types
    width = _checked_width("ort.block_matmul_nbits", codes, scales, zeros, attributes)
    return OPS["nn.block_linear"].infer([x, TensorType("f32", (codes.shape[0], width))], {})


@op(
    "ort.block_matmul_nbits",
    "x: f32[B, S, G, K], codes: u8[N, C], scales: f32[N, R], zeros: u8[N, Z]? -> y: f32[B, S, N]",
    infer=_block_matmul,
    flops=lambda o, r, a: 2 * r[0].elements * o[0].shape[-1],
)
def block_matmul_nbits(x, codes, scales, zeros, *, bits: int, group: int, accuracy: int = 0):
    """Multiply each part of the input by its own rows of a quantized weight, as nn.block_linear does."""
    return block_linear(x, dequantize_parts(codes, scales, zeros, bits, group))


def _infer_gather_nbits(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    ids, codes, scales, zeros = types
    return (TensorType("f32", (*ids.shape, _checked_width("ort.gather_nbits", codes, scales, zeros, attributes))),)


@op(
    "ort.gather_nbits",
    "ids: i64[*X], codes: u8[V, C], scales: f32[V, G], zeros: u8[V, Z]? -> y: f32[*X, D]",
    infer=_infer_gather_nbits,
    flops=0,
    domains={"ids": lambda types, attributes: types[1].shape[0]},
    rows=dict.fromkeys(("codes", "scales", "zeros"), lambda types, attributes: types[0].elements),
)
def gather_nbits(ids, codes, scales, zeros, *, bits: int, group: int):
    """Look up rows of a quantized table."""
    return dequantize_parts(codes[ids], scales[ids], None if zeros is None else zeros[ids], bits, group)


# --- routed experts --------------------------------------------------------------------------------------------

_EXPERT_PARTS = (
    "up_codes: u8[E, N, C], up_scales: f32[E, N, G], up_zeros: u8[E, N, Z]?, up_bias: f32[E, N]?,"
    " down_codes: u8[E, D, H], down_scales: f32[E, D, J], down_zeros: u8[E, D, Y]?, down_bias: f32[E, D]?"
)
_PART_NAMES = tuple(part.split(":")[0].strip() for part in _EXPERT_PARTS.split(", ") if ":" in part)


def _weight_types(parts: Types, attributes: Attributes) -> tuple[TensorType, TensorType]:
    """Return the types of the two matrices that the parts encode."""
    up, up_scales, up_zeros, _, down, down_scales, down_zeros, _ = parts
    both = [(up, up_scales, up_zeros), (down, down_scales, down_zeros)]
    found = [TensorType("f32", (*c.shape[:-1], _checked_width("ort.qmoe", c, s, z, attributes))) for c, s, z in both]
    return found[0], found[1]


def _infer_qmoe(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, choice, _mixing, *parts = types
    up, down = _weight_types(parts, attributes)
    chosen = TensorType("i64", (choice.shape[0], size(attributes["k"])))
    return OPS["ort.moe"].infer(
        (x, chosen, TensorType("f32", chosen.shape), up, down, None, None), {"act": attributes["act"]}
    )


def _qmoe_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    x, _, _, *parts = operands
    up, down = _weight_types(parts, attributes)
    chosen = TensorType("i64", (x.shape[0], size(attributes["k"])))
    given = (x, chosen, TensorType("f32", chosen.shape), up, down, None, None)
    return OPS["moe.experts"].flops(given, results, {"act": attributes["act"]})


@op(
    "ort.qmoe",
    f"x: f32[T, D], choice: f32[T, E], mixing: f32[T, E]?, {_EXPERT_PARTS} -> y: f32[T, D]",
    infer=_infer_qmoe,
    flops=_qmoe_flops,
    rows=dict.fromkeys(_PART_NAMES, lambda types, attributes: types[0].shape[0] * attributes["k"]),
)
def qmoe(
    x, choice, mixing, up_codes, up_scales, up_zeros, up_bias, down_codes, down_scales, down_zeros, down_bias, *,
    k: int, bits: int, group: int, accuracy: int = 0,
    act: Activation = INTERLEAVED,
):  # fmt: skip
    """Send each token through the k experts with the largest `choice` and add the results, weighted.

    The weights are those of `mixing` at the chosen experts (an expert whose weight is 0 is left out), or without it
    the softmax of their `choice`. Gate and up rows are interleaved; for the formula of an expert see moe.experts.
    """
    top, ids = torch.topk(choice, k, dim=-1)
    gates = torch.softmax(top, -1) if mixing is None else torch.gather(mixing, 1, ids)
    up = dequantize_parts(up_codes, up_scales, up_zeros, bits, group)
    down = dequantize_parts(down_codes, down_scales, down_zeros, bits, group)
    return experts(x, ids, gates, up, down, up_bias, down_bias, act=act)


def _experts_nbits(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, ids, gates, *parts = types
    up, down = _weight_types(parts, attributes)
    return OPS["moe.experts"].infer((x, ids, gates, up, down, None, None), {"act": attributes["act"]})


def _experts_nbits_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    x, ids, gates, *parts = operands
    up, down = _weight_types(parts, attributes)
    return OPS["moe.experts"].flops((x, ids, gates, up, down, None, None), results, {"act": attributes["act"]})


@op(
    "ort.experts_nbits",
    f"x: f32[T, D], ids: i64[T, K], gates: f32[T, K], {_EXPERT_PARTS.replace('scales: f32', 'scales: A')} -> y: f32[T, D]",
    infer=_experts_nbits,
    flops=_experts_nbits_flops,
    domains={"ids": lambda types, attributes: types[3].shape[0]},
    distinct=("ids",),
    rows=dict.fromkeys(_PART_NAMES, lambda types, attributes: types[1].elements),
)
def experts_nbits(
    x, ids, gates, up_codes, up_scales, up_zeros, up_bias, down_codes, down_scales, down_zeros, down_bias, *,
    bits: int, group: int, format: str = "", act: Activation = SILU,
):  # fmt: skip
    """Compute moe.experts on quantized weights with f32 activations, one expert after the other: right for any routing.

    `format` names one whose weights are no integers.
    """
    up = dequantize_parts(up_codes, up_scales, up_zeros, bits, group, format)
    down = dequantize_parts(down_codes, down_scales, down_zeros, bits, group, format)
    return experts(x, ids, gates, up, down, up_bias, down_bias, act=act)
