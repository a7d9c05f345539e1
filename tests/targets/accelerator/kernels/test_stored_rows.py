"""Caches in 8 bits: what kernels append, and attention to it, on chips that have E4M3, equal the reference ops."""

import pytest
import torch
from chips_for_tests import CHIPS, bf16, close, run
from kernel_checks import numbers
from moec.compiler.ops import OPS, nn
from moec.targets import declare_kernel_ops
from moec.targets.accelerator.kernels.attention import Attention, attention_kernel
from moec.targets.accelerator.kernels.choices import AttentionTile, RowTile
from moec.targets.accelerator.kernels.latent import LatentAppend, latent_append, widen_kernel
from moec.targets.accelerator.kernels.rope import Append, qk_rope_append

declare_kernel_ops()
chips = pytest.mark.parametrize("name", ["hopper", "amd", "blackwell"])
FNUZ = "f8e4m3fnuz"


def stored(x):
    """Return codes and scales of rows as torch rounds them, and the numbers that they are."""
    scales = x.abs().amax(-1, keepdim=True) / 448
    codes = (x / torch.where(scales == 0, 1.0, scales)).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * scales


@chips
@pytest.mark.parametrize(("past", "new", "split"), [(0, 9, 1), (20, 1, 4)])
@pytest.mark.parametrize("shared", [False, True])
def test_attention_reads_codes_and_scales(name, past, new, split, shared):
    """Keys and values of their own, and latents that are both, whose part with positions lies apart and is not rounded."""
    layout, chip = CHIPS[name]
    batch, heads, groups, rope, total = 2, 4, 1 if shared else 2, 16 if shared else 0, past + new
    p = Attention(
        heads, groups, 32, 32, 0.2, shared=shared, heads_first=True, rope=rope, eight_bits=True, dtype="f32"
    )  # fmt: skip
    q, q_rope, turned = numbers(batch, heads, new, 32), numbers(batch, heads, new, 16), numbers(batch, 1, total + 3, 16)
    given, read = {"q": q}, []
    for tensor in ("key",) if shared else ("key", "value"):
        codes, scales, read_back = stored(numbers(batch, groups, total + 3, 32) * torch.rand(total + 3, 1).exp2())
        given |= {f"{tensor}_codes": codes, f"{tensor}_scales": scales}
        read.append(read_back[:, :, :total])
    keys, values = read[0], read[-1]
    if shared:
        given |= {"q_rope": q_rope, "key_rope": turned}
        q, keys = torch.cat((q, q_rope), 3), torch.cat((keys, turned[:, :, :total]), 3)
    scalars = {"B": batch, "S": new, "P": past, "C": total + 3}
    found = run(attention_kernel(p, AttentionTile(16, 16, 16, split=split), layout), chip, scalars, **given)
    wanted = nn.attention(q, keys, values, None, None, scale=0.2)
    if split > 1:
        tops, totals, sums = (torch.tensor(found[n]) for n in ("tops", "totals", "portions"))
        weights = torch.exp2(tops - tops.amax(0))
        found["y"] = (
            ((sums * weights[..., None]).sum(0) / (totals * weights).sum(0)[:, None]).reshape(wanted.shape).numpy()
        )
    close(found["y"], wanted, 5e-6)


@chips
@pytest.mark.parametrize("bits", ["", FNUZ])
@pytest.mark.parametrize(("past", "new"), [(0, 5), (6, 1)])
def test_heads_are_appended_in_eight_bits(name, bits, past, new):
    layout, chip = CHIPS[name]
    batch, heads, groups, width, rotary = 2, 4, 2, 24, 16
    p = Append(heads, groups, width, rotary, k_norm=True, eps=1e-5, dtype="f32", eight_bits=True, bits=bits)
    q, k, v = (numbers(batch, new, n * width) for n in (heads, groups, groups + 0))
    v = v.flip(1) * 3
    caches = [
        stored(numbers(batch, groups, past, width))[2] if past else torch.zeros(batch, groups, 0, width) for _ in "kv"
    ]
    angle = numbers(1, new, rotary // 2)
    cos, sin = (f(torch.cat((angle, angle), -1)) for f in (torch.cos, torch.sin))
    given = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "k_norm": numbers(width)}
    for tensor, cache in zip(("key", "value"), caches, strict=True):
        codes, scales, _ = stored(torch.cat((cache, torch.full((batch, groups, new + 2, width), 9.0)), 2))
        given |= {f"{tensor}_codes": codes, f"{tensor}_scales": scales}
    found = run(
        qk_rope_append(p, RowTile(2, 0), layout), chip, {"B": batch, "S": new, "P": past, "C": past + new + 2}, **given
    )
    wanted = OPS["acc.rope_append"].reference(
        q, k, v, *caches, cos, sin, None, given["k_norm"], heads=heads, eps=1e-5, cache="fp8"
    )
    close(found["y"], wanted[0])
    for tensor, cache in zip(("key", "value"), wanted[1:], strict=True):
        check_appended(found, tensor, cache, past + new, 9.0)


def check_appended(found, tensor, cache, length, behind):
    """Assert that a cache holds these numbers, but for some that lie between two codes, and what lay behind."""
    made = torch.tensor(found[f"{tensor}_codes"].astype("float32")) * torch.tensor(found[f"{tensor}_scales"])
    off = (made[:, :, :length] - cache).abs() / cache.abs().amax(-1, keepdim=True)
    assert off.max() < 0.04 and (off > 1e-5).float().mean() < 0.02
    assert torch.allclose(made[:, :, length:], torch.tensor(behind))


@chips
def test_latents_are_appended_in_eight_bits_and_widened(name):
    layout, chip = CHIPS[name]
    batch, heads, row, width, rope, new = 2, 3, 20, 24, 12, 5
    q, kv, norm = numbers(batch, new, heads * row), numbers(batch, new, width + rope), numbers(width)
    angle = numbers(1, new, rope // 2)
    cos, sin = (f(torch.cat((angle, angle), -1)) for f in (torch.cos, torch.sin))
    p = LatentAppend(heads, row, width, rope, 1e-5, dtype="f32", eight_bits=True)
    codes, scales, _ = stored(torch.full((batch, 1, new + 2, width), 9.0))
    given = {"q": q, "kv": kv, "norm": norm, "cos": cos, "sin": sin, "latent_codes": codes, "latent_scales": scales}
    given["key_rope"] = torch.full((batch, 1, new + 2, rope), 9.0)
    scalars = {"B": batch, "S": new, "P": 0, "C": new + 2}
    found = run(latent_append(p, RowTile(2, 0), layout), chip, scalars, **given)
    pasts = torch.zeros(batch, 1, 0, width), torch.zeros(batch, 1, 0, rope)
    wanted = OPS["acc.latent_append"].reference(q, kv, norm, *pasts, cos, sin, heads=heads, eps=1e-5, cache="fp8")
    check_appended(found, "latent", wanted[1], new, 9.0)
    close(found["key_rope"][:, :, :new], wanted[2])  # is not rounded
    kept = {name: torch.tensor(found[name].astype("float32")) for name in ("latent_codes", "latent_scales")}
    codes, scales = kept["latent_codes"].to(torch.float8_e4m3fn), kept["latent_scales"]
    wide = run(widen_kernel(width, RowTile(4, 16), layout), chip, scalars, latent_codes=codes, latent_scales=scales)[
        "wide"
    ]
    close(wide, bf16(codes.float() * scales)[:, :, :new], 1e-6)
