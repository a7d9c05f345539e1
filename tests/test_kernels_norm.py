"""Kernels of norms and of rotary heads, simulated on a chip of every family, equal the reference ops."""

import numpy as np
import pytest
import torch
from chips_for_tests import CHIPS, bf16, close, run
from moec.compiler.ops import nn
from moec.compiler.ops.attention import cached_attention
from moec.compiler.ops.compressed import rope_pairs
from moec.targets.accelerator.kernels.choices import RowTile
from moec.targets.accelerator.kernels.norm import Norm, add_rms_norm, layer_norm, rms_norm
from moec.targets.accelerator.kernels.rope import Append, Rope, qk_rope_append, rope

chips = pytest.mark.parametrize("name", CHIPS)


def numbers(*shape):
    return torch.tensor(np.random.default_rng(sum(shape)).standard_normal(shape), dtype=torch.float32)


@chips
@pytest.mark.parametrize("tile", [RowTile(2, 64), RowTile(4, 16)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_norms(name, tile, tokens):
    layout, chip = CHIPS[name]
    x, residual, w, b = numbers(tokens, 40), numbers(tokens + 1, 40)[:tokens], numbers(40), numbers(41)[:40]
    scalars = {"T": tokens}
    f32 = {"dtype": "f32", "out": "f32"}
    close(run(rms_norm(Norm(40, 1e-5, **f32), tile, layout), chip, scalars, x=x, w=w)["y"], nn.rms_norm(x, w, eps=1e-5))
    plain = run(rms_norm(Norm(40, 1e-5, weight=False, **f32), tile, layout), chip, scalars, x=x)["y"]
    close(plain, nn.rms_norm(x, torch.ones(40), eps=1e-5))
    both = run(add_rms_norm(Norm(40, 0.1, add=True, **f32), tile, layout), chip, scalars, x=x, residual=residual, w=w)
    wanted = nn.add_rms_norm(x, residual, w, eps=0.1)
    close(both["y"], wanted[0])
    close(both["sum"], wanted[1])
    p = Norm(40, 1e-5, bias=True, centred=True, **f32)
    close(run(layer_norm(p, tile, layout), chip, scalars, x=x + 3, w=w, b=b)["y"], nn.layer_norm(x + 3, w, b, eps=1e-5))


def test_the_norm_of_a_rounded_sum():
    layout, chip = CHIPS["ascend-950"]
    x, residual, w = bf16(numbers(3, 24)), bf16(numbers(4, 24)[:3]), numbers(24)
    found = run(
        add_rms_norm(Norm(24, 1e-6, add=True), RowTile(2, 32), layout), chip, {"T": 3}, x=x, residual=residual, w=w
    )
    assert torch.equal(torch.tensor(found["sum"].astype(np.float32)), bf16(x + residual))
    close(found["y"], nn.rms_norm(bf16(x + residual), w, eps=1e-6), 4e-3)


@chips
@pytest.mark.parametrize("own", [False, True])
def test_rope_of_halves(name, own):
    layout, chip = CHIPS[name]
    for batch, tokens, heads, width in ((2, 5, 3, 12), (1, 1, 2, 16)):
        x, angle = numbers(batch, heads, tokens, width), numbers(batch if own else 1, tokens, width // 2)
        cos, sin = (f(torch.cat((angle, angle), -1)) for f in (torch.cos, torch.sin))
        p = Rope(heads, width, width, own_angles=own, heads_first=True, dtype="f32")
        y = run(rope(p, RowTile(4, 0), layout), chip, {"B": batch, "S": tokens}, x=x, cos=cos, sin=sin)["y"]
        close(y, nn.rope(x, cos, sin))


@chips
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_of_pairs(name, inverse, norm):
    layout, chip = CHIPS[name]
    for batch, tokens, heads, width, turned in ((2, 5, 3, 24, 12), (1, 1, 2, 16, 16)):
        x, angle = numbers(batch, tokens, heads, width), numbers(1, tokens, turned // 2)
        p = Rope(heads, width, turned, True, inverse, norm, eps=1e-6, dtype="f32")
        given = {"x": x, "cos": torch.cos(angle), "sin": torch.sin(angle)}
        y = run(rope(p, RowTile(2, 0), layout), chip, {"B": batch, "S": tokens}, **given)["y"]
        source = nn.rms_norm(x, torch.ones(width), eps=1e-6) if norm else x
        close(y, rope_pairs(source, torch.cos(angle), torch.sin(angle), inverse=inverse))


@chips
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    ("past", "new", "rotary", "norm"), [(0, 5, 8, True), (3, 1, 12, False), (6, 4, 0, True), (0, 1, 6, False)]
)
def test_what_stands_before_cached_attention(name, joined, past, new, rotary, norm):
    layout, chip = CHIPS[name]
    batch, heads, groups, width = 2, 4, 2, 12
    q, k, v = (numbers(batch, new, n * width + i)[..., i:] for i, n in enumerate((heads, groups, groups)))
    key, value = numbers(batch, groups, past, width), numbers(batch, groups, past, width) + 1
    angle = numbers(1, new, rotary // 2)
    cos, sin = (f(torch.cat((angle, angle), -1)) if rotary else None for f in (torch.cos, torch.sin))
    weights = {"q_norm": numbers(width), "k_norm": numbers(width + 1)[:width]} if norm else {}
    p = Append(heads, groups, width, rotary, joined, norm, norm, 1e-5, dtype="f32")
    spare = torch.full((batch, groups, new + 2, width), 9.0)  # the cache has room behind the new tokens
    cache = {"key": torch.cat((key, spare), 2), "value": torch.cat((value, spare), 2)}
    given = {"qkv": torch.cat((q, k, v), -1)} if joined else {"q": q, "k": k, "v": v}
    given |= {"cos": cos, "sin": sin} if rotary else {}
    scalars = {"B": batch, "S": new, "P": past, "C": past + new + 2}
    found = run(qk_rope_append(p, RowTile(2, 0), layout), chip, scalars, **given, **cache, **weights)
    _, all_keys, all_values = cached_attention(
        q, k, v, key, value, cos, sin, weights.get("q_norm"), weights.get("k_norm"), None, None, heads=heads, scale=1.0,
        eps=1e-5,
    )  # fmt: skip
    close(found["key"], torch.cat((all_keys, spare[:, :, :2]), 2))
    close(found["value"], torch.cat((all_values, spare[:, :, :2]), 2))
    heads_of_q = q.reshape(batch, new, heads, width).transpose(1, 2)
    wanted = nn.rms_norm(heads_of_q, weights["q_norm"], eps=1e-5) if norm else heads_of_q
    if rotary:
        wanted = torch.cat((nn.rope(wanted[..., :rotary], cos, sin), wanted[..., rotary:]), -1)
    close(found["y"], wanted)  # [B, H, S, D], as the attention kernel reads it
