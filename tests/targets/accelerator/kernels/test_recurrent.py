"""Kernels of recurrent layers, simulated on chips of three families, equal the reference ops of the program before it is lowered."""

from dataclasses import replace

import pytest
import torch
from chips_for_tests import CHIPS, close, run
from moec.compiler.ir.activation import Activation
from moec.compiler.ops.recurrent import causal_conv, conv_window
from moec.compiler.ops.recurrent import linear_attention as plain
from moec.targets.accelerator.kernels.choices import RowTile, Tile
from moec.targets.accelerator.kernels.chunked import chunked_attention, goes_by_chunks
from moec.targets.accelerator.kernels.recurrent import Recurrence, Window, linear_attention, window_conv

chips = pytest.mark.parametrize("name", ("hopper", "ascend-950", "cambricon"))


@chips
@pytest.mark.parametrize(
    ("taps", "kept", "kind", "bias"), [(4, 4, "silu", True), (3, 3, "identity", False), (4, 3, "silu", False)]
)
def test_windows(name, taps, kept, kind, bias):
    """Of a prompt, a token and fewer tokens than the window holds, behind a state."""
    layout, chip = CHIPS[name]
    torch.manual_seed(taps)
    for batch, new, tile in ((2, 11, RowTile(4, 8)), (3, 1, RowTile(1, 16)), (1, 2, RowTile(4, 8))):
        x, past, w = torch.randn(batch, new, 12), torch.randn(batch, 12, kept), torch.randn(12, taps)
        b = torch.randn(12) if bias else None
        whole, present = conv_window(past, x.transpose(1, 2))
        wanted = causal_conv(whole, w, b)[:, :, kept:].transpose(1, 2)
        p = Window(12, taps, kept, Activation(kind, gated=False), bias, dtype="f32")
        given = {"x": x, "past": past, "taps": w, **({"b": b} if bias else {})}
        found = run(window_conv(p, tile, layout), chip, {"B": batch, "S": new}, **given)
        close(found["y"], torch.nn.functional.silu(wanted) if kind == "silu" else wanted)
        close(found["present"], present)


KINDS = {
    "lightning": Recurrence(4, 4, 8, 8, decay=1),
    "mamba 2": Recurrence(6, 2, 12, 8, decay=1),
    "mamba": Recurrence(10, 1, 8, 1, decay=1, rate=True),
    "gated delta rule": Recurrence(4, 4, 12, 10, scale=0.3, decay=1, delta=True),
    "delta rule with a decay a channel": Recurrence(4, 4, 8, 8, scale=0.3, decay=8, delta=True),
    "no decay": Recurrence(3, 3, 8, 8),
}


@chips
@pytest.mark.parametrize("kind", KINDS)
def test_linear_attention(name, kind):
    """Of a prompt and of a token behind a state; tiles have some heads or some columns of one."""
    p = replace(KINDS[kind], out="f32")
    for batch, new, tile in ((2, 7, Tile(4, 16, 1)), (1, 1, Tile(1, 4, 1))):
        check_recurrence(p, linear_attention, tile, name, batch, new)


@chips
@pytest.mark.parametrize("kind", [kind for kind, p in KINDS.items() if goes_by_chunks(p)])
def test_linear_attention_by_chunks(name, kind):
    """Of a prompt of whole chunks and one that ends inside of one; bf16 has 8 bits of what is multiplied."""
    p = replace(KINDS[kind], out="f32")
    for batch, new, tile in ((2, 32, Tile(16, 16, 16)), (1, 21, Tile(16, 16, 16))):
        check_recurrence(p, chunked_attention, tile, name, batch, new, 1e-2)


def check_recurrence(p, kernel, tile, name, batch, new, tolerance=2e-5):
    """Assert that a kernel gives what the op does, behind a state."""
    layout, chip = CHIPS[name]
    torch.manual_seed(p.heads)
    q, k = (torch.randn(batch, new, p.groups, p.width) for _ in "qk")
    k = k / k.norm(dim=-1, keepdim=True)
    v, past = torch.randn(batch, new, p.heads, p.value_width), torch.randn(batch, p.heads, p.width, p.value_width)
    given = {"q": q, "k": k, "v": v, "past": past}
    decay = -torch.rand(batch, new, p.heads, p.decay) if p.decay else None
    given |= {"decay": decay} if p.decay else {}
    given |= {"rate": torch.rand(p.heads, p.width)} if p.rate else {}
    given |= {"beta": torch.rand(batch, new, p.heads)} if p.delta else {}
    found = run(kernel(p, tile, layout), chip, {"B": batch, "S": new}, **given)
    whole = decay * given["rate"] if p.rate else decay
    wide = [x.repeat_interleave(p.heads // p.groups, 2) for x in (q, k)]
    wanted, present = plain(*wide, v, whole, given.get("beta"), past, scale=p.scale)
    close(found["y"], wanted, tolerance)
    close(found["present"], present, tolerance)
