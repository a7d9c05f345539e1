"""Kernels of attention to a window and compressed entries, on a chip of every family, equal the reference ops."""

import pytest
import torch
from chips_for_tests import CHIPS, bf16, close, run
from moec.compiler.ops.compressed import compressed_attention as reference
from moec.targets.accelerator.kernels.choices import AttentionTile, RowTile
from moec.targets.accelerator.kernels.compressed import Compressed, compressed_attention, compressed_merge, slide

chips = pytest.mark.parametrize("name", CHIPS)


def pick(batch, new, past, ratio, slots):
    """Return i64[B, S, J]: distinct entries that are visible, in any order, -1 where there are not enough."""
    chosen = torch.full((batch, new, slots), -1)
    for row in range(batch):
        for token in range(new):
            seen = torch.randperm((past + token + 1) // ratio)[:slots]
            chosen[row, token, : len(seen)] = seen
    return chosen


def check(name, p, t, batch, past, new, tolerance=3e-6):
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
    wanted, kept = reference(
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
    moved = run(slide(p.width, RowTile(4, 16), layout, p.dtype), chip, sizes, old=window, new=kv)["kept"]
    close(moved, kept, 0)


@chips
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("ratio", "selected"), [(0, False), (4, False), (8, False), (4, True)])
def test_window_and_entries(name, split, ratio, selected):
    p = Compressed(4, 24, 8, 0.3, ratio, selected, dtype="f32")
    for past, new in ((0, 1), (0, 11), (37, 1), (6, 3)):
        check(name, p, AttentionTile(16, 16, split=split), 2, past, new)
    check(name, Compressed(20, 16, 128, 0.3, ratio, selected, dtype="f32"), AttentionTile(16, 32, split=split), 1, 5, 3)


@chips
@pytest.mark.parametrize("selected", [False, True])
def test_heads_of_512_fit(name, selected):
    p = Compressed(16, 512, 128, 512**-0.5, 4, selected)
    check(name, p, AttentionTile(16, 16, stages=1), 1, 30, 2, 8e-3)
