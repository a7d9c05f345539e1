"""`nn.hyper_connection_*`: several residual streams instead of one, mixed by weights computed from the streams themselves.

Manifold-constrained hyper-connections (mHC, Xie et al. 2026), as DeepSeek-V4 has them.
"""

from __future__ import annotations

from ..ir.deferred import torch
from ..ir.dims import Size
from ..ir.types import TensorType
from .define import Attributes, Types, inference_error, op


def _infer_hyper_connection_pre(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, w = types[:2]
    batch, new, streams, width = x.shape
    if w.shape != ((streams + 2) * streams, streams * width):
        raise inference_error(
            f"nn.hyper_connection_pre: {w} is not [{(streams + 2) * streams}, {streams * width}] for {x}"
        )
    if attributes["iterations"] < 1:
        raise inference_error(f"nn.hyper_connection_pre: iterations={attributes['iterations']}, one is the least")
    shapes = ((batch, new, width), (batch, new, streams), (batch, new, streams, streams))
    return tuple(TensorType(x.dtype, shape) for shape in shapes)


def _pre_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    x, w = operands[:2]
    _, post, mix = results
    tokens = x.elements / (x.shape[2] * x.shape[3])
    return 2 * tokens * w.elements + 4 * x.elements + 8 * post.elements + 4 * attributes["iterations"] * mix.elements


@op(
    "nn.hyper_connection_pre",
    "x: A[B, S, N, D], w: A[M, F], base: A[M], scale: A[3] -> y: A[B, S, D], post: A[B, S, N], mix: A[B, S, N, N]",
    infer=_infer_hyper_connection_pre,
    flops=_pre_flops,
)
def hyper_connection_pre(x, w, base, scale, *, eps: float, floor: float, iterations: int):
    """Put N streams together as the input of a sublayer, and say how its output goes back into them.

    z = w rms(x) with x flat and rms without a weight; its parts are pre [N], post [N] and mix [N, N], each times its
    `scale` plus its part of `base`. pre = sigmoid + floor, post = 2 sigmoid, mix = softmax over rows + floor, made
    doubly stochastic (Sinkhorn and Knopp 1967): columns divided by their sums, then `iterations` - 1 times rows and
    columns, each sum + floor. y = sum_n pre[n] x[n]. nn.hyper_connection_post takes post and mix.
    """
    streams = x.shape[2]
    z = torch.nn.functional.linear(_rms_normalize(x.flatten(2), eps), w)
    pre, post, mix = z.split([streams, streams, streams * streams], dim=-1)
    pre_base, post_base, mix_base = base.split([streams, streams, streams * streams])
    pre = torch.sigmoid(pre * scale[0] + pre_base) + floor
    post = 2 * torch.sigmoid(post * scale[1] + post_base)
    mix = torch.softmax((mix * scale[2] + mix_base).unflatten(-1, (streams, streams)), dim=-1) + floor
    mix = mix / (mix.sum(-2, keepdim=True) + floor)
    for _ in range(iterations - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + floor)
        mix = mix / (mix.sum(-2, keepdim=True) + floor)
    return (pre.unsqueeze(-1) * x).sum(2), post, mix


def _rms_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@op(
    "nn.hyper_connection_post",
    "x: A[B, S, D], streams: A[B, S, N, D], post: A[B, S, N], mix: A[B, S, N, N] -> y: A[B, S, N, D]",
    flops=lambda o, r, a: 2 * (o[1].shape[2] + 1) * r[0].elements,
)
def hyper_connection_post(x, streams, post, mix):
    """Give a sublayer's output x to N streams and mix the streams: y[n] = post[n] x + sum_m mix[m, n] streams[m]."""
    return post.unsqueeze(-1) * x.unsqueeze(2) + torch.matmul(mix.transpose(2, 3), streams)


@op(
    "nn.hyper_connection_head",
    "x: A[B, S, N, D], w: A[N, N*D], base: A[N], scale: A[1] -> y: A[B, S, D]",
    flops=lambda o, r, a: 2 * o[1].shape[0] * o[0].elements + 6 * o[0].elements,
)
def hyper_connection_head(x, w, base, scale, *, eps: float, floor: float):
    """Merge the N streams after the last layer: y = sum_n (sigmoid(scale z + base) + floor)[n] x[n].

    z = w rms(x) as in nn.hyper_connection_pre.
    """
    z = torch.nn.functional.linear(_rms_normalize(x.flatten(2), eps), w)
    return ((torch.sigmoid(z * scale + base) + floor).unsqueeze(-1) * x).sum(2)
