"""`acc.*`: what an accelerator has as one kernel. Each replaces ops of stage moe and gives their numbers.

Weights are typed as they are stored: bf16, f32, or a quantized format, which stands for its numbers in f32 (the
variable W). Activations are f32 here; a kernel computes in f32 and hands bf16 on, which kernels.json states. Those
that acc.quantize rounds are typed in its format (the variable X): the matrix unit multiplies their codes.
"""

from __future__ import annotations

from ...compiler.formats.table import find_format, format_of
from ...compiler.ir.activation import IDENTITY, SILU, Activation
from ...compiler.ir.deferred import torch
from ...compiler.ir.dims import Size, size
from ...compiler.ir.types import TensorType
from ...compiler.ops import OPS, op
from ...compiler.ops.activation import apply_activation, inner_size
from ...compiler.ops.compressed import block_linear as plain_block_linear
from ...compiler.ops.define import Attributes, Types, inference_error
from ...compiler.ops.nn import rms_norm as plain_rms_norm
from ...compiler.ops.recurrent import causal_conv, conv_window
from ...compiler.ops.recurrent import linear_attention as plain_linear_attention
from .kernels.choices import TILE_ROWS
from .kernels.pairs import list_tiles, pairs_by_expert

PLAIN = ("bf16", "f32")


def check_weight(name: str, weight: TensorType) -> None:
    """Raise MoecError for a weight of a dtype that kernels do not store."""
    if weight.dtype not in PLAIN and find_format(weight.dtype) is None:
        raise inference_error(f"{name}: weights are {', '.join(PLAIN)} or in a quantized format, not {weight}")


def _dtype_of_numbers(x: TensorType) -> str:
    """Return the dtype of the numbers that a value in a quantized format, or a plain one, represents."""
    return "f32" if find_format(x.dtype) else x.dtype


# --- activations in a format -----------------------------------------------------------------------------------


def _handed_in(attributes: Attributes, x: TensorType) -> str:
    """Return the dtype of a result: the format that the attribute `to` names, else that of the operand's numbers."""
    return attributes["to"] if find_format(attributes["to"]) else _dtype_of_numbers(x)


def _infer_quantize(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    (x,) = types
    if find_format(attributes["to"]) is None:
        raise inference_error(f"acc.quantize: {attributes['to']} is no quantized format")
    return (TensorType(attributes["to"], x.shape),)


@op("acc.quantize", "x: f32[*X, K] -> y: Y[*X, K]", infer=_infer_quantize, flops=lambda o, r, a: 4 * r[0].elements)
def quantize(x, *, to: str):
    """Round activations to a quantized format, each group of a row under a scale of its own.

    Where a format has a scale for a matrix too, each row is one. The result represents its numbers in f32, as a weight in
    a format does; kernels hand on codes and scales.
    """
    found, width = format_of(to), x.shape[-1]
    if not found.tensor_scale:
        return found.decode(found.encode(x), width)
    rows = [found.decode(found.encode(row), width) for row in x.reshape(-1, 1, width)]
    return torch.cat([x.new_zeros(0, width), *rows]).reshape(x.shape)


def _infer_norm(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, residual, *_ = types
    nothing = TensorType.of(x.dtype, 0)
    rounded = TensorType(_handed_in(attributes, x), x.shape)
    return x if attributes["plain"] else nothing, rounded, nothing if residual is None else x


@op(
    "acc.norm",
    "x: A[*X, D], residual: A[*X, D]?, w: A[D]?, b: A[D]? -> y: A[*Y], rounded: Q[*X, D], sum: A[*Z]",
    infer=_infer_norm,
    flops=lambda o, r, a: (4 + 4 + 3 * a["centred"] + (o[1] is not None)) * o[0].elements,
)
def norm(x, residual, w, b, *, eps: float, to: str = "", plain: bool = True, centred: bool = False):
    """Compute nn.rms_norm, nn.layer_norm (`centred`) or the former of a sum, and round what it gives as acc.quantize does.

    `y` has the numbers before they are rounded where `plain` says that something reads them, and is empty elsewhere;
    so is `sum` where there is no residual.
    """
    total = x if residual is None else x + residual
    y = (
        OPS["nn.layer_norm"].reference(total, w, b, eps=eps)
        if centred
        else plain_rms_norm(total, 1 if w is None else w, eps=eps)
    )
    return (
        y if plain else y.new_zeros(0),
        quantize(y, to=to) if to else y,
        total.new_zeros(0) if residual is None else total,
    )


# --- linear ----------------------------------------------------------------------------------------------------


def _infer_linear(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, w = types[:2]
    check_weight("acc.linear", w)
    return (TensorType(_dtype_of_numbers(x), (*x.shape[:-1], w.shape[0])),)


@op(
    "acc.linear",
    "x: X[*X, K], w: W[N, K], bias: A[N]? -> y: A[*X, N]",
    infer=_infer_linear,
    flops=lambda o, r, a: 2 * r[0].elements * o[0].shape[-1],
)
def linear(x, w, bias, *, out: str = "bf16"):
    """Multiply by a stored weight [out, in]: x wᵀ + bias. `out` is the dtype that the kernel hands the result on in."""
    return torch.nn.functional.linear(x, w.float(), bias)


def _block_linear(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, w = types
    check_weight("acc.block_linear", w)
    return OPS["nn.block_linear"].infer((x, TensorType(x.dtype, w.shape)), {})


@op(
    "acc.block_linear",
    "x: A[B, S, G, K], w: W[N, K] -> y: A[B, S, N]",
    infer=_block_linear,
    flops=lambda o, r, a: 2 * r[0].elements * o[1].shape[1],
)
def block_linear(x, w):
    """Multiply each of G parts of the input by its own N / G rows of the stored weight, as nn.block_linear does."""
    return plain_block_linear(x, w.float())


def _gated_up(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, up = types[:2]
    check_weight("acc.gated_up", up)
    inner = inner_size("acc.gated_up", up.shape[0], attributes["act"], gated=True)
    return (TensorType(_handed_in(attributes, x), (*x.shape[:-1], inner)),)


@op(
    "acc.gated_up",
    "x: X[*X, D], up: W[N, D], bias: A[N]? -> h: H[*X, I]",
    infer=_gated_up,
    flops=lambda o, r, a: r[0].elements * (4 * o[1].shape[1] + 4),
)
def gated_up(x, up, bias, *, act: Activation = SILU, to: str = ""):
    """Compute the gated activation of up(x): the first part of nn.gated_mlp, I = N / 2; rounded to a format if `to` is one."""
    h = apply_activation(torch.nn.functional.linear(x, up.float(), bias), act)
    return quantize(h, to=to) if to else h


# --- routed experts --------------------------------------------------------------------------------------------


@op(
    "acc.sort",
    f"ids: i64[T, K] -> order: i64[K*T], tiles: i64[{len(TILE_ROWS)}, 3, K*T]",
    flops=0,
    domains={"ids": lambda types, attributes: attributes["experts"]},
)
def sort(ids, *, experts: int):
    """List the pairs (token, choice), numbered token * K + choice, by expert, and the tiles that each expert's pairs make.

    `order` has the pairs of an expert in rising order. `tiles[l, :, i]` are tile i's expert, the place of its first pair
    in `order` and the end of that expert's pairs, for tiles of TILE_ROWS[l] pairs; the expert is `experts` where there
    is no tile i. Tiles of an expert count from place // rows + expert on, or with few pairs from the place itself.
    """
    flat = ids.flatten()
    counts = torch.bincount(flat, minlength=experts)
    return flat.argsort(stable=True), torch.stack([list_tiles(counts.tolist(), rows) for rows in TILE_ROWS])


def _check_order(name: str, ids: TensorType, order: TensorType, weight: TensorType) -> None:
    check_weight(name, weight)
    if order.shape[0] != size(ids.elements):
        raise inference_error(f"{name}: {order} does not order the {ids.elements} choices of {ids}")


def _grouped_up(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, ids, order, _, up = types[:5]
    _check_order("acc.grouped_up", ids, order, up)
    return (
        TensorType(
            _handed_in(attributes, x), (order.shape[0], inner_size("acc.grouped_up", up.shape[1], attributes["act"]))
        ),
    )


def _grouped_up_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    ids, up = operands[1], operands[4]
    return ids.elements * (2 * up.shape[1] * up.shape[2] + 4 * results[0].shape[1])


_PAIRS = f"ids: i64[T, K], order: i64[R], tiles: i64[{len(TILE_ROWS)}, 3, R]"
_ROWS = {"ids": lambda types, attributes: types[4].shape[0]}
_ORDER = {
    "order": lambda types, attributes: types[1].elements,
    "tiles": lambda types, attributes: types[1].elements,
}


def _chosen_pairs(types: Types, attributes: Attributes) -> Size:
    return types[1].elements


def _listed(types: Types, attributes: Attributes) -> Size:
    """Return the numbers that are read of the lists of tiles: three for each tile, of which there are no more than pairs."""
    return 3 * types[1].elements


@op(
    "acc.grouped_up",
    f"x: X[T, D], {_PAIRS}, up: W[E, N, D], up_bias: A[E, N]? -> h: H[R, I]",
    infer=_grouped_up,
    flops=_grouped_up_flops,
    domains={**_ROWS, **_ORDER},
    distinct=("ids", "order"),
    reads={"tiles": _listed},
    rows=dict.fromkeys(("up", "up_bias"), _chosen_pairs),
)
def grouped_up(x, ids, order, tiles, up, up_bias, *, act: Activation = SILU, to: str = ""):
    """Gather each expert's tokens, multiply by its `up` and apply the activation: the first half of moe.experts.

    Row t * K + j of the result is the pair (token t, choice j); I = N / 2 where there is a gate, else N. `order` and
    `tiles` are acc.sort's and say the same as `ids`: a kernel for many pairs reads those, one for few pairs these. The
    rows are rounded to a format if `to` is one.
    """
    h = x.new_zeros(len(order), up.shape[1] // 2 if act.gated else up.shape[1])
    for expert, pairs in pairs_by_expert(ids):
        y = torch.nn.functional.linear(x[pairs // ids.shape[1]], up[expert].float(), _expert_bias(up_bias, expert))
        h[pairs] = apply_activation(y, act)
    return quantize(h, to=to) if to else h


def _grouped_down(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    h, ids, order, _, _, down = types[:6]
    _check_order("acc.grouped_down", ids, order, down)
    return (TensorType(_dtype_of_numbers(h), (ids.shape[0], down.shape[1])),)


@op(
    "acc.grouped_down",
    f"h: X[R, I], {_PAIRS}, gates: A[T, K], down: W[E, D, I], down_bias: A[E, D]?, residual: A[T, D]?, shared: A[T, D]?"
    " -> y: A[T, D]",
    infer=_grouped_down,
    flops=lambda o, r, a: (
        2 * o[1].elements * o[5].shape[1] * o[5].shape[2] + r[0].elements * sum(x is not None for x in o[7:])
    ),
    domains={"ids": lambda types, attributes: types[5].shape[0], **_ORDER},
    distinct=("ids", "order"),
    reads={"tiles": _listed},
    rows=dict.fromkeys(("down", "down_bias"), _chosen_pairs),
)
def grouped_down(h, ids, order, tiles, gates, down, down_bias, residual, shared):
    """Multiply each pair's row by its expert's `down`, weight it, and add up each token: the second half of moe.experts.

    `residual` and `shared` are added to the sums, as the block's input is and what its shared experts give.
    """
    rows = h.new_zeros(len(order), down.shape[1])
    for expert, pairs in pairs_by_expert(ids):
        rows[pairs] = torch.nn.functional.linear(h[pairs], down[expert].float(), _expert_bias(down_bias, expert))
    y = (rows.unflatten(0, tuple(ids.shape)) * gates[:, :, None]).sum(1)
    return sum((x for x in (shared, residual) if x is not None), y)


def _expert_bias(bias: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if bias is None else bias[expert]


# --- recurrent layers ------------------------------------------------------------------------------------------


def _window_conv(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, past, taps = types[:3]
    if past.shape[1] != x.shape[2] or taps.shape[1] > past.shape[2] + 1:
        raise inference_error(f"acc.window_conv: the state {past} and {taps} do not fit {x}")
    return x.plain, TensorType(past.dtype, past.shape, state=True)


@op(
    "acc.window_conv",
    "x: A[B, S, C], past: state A[B, C, K], taps: A[C, J], b: A[C]? -> y: A[B, S, C], present: state A[B, C, K]",
    infer=_window_conv,
    flops=lambda o, r, a: 2 * r[0].elements * o[2].shape[1],
)
def window_conv(x, past, taps, b, *, act: Activation = IDENTITY):
    """Convolve each channel over its last J tokens, with those of the state before x, and apply the activation.

    nn.conv_window, nn.causal_conv and the activation in one, for tokens in front of channels.
    """
    whole, present = conv_window(past, x.transpose(1, 2))
    y = causal_conv(whole, taps, b)[:, :, past.shape[2] :].transpose(1, 2)
    return apply_activation(y, act), present


def _linear_attention(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    q, k, v, decay, rate, _, past = types
    batch, _, groups, width = k.shape
    heads = v.shape[2]
    if heads % groups or q.shape != k.shape or past.shape != (batch, heads, width, v.shape[3]):
        raise inference_error(f"acc.linear_attention: {q}, {k} and {v} do not fit the state {past}")
    if rate is not None and (decay is None or rate.shape != (heads, width)):
        raise inference_error(f"acc.linear_attention: there is no decay that {rate} multiplies")
    return v.plain, TensorType(past.dtype, past.shape, state=True)


@op(
    "acc.linear_attention",
    "q: A[B, S, F, K], k: A[B, S, F, K], v: A[B, S, H, V], decay: A[B, S, H, G]?, rate: A[H, K]?, beta: A[B, S, H]?,"
    " past: state A[B, H, K, V] -> y: A[B, S, H, V], present: state A[B, H, K, V]",
    infer=_linear_attention,
    flops=lambda o, r, a: (8 if o[5] else 5) * r[0].elements * o[1].shape[3],
)
def linear_attention(q, k, v, decay, rate, beta, past, *, scale: float = 1.0):
    """Update a state with each token and read it, as nn.linear_attention does; H / F heads share a head of q and k.

    `rate` is multiplied by the decay: of a selective state space (Gu and Dao 2023), whose decay is a step times a rate.
    """
    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], dim=2) for t in (q, k))
    return plain_linear_attention(q, k, v, decay if rate is None else decay * rate, beta, past, scale=scale)
