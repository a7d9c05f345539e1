"""Kernels simulated on a chip of a family and compared with the reference ops, on random tensors.

What is simulated goes through `run` of this module, so that a test can record the programs.
"""

import numpy as np
import torch
from chips_for_tests import CHIPS, bf16, close, run
from moec.compiler.ops import nn
from moec.compiler.ops.attention import cached_attention
from moec.compiler.ops.compressed import compressed_attention as compressed_reference
from moec.compiler.ops.compressed import rope_pairs
from moec.targets.accelerator.kernels.attention import Attention, attention_kernel, attention_merge
from moec.targets.accelerator.kernels.choices import AttentionTile, RowTile
from moec.targets.accelerator.kernels.compressed import Compressed, compressed_attention, compressed_merge, slide_kernel
from moec.targets.accelerator.kernels.norm import Norm, add_rms_norm, layer_norm, rms_norm
from moec.targets.accelerator.kernels.rope import Append, Rope, qk_rope_append, rope_kernel


def numbers(*shape):
    """Return random numbers that depend on the shape alone."""
    return torch.tensor(np.random.default_rng(sum(shape)).standard_normal(shape), dtype=torch.float32)


def check_norms(name, tile, tokens):
    """Check RMS norms, with a weight, without one and of a sum, and a layer norm."""
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


def check_rope_of_halves(name, own):
    """Check the rotation of halves, in batches of two sizes."""
    layout, chip = CHIPS[name]
    for batch, tokens, heads, width in ((2, 5, 3, 12), (1, 1, 2, 16)):
        x, angle = numbers(batch, heads, tokens, width), numbers(batch if own else 1, tokens, width // 2)
        cos, sin = (f(torch.cat((angle, angle), -1)) for f in (torch.cos, torch.sin))
        p = Rope(heads, width, width, own_angles=own, heads_first=True, dtype="f32")
        y = run(rope_kernel(p, RowTile(4, 0), layout), chip, {"B": batch, "S": tokens}, x=x, cos=cos, sin=sin)["y"]
        close(y, nn.rope(x, cos, sin))


def check_rope_of_pairs(name, inverse, norm):
    """Check the rotation of pairs, of a part of the head and of all of it."""
    layout, chip = CHIPS[name]
    for batch, tokens, heads, width, turned in ((2, 5, 3, 24, 12), (1, 1, 2, 16, 16)):
        x, angle = numbers(batch, tokens, heads, width), numbers(1, tokens, turned // 2)
        p = Rope(heads, width, turned, True, inverse, norm, eps=1e-6, dtype="f32")
        given = {"x": x, "cos": torch.cos(angle), "sin": torch.sin(angle)}
        y = run(rope_kernel(p, RowTile(2, 0), layout), chip, {"B": batch, "S": tokens}, **given)["y"]
        source = nn.rms_norm(x, torch.ones(width), eps=1e-6) if norm else x
        close(y, rope_pairs(source, torch.cos(angle), torch.sin(angle), inverse=inverse))


def check_before_cached_attention(name, joined, past, new, rotary, norm):
    """Check the kernel that norms and rotates queries and keys and appends keys and values to the cache."""
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


def check_attention(name, p, t, batch, past, new, mask=None, seed=0, tolerance=3e-6):
    """Simulate the kernel, and where the tile says so the merge, on random tensors; compare with the reference."""
    layout, chip = CHIPS[name]
    torch.manual_seed(seed)
    total = past + new
    shape = (batch, p.heads, new, p.width)
    q, key = torch.randn(shape), torch.randn(batch, p.groups, total, p.width)
    value = key[..., : p.value_width] if p.shared else torch.randn(batch, p.groups, total, p.value_width)
    if p.dtype == "bf16":
        q, key, value = bf16(q), bf16(key), bf16(value)
    sinks = torch.randn(p.heads) if p.sinks else None
    wanted = nn.attention(q, key, value, mask, sinks, scale=p.scale, window=p.window, chunk=p.chunk, softcap=p.softcap)
    room = torch.nn.functional.pad  # the cache has slots that are not used yet
    given = {"q": q if p.heads_first else q.transpose(1, 2), "key": room(key, (0, 0, 0, 3), value=9.0)}
    given |= {} if p.shared else {"value": room(value, (0, 0, 0, 3), value=9.0)}
    given |= {} if mask is None else {"mask": mask}
    given |= {} if sinks is None else {"sinks": sinks}
    scalars = {"B": batch, "S": new, "P": past, "C": total + 3}
    found = run(attention_kernel(p, t, layout), chip, scalars, **given)
    if t.split > 1:
        merged = attention_merge(p, RowTile(4, 32), layout, t.split)
        found = run(merged, chip, {"B": batch, "S": new}, **found)
    close(found["y"], wanted, tolerance)


def check_more_of_attention(name, more, split):
    """Check attention with some attributes, for a prompt, a token and a few tokens."""
    p = Attention(4, 2, 24, 12, 0.3, dtype="f32", **more)
    for past, new in ((0, 19), (33, 1), (7, 6)):
        check_attention(name, p, AttentionTile(16, 16, split=split), 2, past, new)


def check_masked_slots(name, more, split):
    """Check attention with a mask of keys: padding, nothing at all, a hole."""
    p = Attention(4, 2, 16, 16, 0.3, dtype="f32", mask="keys", **more)
    for past, new in ((0, 9), (10, 2)):
        mask = torch.ones(3, past + new, dtype=torch.bool)
        mask[0, :5], mask[1], mask[2, 3] = False, False, False  # padding, nothing at all, a hole
        check_attention(name, p, AttentionTile(16, 16, split=split), 3, past, new, mask)


def check_a_mask_for_each_token(name):
    """Check attention with a mask of tokens."""
    torch.manual_seed(1)
    mask = torch.rand(2, 7, 12) < 0.6
    mask[0, 2] = False
    check_attention(
        name, Attention(4, 2, 16, 16, 0.3, mask="tokens", dtype="f32"), AttentionTile(16, 16), 2, 5, 7, mask
    )


def check_values_in_the_latent(name, part):
    """Check attention whose values are the first numbers of its keys."""
    p = Attention(8, 1, 72, 64, 0.1, shared=True, dtype="f32")
    for past, new, split in ((0, 5, 1), (30, 1, 2)):
        check_attention(name, p, AttentionTile(16, 16, part, split=split), 2, past, new)


def pick(batch, new, past, ratio, slots):
    """Return i64[B, S, J]: distinct entries that are visible, in any order, -1 where there are not enough."""
    chosen = torch.full((batch, new, slots), -1)
    for row in range(batch):
        for token in range(new):
            seen = torch.randperm((past + token + 1) // ratio)[:slots]
            chosen[row, token, : len(seen)] = seen
    return chosen


def check_compressed(name, p, t, batch, past, new, tolerance=3e-6):
    """Simulate attention and the slide of the window; compare with the reference."""
    layout, chip = CHIPS[name]
    torch.manual_seed(past + new)
    old = min(past, p.window - 1)
    q, kv, window = (torch.randn(batch, *s) for s in ((new, p.heads, p.width), (new, p.width), (old, p.width)))
    sinks = torch.randn(p.heads)
    entries = torch.randn(batch, (past + new) // p.ratio, p.width) if p.ratio else None
    selected = pick(batch, new, past, p.ratio, min(5, entries.shape[1])) if p.selected else None
    if p.dtype == "bf16":
        q, kv, window, entries = (x if x is None else bf16(x) for x in (q, kv, window, entries))
    wanted, kept = compressed_reference(
        q, kv, window, entries, selected, sinks, scale=p.scale, window=p.window, past=past, ratio=p.ratio
    )
    scalars, given = {"B": batch, "S": new, "P": past}, {"q": q, "kv": kv, "window": window, "sinks": sinks}
    if p.ratio:
        scalars["C"] = entries.shape[1] + 2  # room for entries to come
        given["entries"] = torch.nn.functional.pad(entries, (0, 0, 0, 2), value=9.0)
    if p.selected:
        scalars["J"], given["selected"] = selected.shape[2], selected
    found = run(compressed_attention(p, t, layout), chip, scalars, **given)
    if t.split > 1:
        found = run(compressed_merge(p, RowTile(4, 16), layout, t.split), chip, {"B": batch, "S": new}, **found)
    close(found["y"], wanted, tolerance)
    sizes = {"B": batch, "O": old, "S": new, "Y": kept.shape[1]}
    moved = run(slide_kernel(p.width, RowTile(4, 16), layout, p.dtype), chip, sizes, old=window, new=kv)["kept"]
    close(moved, kept, 0)


def check_window_and_entries(name, split, ratio, selected):
    """Check attention to a window and compressed entries, for a prompt, a token and a few tokens."""
    p = Compressed(4, 24, 8, 0.3, ratio, selected, dtype="f32")
    for past, new in ((0, 1), (0, 11), (37, 1), (6, 3)):
        check_compressed(name, p, AttentionTile(16, 16, split=split), 2, past, new)
    check_compressed(
        name, Compressed(20, 16, 128, 0.3, ratio, selected, dtype="f32"), AttentionTile(16, 32, split=split), 1, 5, 3
    )
