"""Lets multi-head latent attention (MLA) work on the cached latent itself, with its up-projections at the new tokens."""

from __future__ import annotations

from typing import Any

from ..compiler.errors import Refuse
from ..compiler.ir.dims import size
from ..compiler.ir.module import Module
from ..compiler.ir.notes import Rewritten
from ..compiler.ir.recipes import Recipe
from ..compiler.rewrite.declare import pass_
from ..compiler.rewrite.rules import Match, apply_rules, rule
from ..compiler.weights.steps.table import step


@rule(
    before="""
      %expanded = core.linear(%latent, %w, _)
      %heads = core.reshape(%expanded) {shape=[B, T, H, W]}
      %turned = core.transpose(%heads) {perm=[0, 2, 1, 3]}
      %k_nope = core.slice(%turned) {axis=3, start=0, stop=N, step=1}
      %v = core.slice(%turned) {axis=3, start=N, stop=W, step=1}
      %k_rope = core.expand(%rope) {shape=ForEachHead}
      %k = core.concat(%k_nope, %k_rope) {axis=3}
      %y = nn.attention(%q, %k, %v, %mask, %sinks) {scale=Scale, window=Window, chunk=Chunk, softcap=Cap}
    """,
    after="""
      %q_nope = core.slice(%q) {axis=3, start=0, stop=N}
      %q_nope.rows = core.transpose(%q_nope) {perm=[0, 2, 1, 3]}
      %q_latent.rows = nn.block_linear(%q_nope.rows, %w_uk)
      %q_latent.heads = core.reshape(%q_latent.rows) {shape=[B, S, H, R]}
      %q_latent = core.transpose(%q_latent.heads) {perm=[0, 2, 1, 3]}
      %q_rope = core.slice(%q) {axis=3, start=N, stop=D}
      %q.latent = core.concat(%q_latent, %q_rope) {axis=3}
      %k.latent = core.concat(%latent, %rope) {axis=3}
      %y.latent = nn.attention(%q.latent, %k.latent, %latent, %mask, %sinks) {scale=Scale, window=Window, chunk=Chunk, softcap=Cap}
      %y.rows = nn.block_linear(%y.latent, %w_uv)
      %y = core.reshape(%y.rows) {shape=[B, S, H, V]}
    """,
    optional=("mask", "sinks"),
)  # fmt: skip
def attend_to_latent(m: Match, target: Any) -> dict[str, Any]:
    """Multiply queries by W_UK and outputs by W_UV instead of every cached latent (DeepSeek-V2, arXiv 2405.04434, 2.1.2)."""
    return _absorbed_bindings(m, (m.latent, m.rope))


@rule(
    before="""
      %expanded = core.linear(%latent, %w, _)
      %heads = core.reshape(%expanded) {shape=[B, T, H, W]}
      %turned = core.transpose(%heads) {perm=[0, 2, 1, 3]}
      %k = core.slice(%turned) {axis=3, start=0, stop=N, step=1}
      %v = core.slice(%turned) {axis=3, start=N, stop=W, step=1}
      %y = nn.attention(%q, %k, %v, %mask, %sinks) {scale=Scale, window=Window, chunk=Chunk, softcap=Cap}
    """,
    after="""
      %q.rows = core.transpose(%q) {perm=[0, 2, 1, 3]}
      %q_latent.rows = nn.block_linear(%q.rows, %w_uk)
      %q_latent.heads = core.reshape(%q_latent.rows) {shape=[B, S, H, R]}
      %q_latent = core.transpose(%q_latent.heads) {perm=[0, 2, 1, 3]}
      %y.latent = nn.attention(%q_latent, %latent, %latent, %mask, %sinks) {scale=Scale, window=Window, chunk=Chunk, softcap=Cap}
      %y.rows = nn.block_linear(%y.latent, %w_uv)
      %y = core.reshape(%y.rows) {shape=[B, S, H, V]}
    """,
    optional=("mask", "sinks"),
)  # fmt: skip
def attend_to_latent_without_positions(m: Match, target: Any) -> dict[str, Any]:
    """Do the same where keys have no part with positions: the latent is key and value at once."""
    return _absorbed_bindings(m, (m.latent,))


def _absorbed_bindings(m: Match, cached: tuple[Any, ...]) -> dict[str, Any]:
    """Return the bindings that `after` needs; Refuse where the value is not a latent, or queries do not fit it."""
    if not m.latent.type.state:
        raise Refuse("it is no cache, its keys and values are made for the new tokens only", m.latent)
    tokens = (size(m.B), size(1), size(m.T))
    for value in cached:
        if value.type.shape[:-1] != tokens:
            raise Refuse(f"it is {value.type}, not one row for each token and all heads", value)
    if m.q.type.shape[1] != m.H:
        raise Refuse(f"queries of {m.q.type.shape[1]} heads share {m.H} heads of keys", m.q)
    weight = m.recipe("w")
    if weight is None:
        raise Refuse("it is not a weight, it cannot be taken apart beforehand", m.w)
    return {
        "S": m.q.type.shape[2], "D": m.q.type.shape[3], "R": weight.type.sizes[1], "V": m.W - m.N,
        "w_uk": _of_heads(weight, m.H, 0, m.N, turned=True),
        "w_uv": _of_heads(weight, m.H, m.N, m.W, turned=False),
    }  # fmt: skip


def _of_heads(weight: Recipe, heads: int, start: int, stop: int, turned: bool) -> Recipe:
    """Return rows start:stop of every head of a weight [H*W, R] concatenated, [H*N, R]; `turned`: transposed, [H*R, N]."""
    rows, latent = weight.type.sizes
    part = step("slice", step("reshape", weight, shape=(heads, rows // heads, latent)), axis=1, start=start, stop=stop)
    if turned:
        part = step("transpose", part, perm=(0, 2, 1))
    return step("reshape", part, shape=(heads * part.type.sizes[1], part.type.sizes[2]))


RULES = (attend_to_latent, attend_to_latent_without_positions)


@pass_(reads="moe")
def absorb_mla(module: Module, target: Any) -> Rewritten:
    """Let attention over keys and values that are made of a cached latent work on the latent, one head for all queries.

    A step no longer makes keys and values of all cached tokens, which saves H R (N + V) products for each of them and
    costs H (2 R - N - V) for each pair of a new and a cached token (heads of N + rope and V numbers, a latent of R): in
    DeepSeek-V3 steps of up to 170 tokens get cheaper, decoding a hundredfold, and longer prompts up to 3.4 times dearer
    in their attention. On the cpu one program serves both, and decoding is what takes the time; accelerators have kernels
    for either form and take the one for the number of new tokens.
    """
    return apply_rules(module, target, RULES)
