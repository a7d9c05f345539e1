"""Attention over a window of tokens and compressed entries that stand for the tokens before: DeepSeek-V4's CSA and HCA.

Positions count from 0 in every row, so that rows with padding are out of their reach. `past` is the number of tokens
before this step; with it every size follows, for a prompt of any length and for one new token alike.
"""

from __future__ import annotations

import sympy

from ..ir.deferred import torch
from ..ir.dims import Size, floordiv, size
from ..ir.types import TensorType
from .define import Attributes, Types, inference_error, op


@op(
    "nn.rope_pairs",
    "x: A[B, S, H, D], cos: A[C, S, R], sin: A[C, S, R] -> y: A[B, S, H, D]",
    flops=lambda o, r, a: 6 * r[0].elements / r[0].shape[3] * o[1].shape[2],
)
def rope_pairs(x, cos, sin, *, inverse: bool = False):
    """Rotate the last 2R numbers of each head as R pairs of neighbours by the position's angles (Su et al. 2021).

    (a, b) becomes (a cos - b sin, b cos + a sin); `inverse` turns back. The angles' first axis is the batch or 1.
    """
    cos, sin = cos.unsqueeze(2), (-sin if inverse else sin).unsqueeze(2)
    width = 2 * cos.shape[-1]
    a, b = x[..., -width::2], x[..., -width + 1 :: 2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((x[..., :-width], turned), dim=-1)


def _infer_block_linear(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, w = types
    if w.shape[0] % x.shape[2] != 0:
        raise inference_error(
            f"nn.block_linear: the {w.shape[0]} rows of {w} do not divide into the {x.shape[2]} blocks of {x}"
        )
    return (TensorType(x.dtype, (*x.shape[:2], w.shape[0])),)


@op(
    "nn.block_linear",
    "x: A[B, S, G, K], w: Q[N, K] -> y: A[B, S, N]",
    infer=_infer_block_linear,
    flops=lambda o, r, a: 2 * r[0].elements * o[1].shape[1],
)
def block_linear(x, w):
    """Multiply each of G parts of the input by its own N / G rows of the weight: a block-diagonal linear."""
    blocks = w.unflatten(0, (x.shape[2], -1))
    return torch.einsum("bsgk,gnk->bsgn", x, blocks).flatten(2)


# --- compressed entries ----------------------------------------------------------------------------------------


def pending_tokens(tokens: Size, ratio: int, overlap: bool) -> Size:
    """Return how many tokens are kept for windows to come, after `tokens` tokens."""
    return size(sympy.Mod(tokens, ratio) + (ratio if overlap else 0))


def _infer_compress_tokens(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    x, pending, entries, bias, norm, cos, _ = types
    ratio, past, overlap = attributes["ratio"], size(attributes["past"]), attributes["overlap"]
    if ratio < 1:
        raise inference_error(f"nn.compress_tokens: ratio={ratio}")
    total = size(past + x.shape[1])
    width = norm.shape[0] * (2 if overlap else 1)
    if x.shape[2] != 2 * width or bias.shape != (ratio, width):
        raise inference_error(
            f"nn.compress_tokens: entries {entries} want x of {2 * width} numbers and a bias [{ratio}, {width}]"
        )
    before, after = floordiv(past, ratio), floordiv(total, ratio)
    for what, given, wanted in (
        ("pending", pending.shape[1], pending_tokens(past, ratio, overlap)),
        ("entries", entries.shape[1], before),
        ("cos", cos.shape[0], size(after - before)),
    ):
        if given != wanted:
            raise inference_error(f"nn.compress_tokens: {what} holds {given}, {wanted} is wanted")
    if 2 * cos.shape[1] > norm.shape[0]:
        raise inference_error(
            f"nn.compress_tokens: the angles {cos} turn more than the {norm.shape[0]} numbers of an entry"
        )
    batch = x.shape[0]
    kept = TensorType(x.dtype, (batch, pending_tokens(total, ratio, overlap), x.shape[2]), state=True)
    return kept, TensorType(x.dtype, (batch, after, norm.shape[0]), state=True)


@op(
    "nn.compress_tokens",
    "x: A[B, S, N], pending: state A[B, M, N], entries: state A[B, E, D], bias: A[ratio, W], norm: A[D],"
    " cos: A[F, R], sin: A[F, R] -> kept: state A[B, Y, N], all: state A[B, Z, D]",
    infer=_infer_compress_tokens,
    flops=lambda o, r, a: 8 * o[0].elements,
    reads={"entries": lambda types, attributes: size(0)},
    appends=("entries",),
)
def compress_tokens(x, pending, entries, bias, norm, cos, sin, *, ratio: int, past: Size, overlap: bool, eps: float):
    """Append one entry for every window of `ratio` tokens that ends in this step.

    A token is x = [values, logits], two vectors of W numbers. An entry is the sum of its window's values, weighted by
    the softmax over the window of logits + bias, for each number by itself; then nn.rms_norm with `norm`, then
    nn.rope_pairs with the angles of the window's first position. With `overlap` W is 2 D, and an entry is made of 2
    `ratio` slots: the first halves of the window before (none before the first window) and the second halves of its
    own. `pending` holds the tokens of the unfinished window, with `overlap` behind those of the window before.
    """
    count = cos.shape[0]
    stream = torch.cat((pending, x), dim=1)
    windows = stream[:, : (count + overlap) * ratio].unflatten(1, (count + overlap, ratio))
    values, logits = windows.chunk(2, dim=-1)
    logits = logits + bias
    if overlap:
        width = norm.shape[0]
        first = torch.arange(count)[:, None, None] + past // ratio == 0
        before = logits[:, :-1, :, :width].masked_fill(first, float("-inf"))
        logits = torch.cat((before, logits[:, 1:, :, width:]), dim=2)
        values = torch.cat((values[:, :-1, :, :width], values[:, 1:, :, width:]), dim=2)
    mixed = (values * torch.softmax(logits, dim=2)).sum(2)
    normed = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + eps) * norm
    new = rope_pairs(normed.unsqueeze(2), cos[None], sin[None]).squeeze(2)
    return stream[:, count * ratio :], torch.cat((entries, new), dim=1)


def _infer_select_entries(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    q, keys, _ = types
    chosen = sympy.Min(attributes["k"], keys.shape[1])
    return (TensorType.of("i64", *q.shape[:2], chosen),)


@op(
    "nn.select_entries",
    "q: A[B, S, H, D], keys: A[B, E, D], weights: A[B, S, H] -> ids: i64[B, S, J]",
    infer=_infer_select_entries,
    flops=lambda o, r, a: 2 * o[0].elements * o[1].shape[1] + 4 * o[2].elements * o[1].shape[1],
)
def select_entries(q, keys, weights, *, k: int, ratio: int, past: Size):
    """Choose the k compressed entries that each token attends to (the lightning indexer of DeepSeek sparse attention).

    score(t, w) = sum_h weights[t, h] relu(q[t, h] keys[w]); entry w is visible to the token at position t when
    w < floor((t + 1) / ratio). Of equal scores the lower entry goes first. Where fewer than k are visible, -1 stands in
    the other places.
    """
    scores = torch.einsum("bshe,bsh->bse", torch.relu(torch.einsum("bshd,bed->bshe", q, keys)), weights)
    visible = visible_entries(q.shape[1], keys.shape[1], ratio, past)
    best = scores.masked_fill(~visible, float("-inf")).argsort(dim=-1, descending=True, stable=True)[..., :k]
    return best.masked_fill(~visible.expand(scores.shape).gather(2, best), -1)


def visible_entries(new: int, entries: int, ratio: int, past: int) -> torch.Tensor:
    """Return bool[S, E]: whether an entry's window ended before the next token, w < floor((t + 1) / ratio)."""
    ended = (torch.arange(new) + past + 1) // ratio
    return torch.arange(entries)[None, :] < ended[:, None]


def _infer_compressed_attention(types: Types, attributes: Attributes) -> tuple[TensorType, ...]:
    q, kv, window, entries, selected, _ = types
    past, length, ratio = size(attributes["past"]), attributes["window"], attributes["ratio"]
    if length < 1 or window.shape[1] != sympy.Min(past, length - 1):
        raise inference_error(
            f"nn.compressed_attention: a window of {length} tokens keeps min({length - 1}, {past}), not {window}"
        )
    if (entries is None) != (ratio == 0) or (selected and not entries):
        raise inference_error("nn.compressed_attention: entries want their ratio, and selected ones want entries")
    total = size(past + q.shape[1])
    if entries and entries.shape[1] != floordiv(total, ratio):
        raise inference_error(f"nn.compressed_attention: {entries} has not floordiv({total}, {ratio}) entries")
    kept = TensorType(kv.dtype, (kv.shape[0], sympy.Min(total, length - 1), kv.shape[2]), state=True)
    return q.plain, kept


def _windowed_flops(operands: Types, results: tuple[TensorType, ...], attributes: Attributes) -> Size:
    q, _, _, entries, selected, _ = operands
    slots = sympy.Min(size(attributes["past"]) + q.shape[1], attributes["window"])
    slots += selected.shape[2] if selected else entries.shape[1] if entries else 0
    heads = q.elements / q.shape[3]
    return heads * slots * (4 * q.shape[3] + 5)


def _read_entries(types: Types, attributes: Attributes) -> Size:
    """Return how many numbers of the entries are read: of selected ones those that the new tokens chose at most."""
    entries, selected = types[3], types[4]
    if selected is None:
        return entries.elements
    chosen = sympy.Min(entries.shape[1], selected.shape[1] * selected.shape[2])
    return entries.shape[0] * chosen * entries.shape[2]


@op(
    "nn.compressed_attention",
    "q: A[B, S, H, D], kv: A[B, S, D], window: state A[B, M, D], entries: A[B, E, D]?, selected: i64[B, S, J]?,"
    " sinks: A[H] -> y: A[B, S, H, D], kept: state A[B, Y, D]",
    infer=_infer_compressed_attention,
    flops=_windowed_flops,
    reads={"entries": _read_entries},
    domains={"selected": lambda types, attributes: types[3].shape[1]},
    distinct=("selected",),
)
def compressed_attention(
    q, kv, window_kv, entries, selected, sinks, *, scale: float, window: int, past: Size, ratio: int = 0
):
    """Attend to the last `window` tokens and to compressed entries, all of which are keys and values at once.

    softmax(scale q k) over the tokens at t - window + 1 .. t, the entries w < floor((t + 1) / ratio) (of these only
    the `selected` ones, -1 for no entry), and one more logit `sinks` for each head that adds to the denominator only.
    The state holds the last `window` - 1 tokens.
    """
    new, kept = q.shape[1], window_kv.shape[1]
    tokens = torch.cat((window_kv, kv), dim=1)
    t = torch.arange(past, past + new)[:, None]
    s = torch.arange(past - kept, past + new)[None, :]
    visible, keys = ((s <= t) & (t - s < window)).expand(q.shape[0], -1, -1), tokens
    if entries is not None:
        seen = visible_entries(new, entries.shape[1], ratio, past).expand(q.shape[0], -1, -1)
        if selected is not None:
            chosen = torch.zeros(*q.shape[:2], entries.shape[1] + 1, dtype=torch.bool)
            places = selected.masked_fill(selected < 0, entries.shape[1])
            seen = seen & chosen.scatter(2, places, True)[..., :-1]
        visible, keys = torch.cat((visible, seen), dim=2), torch.cat((tokens, entries), dim=1)
    scores = torch.einsum("bshd,btd->bsht", q, keys) * scale
    scores = scores.masked_fill(~visible.unsqueeze(2), float("-inf"))
    logits = torch.cat((scores, sinks[:, None].expand(*q.shape[:3], 1)), dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :-1]
    y = torch.einsum("bsht,btd->bshd", weights, keys)
    return y, tokens[:, tokens.shape[1] - min(past + new, window - 1) :]
