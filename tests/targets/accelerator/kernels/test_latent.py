"""Latent attention: its kernels on a chip of every family, and both of its forms as an artifact runs them, on one cache."""

import json

import numpy as np
import pytest
import torch
from chips_for_tests import CHIPS, bf16, close, named, run, weight
from kernel_checks import numbers
from moec.compiler.ops import OPS, nn
from moec.compiler.text.parser import parse_module
from moec.targets import declare_kernel_ops
from moec.targets.accelerator.artifact.spec import kernel_specs
from moec.targets.accelerator.chip.profile import find_profile
from moec.targets.accelerator.kernels import latent
from moec.targets.accelerator.kernels.attention import Attention, attention_kernel
from moec.targets.accelerator.kernels.choices import AttentionTile, RowTile, Tile
from moec.targets.accelerator.kernels.latent import Expand, LatentAppend, expand_kernel, latent_append
from moec.targets.accelerator.run.artifact import Weights, read_kernels
from moec.targets.accelerator.run.executor import Executor
from moec.targets.accelerator.run.launchers import Simulated
from moec.targets.accelerator.run.slots import tensor_of
from moec.targets.accelerator.select import latent as select_latent
from moec.targets.accelerator.tile.packing import Packing
from moec.targets.accelerator.tile.serialize import program_from_json, program_to_json

declare_kernel_ops()
chips = pytest.mark.parametrize("name", CHIPS)


@chips
@pytest.mark.parametrize("form", ["bf16", "int4_g128", "int8_g64", "fp8_b128"])
@pytest.mark.parametrize("turned", [False, True])
def test_keys_and_values_of_latents(name, form, turned):
    layout, chip = CHIPS[name]
    heads, rows, depth, batch, past, new = 2, 40, 48, 2, 9, 3
    cached = bf16(numbers(batch, 1, past + new + 4, depth))  # with slots that are not used yet
    packing = Packing(form, heads * (depth if turned else rows), rows if turned else depth)
    parts, w = weight(packing, np.random.default_rng(0))
    each = bf16(w).reshape(heads, -1, w.shape[-1])
    each = each.transpose(1, 2) if turned else each
    p = Expand(heads, rows, depth, packing, turned)
    tile = Tile(16, max(packing.step, 32), 32) if turned else Tile(16, 32, max(packing.step, 32))
    scalars = {"B": batch, "S": new, "P": past, "C": past + new + 4}
    y = run(expand_kernel(p, tile, layout), chip, scalars, latent=cached, **named(parts, "w"))["y"]
    close(y, torch.einsum("btr,hnr->bhtn", cached[:, 0, : past + new], each), 5e-3)


def test_a_window_leaves_out_what_no_new_token_sees():
    layout, chip = CHIPS["hopper"]
    parts, w = weight(Packing("bf16", 32, 16), np.random.default_rng(0))
    p, cached = Expand(2, 16, 16, Packing("bf16", 32, 16), window=4), bf16(numbers(1, 1, 12, 16))
    scalars = {"B": 1, "S": 2, "P": 10, "C": 12}
    y = run(expand_kernel(p, Tile(16, 16, 16), layout), chip, scalars, latent=cached, **named(parts, "w"))["y"]
    made = torch.tensor(y.astype(np.float32))
    close(made[:, :, 7:], torch.einsum("btr,hnr->bhtn", cached[:, 0, 7:], bf16(w).reshape(2, 16, 16)), 5e-3)
    assert (made[:, :, :7] == 77).all()  # as the simulator gave it


@chips
@pytest.mark.parametrize(("past", "new", "split"), [(0, 5, 1), (20, 1, 4), (7, 3, 1)])
@pytest.mark.parametrize("expanded", [False, True])
def test_a_part_with_positions_lies_apart(name, past, new, split, expanded):
    layout, chip = CHIPS[name]
    batch, heads, width, rope, row = 2, 4, 32, 16, 40
    groups, total = heads if expanded else 1, past + new
    p = Attention(
        heads, groups, width, 24 if expanded else width, 0.2, mask="keys", shared=not expanded, rope=rope, row=row,
        dense=expanded, dtype="f32",
    )  # fmt: skip
    torch.manual_seed(0)
    q, key, turned = (
        torch.randn(batch, heads, new, row),
        torch.randn(batch, groups, total, width),
        torch.randn(batch, 1, total, rope),
    )
    q_rope, mask = torch.randn(batch, heads, new, rope), torch.rand(batch, total) < 0.8
    value = torch.randn(batch, heads, total, 24) if expanded else key
    room = torch.nn.functional.pad
    spare = (0, 0, 0, 0 if expanded else 3)
    given = {"q": q.transpose(1, 2), "q_rope": q_rope, "key": room(key, spare, value=9.0), "mask": mask}
    given |= {"key_rope": room(turned, (0, 0, 0, 3), value=9.0)} | ({"value": value} if expanded else {})
    scalars = {"B": batch, "S": new, "P": past, "C": total + 3}
    found = run(attention_kernel(p, AttentionTile(16, 16, 16, split=split), layout), chip, scalars, **given)
    queries = torch.cat((q[..., :width], q_rope), 3)
    keys = torch.cat((key, turned.expand(-1, groups, -1, -1)), 3)
    wanted = nn.attention(queries, keys, value, mask, None, scale=0.2)
    close(merged(found, wanted.shape) if split > 1 else found["y"], wanted, 3e-6)


@chips
@pytest.mark.parametrize(("past", "new", "split"), [(0, 9, 1), (30, 1, 4), (21, 3, 1)])
@pytest.mark.parametrize("best_first", [False, True])
def test_only_chosen_tokens_are_read(name, past, new, split, best_first):
    """What is not chosen is not read: it is no number."""
    layout, chip = CHIPS[name]
    batch, heads, width, rope, chosen, total = 2, 20, 32, 16, 6, past + new
    p = Attention(
        heads,
        1,
        width,
        width,
        0.2,
        mask="tokens",
        shared=True,
        rope=rope,
        selected=True,
        best_first=best_first,
        dtype="f32",
    )
    torch.manual_seed(0)
    q, q_rope = torch.randn(batch, new, heads, width), torch.randn(batch, heads, new, rope)
    key, turned = torch.randn(batch, 1, total + 3, width), torch.randn(batch, 1, total + 3, rope)
    mask = torch.ones(batch, new, total).tril(past).bool() & (torch.rand(batch, 1, total) < 0.8)
    scores = torch.rand(batch, new, total + chosen).masked_fill(~torch.nn.functional.pad(mask, (0, chosen)), -1.0)
    slots = scores.topk(chosen).indices if best_first else scores.topk(chosen).indices.flip(-1)
    read = torch.zeros(batch, total + chosen).scatter(1, slots.flatten(1), 1.0)[:, :total]
    unread = torch.nn.functional.pad(read == 0, (0, 3), value=True)[:, None, :, None]
    given = {"q": q, "q_rope": q_rope, "mask": mask, "selected": slots.int()}
    given |= {"key": key.masked_fill(unread, torch.nan), "key_rope": turned.masked_fill(unread, torch.nan)}
    scalars = {"B": batch, "S": new, "P": past, "C": total + 3, "J": chosen}
    found = run(attention_kernel(p, AttentionTile(16, 16, 16, split=split), layout), chip, scalars, **given)
    queries = torch.cat((q.transpose(1, 2), q_rope), 3)
    keys = torch.cat((key, turned), 3)[:, :, :total]
    seen = mask & torch.zeros(batch, new, total + chosen).bool().scatter(2, slots, True)[..., :total]
    wanted = nn.attention(queries, keys, keys[..., :width], seen, None, scale=0.2)
    close(merged(found, wanted.shape) if split > 1 else found["y"], wanted, 3e-6)


def merged(found, shape):
    """Return the result of the portions of a split, as attention_merge gives it."""
    tops, totals, sums = (torch.tensor(found[n]) for n in ("tops", "totals", "portions"))
    weights = torch.exp2(tops - tops.amax(0))
    weights = weights.nan_to_num(0.0)  # of a portion of a token that sees nothing
    y = (sums * weights[..., None]).sum(0) / (totals * weights).sum(0)[:, None]
    return y.reshape(shape).numpy()


def turns(*shape):
    """Return cosines and sines of angles, each of which is there twice."""
    angle = numbers(*shape[:-1], shape[-1] // 2)
    return tuple(f(torch.cat((angle, angle), -1)) for f in (torch.cos, torch.sin))


@chips
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("past", "new", "own"), [(0, 5, True), (6, 1, False)])
def test_new_tokens_are_rotated_normed_and_appended(name, pairs, past, new, own):
    layout, chip = CHIPS[name]
    batch, heads, row, width, rope = 2, 3, 20, 24, 12
    q, kv, norm = numbers(batch, new, heads * row), numbers(batch, new, width + rope), numbers(width)
    caches = numbers(batch, 1, past, width), numbers(batch, 1, past, rope)
    cos, sin = turns(batch if own else 1, new, rope)
    p = LatentAppend(heads, row, width, rope, 1e-5, pairs, own, dtype="f32")
    room = [torch.cat((cache, torch.full((batch, 1, new + 2, cache.shape[3]), 9.0)), 2) for cache in caches]
    given = {"q": q, "kv": kv, "norm": norm, "cos": cos, "sin": sin, "latent": room[0], "key_rope": room[1]}
    scalars = {"B": batch, "S": new, "P": past, "C": past + new + 2}
    found = run(latent_append(p, RowTile(2, 0), layout), chip, scalars, **given)
    wanted = OPS["acc.latent_append"].reference(q, kv, norm, *caches, cos, sin, heads=heads, eps=1e-5, pairs=pairs)
    close(found["q_rope"], wanted[0])
    for made, cache in zip((found["latent"], found["key_rope"]), wanted[1:], strict=True):
        close(made[:, :, : past + new], cache)
        assert (made[:, :, past + new :] == 9).all()


# --- both forms on one cache ---------------------------------------------------------------------------------------

MODULE = """moec 1 stage kernel
dim B in 1..4
dim S in 1..64
dim P in 0..64
func @main(%q: f32[B, S, 72], %kv: f32[B, S, 40], %norm: f32[32], %cos: f32[1, S, 8], %sin: f32[1, S, 8], %mask: bool[B, P + S], %past: state f32[B, 1, P, 32], %past_rope: state f32[B, 1, P, 8])
    -> (f32[B, S, 48], state f32[B, 1, P + S, 32], state f32[B, 1, P + S, 8]) {
  const %w_uk : bf16[96, 16] = tensor("w_uk", bf16[96, 16])
  const %w_uv : bf16[48, 32] = tensor("w_uv", bf16[48, 32])
  %q_rope, %latent, %rope = acc.latent_append(%q, %kv, %norm, %past, %past_rope, %cos, %sin) {heads=3, eps=1e-06, pairs=true} : f32[B, 3, S, 8], state f32[B, 1, P + S, 32], state f32[B, 1, P + S, 8]
  %y = acc.latent_attention(%q, %q_rope, %latent, %rope, %w_uk, %w_uv, %mask, _, _) {heads=3, scale=0.2} : f32[B, S, 48]
  return %y, %latent, %rope
}
"""
STEPS = (11, 1, 34, 1, 1)  # new tokens: few, then one, then many, then one by one


class Recorded(Simulated):
    """A simulator that keeps the names of the kernels that it ran."""

    def __init__(self, kernels):
        super().__init__(kernels)
        self.names = []

    def __call__(self, launch, tensors, scalars):
        self.names.append(launch.name)
        super().__call__(launch, tensors, scalars)


def differences(target, folder):
    """Return how far each step is off, relative to the largest number, and the kernels that each of them ran."""
    module = parse_module(MODULE)
    made = kernel_specs(module, find_profile(target, {}), (4, 128))
    (folder / "kernels.json").write_text(json.dumps(made.to_json()))
    kernels = read_kernels(folder)
    w_uk, w_uv = (bf16(numbers(*shape) * 0.2) for shape in ((96, 16), (48, 32)))
    launcher = Recorded(kernels)
    packings = next(k.weights for k in made.kernels if k.weights)
    packed = {n: packings[n].pack(w.numpy())[""] for n, w in (("w_uk", w_uk), ("w_uv", w_uv))}
    parts = {n: {"": torch.tensor(a.astype(np.float32)).bfloat16()} for n, a in packed.items()}
    executor = Executor(module, kernels, Weights(("main",), {"main": parts}), launcher)
    held = [torch.zeros(2, 1, 0, n, dtype=torch.bfloat16) for n in (32, 8)]
    kept = [torch.zeros(2, 1, 0, n) for n in (32, 8)]
    off, ran = [], []
    for past, new in zip(np.cumsum((0, *STEPS)), STEPS, strict=False):
        q, kv, norm = bf16(numbers(2, new, 72)), bf16(numbers(2, new, 40)), numbers(32)
        cos, sin = turns(1, new, 8)
        mask = torch.rand(2, past + new) < 0.9
        y, *held = executor.run([q, kv, norm, cos, sin, mask, *held], {"B": 2, "S": new, "P": int(past)})
        q_rope, *kept = OPS["acc.latent_append"].reference(q, kv, norm, *kept, cos, sin, heads=3, eps=1e-6, pairs=True)
        wanted = OPS["acc.latent_attention"].reference(
            q, q_rope, *kept, w_uk, w_uv, mask, None, None, heads=3, scale=0.2
        )
        off.append(float((tensor_of(y).float() - wanted).abs().max() / wanted.abs().max()))
        ran.append(launcher.names[:])
        launcher.names.clear()
    return off, ran


TARGETS = (
    "nvidia-h200",
    "ascend-950dt",
    *(pytest.param(n, marks=pytest.mark.long) for n in ("amd-mi355x", "cambricon-mlu370")),
)


@pytest.mark.parametrize("target", TARGETS)
def test_both_forms_read_one_cache(target, tmp_path):
    off, ran = differences(target, tmp_path)
    assert max(off) < 0.02, off
    expanded = [any("expand" in name for name in names) for names in ran]
    assert expanded == [False, False, True, False, False]
    assert [any("absorb" in name for name in names) for names in ran] == [not e for e in expanded]


def shifted(p, t, layout):
    """Return the kernel with an append that begins at slot 0."""
    data = json.dumps(program_to_json(latent.latent_append(p, t, layout)), ensure_ascii=False)
    assert "P + token" in data
    return program_from_json(json.loads(data.replace("P + token", "token")))


def without_positions(p, t, layout):
    """Return the kernel without the append of the part with positions."""
    original = latent._rotate

    def only_queries(b, p, t, source, at, first, target, to):
        if target == "q_rope":
            original(b, p, t, source, at, first, target, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "_rotate", only_queries)
        return latent.latent_append(p, t, layout)


@pytest.mark.parametrize("faulty", [shifted, without_positions])
def test_a_fault_of_the_append_is_caught(faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(select_latent, "latent_append", faulty)
    off, _ = differences("nvidia-h200", tmp_path)
    assert max(off) > 0.1, off
