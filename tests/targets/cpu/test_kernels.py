"""Every op of the core, nn, moe and ort dialects, run by ONNX Runtime and compared with its torch reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from moec.compiler.check.interpret import interpret, random_inputs
from moec.compiler.ir.activation import Activation
from moec.compiler.ir.dims import dim, floordiv, size
from moec.compiler.ir.module import Dim, Function, Module, Op, Value
from moec.compiler.ir.types import TensorType, make_attrs
from moec.compiler.ops import OPS
from moec.compiler.ops.compressed import pending_tokens
from moec.compiler.weights.sources.source import RandomSource
from moec.targets.cpu.lower.module import lower_module
from moec.targets.cpu.onnx.emit import KERNELS, emit_model
from onnx_session import open_session

B, S, P = dim("B"), dim("S"), dim("P")
DIMS = (Dim("B", 1, 1024), Dim("S", 1, 131072), Dim("P", 0, 131072))
SIZES = [{"B": 2, "S": 3, "P": 5}, {"B": 1, "S": 1, "P": 4}, {"B": 3, "S": 4, "P": 0}, {"B": 1, "S": 1, "P": 0}]
INF = float("inf")

# these make B, S and P known to a program whose op does not; P follows from P + S, as in a real program
SIZE_INPUTS = (Value("sizes.new", TensorType.of("i64", B, S)), Value("sizes.all", TensorType.of("i64", B, P + S)))

# the cases of these are in test_quantized_kernels.py
QUANTIZED = {
    "ort.matmul_nbits",
    "ort.block_matmul_nbits",
    "ort.gather_nbits",
    "ort.qmoe",
    "ort.experts_nbits",
    "ort.decode",
    "ort.grid_linear",
    "ort.grid_experts",
}
LOWERED = {"nn.cached_attention", "nn.gated_mlp"}  # what ONNX Runtime runs as several ops

Fix = Callable[[list[torch.Tensor], dict[str, int]], None]


@dataclass(frozen=True)
class Case:
    """One use of an op: operand types, attributes, and what to change in the random inputs."""

    operands: tuple[TensorType | None, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    fix: Fix | None = None


def f32(*shape: Any, state: bool = False) -> TensorType:
    return TensorType.of("f32", *shape, state=state)


def i64(*shape: Any) -> TensorType:
    return TensorType.of("i64", *shape)


def truth(*shape: Any) -> TensorType:
    return TensorType.of("bool", *shape)


def case(*operands: TensorType | None, fix: Fix | None = None, **attrs: Any) -> Case:
    return Case(operands, attrs, fix)


def positive(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
    inputs[:] = [x.abs() + 0.1 for x in inputs]


def nonzero(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
    inputs[1] = inputs[1].abs() + 0.5


def double_angles(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
    inputs[1:3] = [torch.cat((x[..., : x.shape[-1] // 2],) * 2, -1) for x in inputs[1:3]]


def pad(index: int) -> Fix:
    """Pad row b of the mask at `index` on the left, but for the last row all of it, so that some tokens see nothing."""

    def fix(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
        total = inputs[index].shape[1]
        inputs[index] = torch.ones_like(inputs[index])
        for row in range(dims["B"] - 1):
            inputs[index][row, : min(total, 2 * row + 2)] = 0

    return fix


def bias(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
    total = inputs[7].shape[3]
    hidden = (torch.arange(total)[None] < torch.arange(dims["B"])[:, None] * 2)[:, None, None, :]
    inputs[7] = torch.zeros_like(inputs[7]).masked_fill(hidden, -INF)


def small(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
    inputs[:] = [None if x is None else x * 0.4 for x in inputs]  # type: ignore[misc]


def any_order(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
    inputs[2] = torch.randperm(inputs[2].shape[0], generator=torch.Generator().manual_seed(3))


def attended(mask: bool, angles: bool) -> Fix:
    """Give each angle twice and pad rows of the mask, for the operands of nn.cached_attention."""

    def fix(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
        if angles:
            inputs[5:7] = [torch.cat((x[..., : x.shape[-1] // 2],) * 2, -1) for x in inputs[5:7]]
        if mask:
            (pad(9) if len(inputs) == 11 else bias)(inputs, dims)

    return fix


def dispatched(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
    """Make offsets of rows by expert: they rise from 0 to the number of rows."""
    rows, experts = inputs[0].shape[0], inputs[1].shape[0]
    ids = torch.randint(0, experts, (rows,), generator=torch.Generator().manual_seed(rows))
    inputs[2] = torch.cat((torch.zeros(1, dtype=torch.int64), torch.bincount(ids, minlength=experts).cumsum(0)))


def routing(all_on_one: bool = False, zeros: bool = False, signed: bool = False, total: float = 0.0) -> Fix:
    def fix(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
        inputs[0] = inputs[0] * 0.5
        if total:
            inputs[2] = inputs[2].softmax(1) * total
        if all_on_one:
            inputs[1] = torch.arange(inputs[1].shape[1]).expand_as(inputs[1]).contiguous()
        if not signed:
            inputs[2] = inputs[2].abs()
        if zeros:
            inputs[2][:, 0] = 0
            inputs[2][0] = 0
        inputs[3:] = [None if x is None else x * 0.4 for x in inputs[3:]]

    return fix


X, ROW, ONE = f32(B, S, 8), f32(8), f32(B, 1, 8)
UNARY = ("neg", "exp", "sin", "cos", "tanh", "sigmoid", "silu", "relu", "softplus", "abs", "floor", "erf")


def linear_attention(decay: int | None = 1, beta: bool = False, **attributes: Any) -> Case:
    """Return nn.linear_attention with `decay` numbers a head; they are logarithms of factors below 1."""

    def fix(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
        inputs[1] = inputs[1] * 0.4
        if decay is not None:
            inputs[3] = -inputs[3].abs()

    heads = f32(B, S, 3, 4)
    operands = [heads, heads, f32(B, S, 3, 5), None if decay is None else f32(B, S, 3, decay)]
    return case(*operands, f32(B, S, 3) if beta else None, f32(B, 3, 4, 5, state=True), fix=fix, **attributes)


def sparse_attention() -> Case:
    """Return nn.attention with a mask for each new token, one of which reads nothing."""

    def fix(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
        mask = inputs[3]
        inputs[3] = (torch.arange(mask.numel()).reshape(mask.shape) % 3 > 0).long()
        inputs[3][0, 0] = 0

    slots = P + S
    operands = [f32(B, 4, S, 8), f32(B, 2, slots, 8), f32(B, 2, slots, 8), i64(B, S, slots), None]
    return case(*operands, fix=fix, scale=0.3)


def attention(
    heads: int, groups: int, width: int, out: int, mask: bool = True, sinks: bool = False, **attrs: Any
) -> Case:
    types = [f32(B, heads, S, width), f32(B, groups, P + S, width), f32(B, groups, P + S, out)]
    types += [i64(B, P + S) if mask else None, f32(heads) if sinks else None]
    return case(*types, fix=pad(3) if mask else None, scale=0.3, **attrs)


def cached(
    heads: int, groups: int, width: int, *, packed: bool = True, masked: bool = True, sinks: bool = False,
    turned: int = 0, shared: bool = False, normed: bool | None = None, **attrs: Any,
) -> Case:  # fmt: skip
    """Operands of nn.cached_attention, or with `normed=None` of ort.group_query_attention."""
    states = [f32(B, groups, P, width, state=True)] * 2
    rows = [heads + 2 * groups, None, None] if packed else [heads, groups, groups]
    types = [n and f32(B, S, n * width) for n in rows] + states  # type: ignore[operator]
    types += [f32(1 if shared else B, S, turned)] * 2 if turned else [None, None]
    if normed is None:
        types += [f32(B, 1, S, P + S) if masked else None]
    else:
        types += [f32(width) if normed else None] * 2 + [i64(B, P + S) if masked else None]
        attrs |= {"eps": 1e-5} if normed else {}
    types += [f32(heads) if sinks else None]
    return case(*types, fix=attended(masked, turned > 0), heads=heads, scale=0.3, **attrs)


def stored(dtype: str, *args: int, **attrs: Any) -> Case:
    """Operands of ort.stored_attention without angles, which may round to the other side; scales are small and above 0."""
    plain = cached(*args, **attrs)
    past = plain.operands[3]
    cache = TensorType(dtype, past.shape, state=True)
    scale = f32(*past.shape[:3], state=True) if dtype == "i8" else None
    types = (*plain.operands[:3], cache, cache, scale, scale, *plain.operands[5:])

    def fix(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
        others = [*inputs[:5], *inputs[7:]]
        plain.fix(others, dims)
        inputs[7:] = others[5:]
        if dtype == "i8":
            inputs[5:7] = [x.abs() * 0.02 + 0.001 for x in inputs[5:7]]

    return Case(types, plain.attrs, fix)


def experts(
    fix: Fix, *, count: int = 6, chosen: int = 2, biased: bool = False, act: Activation | None = None, **attrs: Any
) -> Case:
    width, inner = 8, 6
    rows = inner if act and not act.gated else 2 * inner
    types = [
        f32(B * S, width),
        i64(B * S, chosen),
        f32(B * S, chosen),
        f32(count, rows, width),
        f32(count, width, inner),
    ]
    types += [f32(count, rows), f32(count, width)] if biased else [None, None]
    return case(*types, fix=fix, **attrs, **({"act": act} if act else {}))


def plain(kind: str) -> Activation:
    return Activation(kind, gated=False)


def router(*, bias: bool = False, given: bool = False, expert_scale: bool = False, **attrs: Any) -> Case:
    """See tests/targets/cpu/test_routing.py for all that moe.route can say."""
    weights = [f32(8) if wanted else None for wanted in (bias, expert_scale)]
    return case(f32(B * S, 8), weights[0], i64(B * S, 2) if given else None, weights[1], k=2, **attrs)


GROUPS = {"groups": 4, "topk_groups": 2, "group_score": "top2"}


def mlp(biased: bool = False, gated: bool = False, **attrs: Any) -> Case:
    types = [f32(B, S, 8), f32(12, 8), f32(8, 6), *([f32(12), f32(8)] if biased else [None, None])]
    return case(*types, f32(1, 8) if gated else None, fix=small, **attrs)


def compressor(ratio: int, overlap: bool, turned: int) -> Case:
    width, new = 8, floordiv(P + S, ratio) - floordiv(P, ratio)
    wide = width * (2 if overlap else 1)
    pending = f32(B, pending_tokens(P, ratio, overlap), 2 * wide, state=True)
    types = [f32(B, S, 2 * wide), pending, f32(B, floordiv(P, ratio), width, state=True), f32(ratio, wide), f32(width)]
    return case(*types, *[f32(new, turned // 2)] * 2, ratio=ratio, past=P, overlap=overlap, eps=1e-5)


def windowed(window: int, ratio: int = 0, selected: bool = False) -> Case:
    entries = f32(B, floordiv(P + S, ratio), 8) if ratio else None
    chosen = i64(B, S, sympy.Min(2, floordiv(P + S, ratio))) if selected else None
    types = [f32(B, S, 4, 8), f32(B, S, 8), f32(B, sympy.Min(P, window - 1), 8, state=True), entries, chosen, f32(4)]
    return case(*types, fix=some_are_none if selected else None, scale=0.3, window=window, past=P, ratio=ratio)


def some_are_none(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
    inputs[4][:, 0, :1] = -1


def streams(rows: int, scales: int, *, n: int = 3) -> list[TensorType]:
    return [f32(B, S, n, 8), f32(rows, n * 8), f32(rows), f32(scales)]


INTERLEAVED = Activation(layout="interleaved")
GPT_OSS = replace(INTERLEAVED, alpha=1.702, beta=1.0, limit=0.7)
AFTER = Activation(limit=0.5, clamp_after=True)

CASES: dict[str, list[Case]] = {
    **{f"core.{n}": [case(X, X), case(X, ROW), case(ROW, ONE)] for n in ("add", "sub", "mul", "maximum", "minimum")},
    "nn.hyper_connection_pre": [case(*streams(15, 3), eps=1e-5, floor=1e-3, iterations=n) for n in (1, 2, 20)],
    "nn.hyper_connection_post": [case(X, f32(B, S, 3, 8), f32(B, S, 3), f32(B, S, 3, 3))],
    "nn.hyper_connection_head": [case(*streams(3, 1), eps=1e-5, floor=1e-3)],
    "nn.rope_pairs": [
        case(f32(B, S, 4, 8), *[f32(c, S, r)] * 2, inverse=back) for c, r, back in ((1, 2, False), (B, 4, True))
    ],
    "nn.block_linear": [case(f32(B, S, 2, 8), f32(6, 8)), case(f32(B, S, 1, 8), f32(3, 8))],
    "nn.compress_tokens": [
        compressor(4, True, 4), compressor(4, False, 8), compressor(2, True, 4), compressor(3, False, 4),
        compressor(1, True, 8),
    ],
    "nn.select_entries": [
        case(f32(B, S, 3, 8), f32(B, floordiv(P + S, r), 8), f32(B, S, 3), k=k, ratio=r, past=P)
        for k, r in ((1, 2), (2, 2), (9, 2), (3, 1), (2, 16))
    ],
    "nn.compressed_attention": [
        windowed(4), windowed(1), windowed(64), windowed(3, 2), windowed(3, 2, True), windowed(8, 4), windowed(2, 1, True),
        windowed(4, 16), windowed(4, 16, True),
    ],
    "core.div": [case(X, X, fix=nonzero)],
    "core.pow": [case(X, f32(), fix=positive), case(X, X, fix=positive)],
    **{f"core.{n}": [case(X, X), case(i64(B, S), i64(B, 1))] for n in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"core.{n}": [case(truth(B, S), truth(S))] for n in ("logical_and", "logical_or")},
    "core.logical_not": [case(truth(B, S))],
    **{f"core.{n}": [case(X)] for n in UNARY},
    **{f"core.{n}": [case(X, fix=positive)] for n in ("log", "sqrt", "rsqrt", "reciprocal")},
    "core.gelu": [case(X), case(X, approximate="tanh")],
    "core.clamp": [case(X, min=-0.5), case(X, max=0.25), case(X, min=-1.0, max=1.0)],
    "core.where": [case(truth(B, S, 1), X, X), case(truth(S, 8), X, f32()), case(truth(B, S), truth(B, S), truth(S))],
    "core.cast": [case(X, to="i64"), case(X, to="bool"), case(i64(B, S), to="f32"), case(truth(B, S), to="i64")],
    "core.constant": [case(value=0.5, dtype="f32"), case(value=3, dtype="i64"), case(value=True, dtype="bool")],
    "core.iota": [case(size=P + S), case(size=size(7)), case(size=B * S)],
    "core.full": [case(shape=(B, P + S), value=-1.5, dtype="f32"), case(shape=(3,), value=2, dtype="i64")],
    "core.linear": [case(X, f32(6, 8), None), case(X, f32(6, 8), f32(6)), case(f32(B * S, 8), f32(6, 8), f32(6))],
    "core.matmul": [case(X, f32(8, 4)), case(f32(B, 2, S, 8), f32(1, 2, 8, P + S))],
    "core.reshape": [
        case(X, shape=(B * S, 8)), case(X, shape=(B, S, 2, 4)), case(f32(B * S, 8), shape=(B, S, 8)),
        case(f32(B, P, 8), shape=(B * P, 8)), case(f32(B, P, 8), shape=(B, P, 2, 4)), case(X, shape=(8 * B * S,)),
        case(f32(B, P + S, 8), shape=(B, 2, P + S, 4)), case(f32(B * P, 2), shape=(B, P, 2)), case(f32(), shape=(1, 1)),
    ],
    "core.transpose": [case(X, perm=(1, 0, 2)), case(f32(B, S, 2, 4), perm=(0, 2, 1, 3))],
    "core.expand": [case(ONE, shape=(B, S, 8)), case(ROW, shape=(B, P + S, 8)), case(truth(S, 1), shape=(B, S, 3))],
    "core.slice": [
        case(X, axis=1, start=0, stop=S), case(X, axis=2, start=1, stop=8, step=3), case(X, axis=1, start=S - 1, stop=S),
        case(f32(B, P + S), axis=1, start=P, stop=P + S), case(f32(B, P + S), axis=1, start=0, stop=P),
    ],
    "core.concat": [case(X, X, ONE, axis=1), case(i64(B, P), i64(B, S), axis=1), case(truth(B, S), truth(B, S), axis=0)],
    **{
        f"core.{n}": [case(X, axes=(2,)), case(X, axes=(0, 1), keepdim=True), case(X, axes=(1,), keepdim=False)]
        for n in ("sum", "mean", "amax")
    },
    "core.softmax": [case(X, axis=2), case(X, axis=1)],
    "core.cumsum": [case(X, axis=1), case(i64(B, P + S), axis=1)],
    "core.topk": [case(X, k=3, axis=2), case(f32(B, 6, S), k=2, axis=1)],
    "core.argsort": [
        case(X, axis=2), case(X, axis=1, descending=True), case(i64(B, P + S), axis=1), case(i64(B * S), axis=0),
    ],
    "core.gather": [case(X, i64(B, S, 2), axis=2), case(f32(B, 6, 8), i64(B, 3, 5), axis=1)],
    "core.scatter_add": [case(X, i64(B, S, 5), f32(B, S, 5), axis=2), case(X, i64(B, S, 8), f32(B, S, 8), axis=2)],
    "core.scatter": [case(X, i64(B, S, 2), f32(B, S, 2), axis=2)],
    "core.take": [case(f32(5, 8), i64(B, S), axis=0), case(f32(B, 5, 8), i64(3), axis=1), case(f32(5), i64(), axis=0)],
    "nn.embedding": [case(i64(B, S), f32(11, 8))],
    "nn.rms_norm": [case(X, ROW, eps=1e-6), case(f32(B, S, 2, 8), ROW, eps=1e-5)],
    "nn.layer_norm": [case(X, ROW, ROW, eps=1e-5), case(X, ROW, None, eps=1e-5), case(X, None, None, eps=1e-5)],
    "nn.rope": [
        case(f32(B, 2, S, 8), f32(B, S, 8), f32(B, S, 8), fix=double_angles),
        case(f32(B, 2, S, 8), f32(1, S, 8), f32(1, S, 8), fix=double_angles),
    ],
    "nn.cache_append": [case(f32(B, 2, P, 4, state=True), f32(B, 2, S, 4), axis=2)],
    "nn.attention": [
        attention(4, 4, 8, 8), attention(4, 2, 5, 3), attention(4, 1, 8, 8, mask=False), attention(4, 2, 8, 8, window=2),
        attention(4, 2, 8, 8, softcap=2.0), attention(4, 2, 8, 8, sinks=True), attention(2, 2, 4, 6, window=1, sinks=True),
        attention(4, 2, 8, 8, chunk=2), attention(2, 1, 4, 4, mask=False, chunk=3), sparse_attention(),
    ],
    "nn.conv_window": [case(f32(B, 4, 3, state=True), f32(B, 4, S))],
    "nn.new_state": [case(f32(B, 4, 3))],
    "nn.causal_conv": [case(f32(B, 4, S), f32(4, 3), f32(4)), case(f32(B, 4, S), f32(4, 2), None)],
    "nn.linear_attention": [
        linear_attention(), linear_attention(decay=None), linear_attention(decay=4, beta=True),
        linear_attention(decay=None, beta=True, scale=0.5),
    ],
    "moe.experts": [
        experts(routing(signed=True)), experts(routing(zeros=True), act=INTERLEAVED, biased=True),
        experts(routing(all_on_one=True), count=9), *(experts(routing(), act=Activation(k)) for k in ("gelu", "gelu_tanh")),
        experts(routing(), act=plain("relu2")), experts(routing(), act=Activation("relu"), biased=True),
        experts(routing(), act=plain("identity"), biased=True), experts(routing(), chosen=1, count=2),
        experts(routing(), biased=True, act=GPT_OSS), experts(routing(), act=plain("silu")),
        experts(routing(), act=AFTER), experts(routing(), act=replace(AFTER, kind="gelu", layout="interleaved")),
    ],
    "moe.route": [
        router(), router(renorm="sum"), router(bias=True, score="sigmoid", **GROUPS), router(given=True, renorm="sum"),
        router(expert_scale=True, order="select_score"), router(score="sparsemixer", jitter=0.2),
    ],
    "moe.dispatch": [case(f32(B * S, 8), i64(B * S, 2), experts=5), case(f32(B * S, 8), i64(B * S, 3), experts=1)],
    "moe.grouped_linear": [
        case(f32(B * S, 8), f32(4, 6, 8), i64(5), None, fix=dispatched),
        case(f32(2 * B * S, 8), f32(3, 6, 8), i64(4), f32(3, 6), fix=dispatched),
    ],
    "moe.combine": [
        case(f32(2 * B * S, 8), f32(B * S, 2), i64(2 * B * S), fix=any_order),
        case(f32(B * S, 8), f32(B * S, 1), i64(B * S), fix=any_order),
    ],
    "ort.last_tokens": [case(f32(B, S, 8))],
    "ort.rotary_embedding": [
        case(f32(B, S, 2, 8), f32(B, S, 8), f32(B, S, 8), fix=double_angles),
        case(f32(B, S, 2, 8), f32(1, S, 8), f32(1, S, 8), fix=double_angles),
        case(f32(B, S, 2, 12), f32(B, S, 4), f32(B, S, 4), fix=double_angles),
    ],
    "nn.add_rms_norm": [case(X, X, ROW, eps=1e-6), case(f32(B * S, 8), f32(B * S, 8), ROW, eps=1e-5)],
    "nn.cached_attention": [
        cached(4, 2, 16, normed=False), cached(4, 2, 16, turned=16, normed=True), cached(4, 2, 8, turned=8, normed=True),
        cached(4, 2, 16, turned=4, normed=False), cached(4, 4, 16, turned=8, normed=True, packed=False, shared=True),
        cached(4, 2, 6, turned=4, normed=True), cached(4, 2, 5, normed=True, packed=False, sinks=True, window=2),
        cached(2, 1, 8, normed=True, masked=False, softcap=2.0), cached(4, 2, 16, turned=16, normed=False, packed=False),
        cached(4, 2, 24, turned=16, normed=False),
    ],
    "nn.gated_mlp": [
        mlp(), mlp(biased=True, gated=True), mlp(act=Activation("gelu")),
        mlp(act=replace(INTERLEAVED, kind="gelu_tanh"), biased=True), mlp(act=Activation("relu2")),
        mlp(act=Activation("relu"), gated=True), mlp(act=Activation("identity")), mlp(act=GPT_OSS),
        mlp(act=Activation(limit=0.2)), mlp(act=AFTER), mlp(act=replace(AFTER, kind="relu2", layout="interleaved")),
    ],
    "ort.attention_bias": [case(i64(B, P + S), tokens=S)],
    "ort.split": [case(X, axis=2, sizes=(3, 5)), case(f32(4, B), axis=0, sizes=(1, 2, 1))],
    "ort.quick_gelu": [case(X), case(X, alpha=1.702)],
    "ort.group_query_attention": [
        cached(4, 4, 8), cached(4, 2, 16, packed=False), cached(4, 1, 24, masked=False), cached(4, 2, 8, window=2),
        cached(4, 2, 8, window=1, sinks=True, softcap=3.0), cached(2, 2, 64, softcap=2.0, packed=False),
        cached(4, 2, 8, sinks=True), cached(4, 2, 8, masked=False, window=3, sinks=True, packed=False),
        cached(4, 2, 16, turned=16), cached(4, 2, 32, turned=16, packed=False, window=2),
        cached(2, 1, 32, turned=32, shared=True), cached(4, 4, 16, turned=16, masked=False, sinks=True, softcap=2.0),
    ],
    "ort.stored_attention": [
        stored("f16", 4, 2, 16), stored("i8", 4, 4, 8, packed=False), stored("i8", 4, 2, 16, masked=False, window=2),
        stored("f16", 4, 1, 24, packed=False, masked=False, sinks=True, softcap=2.0), stored("i8", 2, 1, 64, sinks=True),
    ],
    "ort.moe": [
        experts(routing()), experts(routing(zeros=True), biased=True), experts(routing(all_on_one=True), count=9),
        experts(routing(), chosen=1), experts(routing(), chosen=6), experts(routing(), biased=True, act=GPT_OSS),
        experts(routing(), act=plain("silu"), biased=True), experts(routing(), act=plain("relu")),
        experts(routing(), act=plain("identity")), experts(routing(), act=replace(INTERLEAVED, limit=0.5)),
        experts(routing(total=1.0), gate_sum=1.0), experts(routing(total=2.5), gate_sum=2.5, biased=True),
    ],
}  # fmt: skip


def one_op(name: str, given: Case) -> Module:
    """Return a program of one op whose operands are its inputs."""
    operands = [t and Value(f"x{i}", t) for i, t in enumerate(given.operands)]
    types = OPS[name].infer(given.operands, given.attrs)
    results = tuple(Value(f"y{i}", t) for i, t in enumerate(types))
    stage = "moe" if name in LOWERED else "kernel"
    op = Op(name, tuple(operands), results, make_attrs(given.attrs))
    params = tuple(v for v in operands if v) + SIZE_INPUTS
    return Module(stage, DIMS, (Function("main", params, (), (op,), results),))


def differ(got: np.ndarray, want: torch.Tensor) -> float:
    """Return the largest error relative to the largest value; infinite where shapes, dtypes or non-numbers differ."""
    expected = want.numpy()
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return INF
    if got.dtype.kind != "f":
        return float((got != expected).any())
    finite = np.isfinite(expected)
    if (np.isfinite(got) != finite).any() or (got[~finite] != expected[~finite]).any():
        return INF
    error = np.abs(got[finite] - expected[finite]).max(initial=0.0)
    return float(error / max(1e-6, np.abs(expected[finite]).max(initial=0.0)))


def no_weights(recipe: object) -> torch.Tensor:
    raise AssertionError("the program has no weights")


def run_case(module: Module, given: Case, folder: Path, all_sizes: Sequence[dict[str, int]] = SIZES) -> None:
    emit_model(lower_module(module).module, RandomSource(), folder)
    runner = open_session(folder)
    for seed, sizes in enumerate(all_sizes):
        inputs = random_inputs(module, "main", sizes, seed)
        if given.fix:
            own = inputs[: len(inputs) - len(SIZE_INPUTS)]
            places = [i for i, t in enumerate(given.operands) if t]
            full: list[Any] = [None] * len(given.operands)
            for place, tensor in zip(places, own, strict=True):
                full[place] = tensor
            given.fix(full, sizes)
            inputs[: len(own)] = [full[p] for p in places]
        want = interpret(module, inputs, no_weights)
        feeds = {p.name: x.numpy() for p, x in zip(module.main.params, inputs, strict=True)}
        for got, expected, value in zip(runner.run(None, feeds), want, module.main.results, strict=True):
            assert differ(got, expected) < 1e-5, f"{value} at {sizes}: {differ(got, expected)}"


@pytest.mark.parametrize(("name", "index"), [(n, i) for n in sorted(CASES) for i in range(len(CASES[n]))])
def test_kernel(name: str, index: int, tmp_path: Path) -> None:
    run_case(one_op(name, CASES[name][index]), CASES[name][index], tmp_path)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_row_that_is_all_padding_attends_to_nothing(softcap: float, tmp_path: Path) -> None:
    """ONNX Runtime's operator makes NaN of it where it has one slot, and with a softcap."""
    plain = cached(4, 2, 16, softcap=softcap)

    def fix(inputs: list[torch.Tensor], dims: dict[str, int]) -> None:
        plain.fix(inputs, dims)
        inputs[7][0] = -INF

    given = replace(plain, fix=fix)
    run_case(one_op("ort.group_query_attention", given), given, tmp_path, [*SIZES, {"B": 2, "S": 1, "P": 0}])


def test_every_op_has_a_case() -> None:
    ours = {name for name in OPS if name.split(".")[0] in ("core", "nn", "moe", "ort")}
    assert ours == set(CASES) | QUANTIZED
    assert ours - LOWERED <= set(KERNELS) and not LOWERED & set(KERNELS)


@pytest.mark.parametrize("name", ["sigmoid", "exp", "softmax", "softplus"])
def test_small_scores_are_right_to_the_last_bits(name: str, tmp_path: Path) -> None:
    """A router mixes by scores that may all be small: what counts is the error of each, not of the largest."""
    given = case(f32(B, S, 256), axis=2) if name == "softmax" else case(f32(B, S, 256))
    module = one_op(f"core.{name}", given)
    emit_model(module, RandomSource(), tmp_path)
    x = torch.linspace(-30, 5, 256).expand(1, 1, 256)
    sizes = {v.name: np.ones((1, 1), np.int64) for v in SIZE_INPUTS}
    (got,) = open_session(tmp_path).run(None, {"x0": x.numpy(), **sizes})
    (want,) = interpret(module, [x, *map(torch.from_numpy, sizes.values())], no_weights)
    np.testing.assert_allclose(got, want.numpy(), rtol=4e-6)
