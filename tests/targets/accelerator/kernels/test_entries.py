"""Kernels that make, score and choose compressed entries, on a chip of every family, equal the reference ops."""

import numpy as np
import pytest
import torch
from chips_for_tests import CHIPS, close, run
from moec.compiler.errors import MoecError
from moec.compiler.ops.compressed import compress_tokens as compress_reference
from moec.compiler.ops.compressed import select_entries
from moec.targets.accelerator.kernels.choices import AttentionTile, RowTile
from moec.targets.accelerator.kernels.compressed import slide_kernel
from moec.targets.accelerator.kernels.entries import Compress, Select, choose_entries, compress_tokens, entry_scores

chips = pytest.mark.parametrize("name", CHIPS)


@chips
@pytest.mark.parametrize(
    ("heads", "width", "k", "past", "new"), [(4, 24, 2, 0, 14), (12, 16, 6, 61, 1), (3, 40, 6, 30, 3), (4, 16, 6, 4, 1)]
)
def test_selected_entries(name, heads, width, k, past, new):
    layout, chip = CHIPS[name]
    torch.manual_seed(past + heads)
    p = Select(heads, width, k, 4, "f32")
    entries = (past + new) // p.ratio
    q, keys = torch.randn(2, new, heads, width), torch.randn(2, entries, width)
    weights = torch.randn(2, new, heads)
    scalars = {"B": 2, "S": new, "P": past, "C": entries + 1}
    room = torch.nn.functional.pad(keys, (0, 0, 0, 1), value=9.0)
    found = run(entry_scores(p, AttentionTile(16, 16), layout), chip, scalars, q=q, keys=room, weights=weights)[
        "scores"
    ]
    ids = run(choose_entries(p, 8, layout), chip, {"B": 2, "S": new, "E": entries}, scores=found)["ids"]
    wanted = select_entries(q, keys, weights, k=k, ratio=4, past=past)
    assert torch.equal(torch.tensor(ids).sort(-1).values, wanted.int().sort(-1).values)


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_the_lower_one_of_equal_scores_is_chosen(k):
    layout, chip = CHIPS["hopper"]
    scores = np.array([[[2, -1, -0.0, 2, -0.5, 1e-30, -1e30, 2, 0.0, -np.inf, 3e38, -np.inf, -2]]], np.float32)
    ids = run(choose_entries(Select(1, 16, k, 4), 4, layout), chip, {"B": 1, "S": 1, "E": 13}, scores=scores)["ids"][
        0, 0
    ]
    best = np.argsort(-scores[0, 0], kind="stable")[:k]
    wanted = [-1 if scores[0, 0, i] == -np.inf else i for i in sorted(best)]
    assert ids.tolist() == wanted


def test_a_tile_holds_the_heads_of_a_token():
    with pytest.raises(MoecError, match="does not hold the 20 heads"):
        entry_scores(Select(20, 16, 4, 4), AttentionTile(16, 16), CHIPS["hopper"][0])


@chips
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("steps", [(9, 1, 1, 1), (3, 1, 10), (17,)], ids=str)
def test_entries_made_in_steps(name, overlap, steps):
    layout, chip = CHIPS[name]
    torch.manual_seed(len(steps))
    p = Compress(24, 4, 5, overlap, 1e-6, "f32")
    wide = 24 * (2 if overlap else 1)
    bias, norm = torch.randn(4, wide), torch.randn(24)
    pending, entries, past = torch.randn(2, 4 if overlap else 0, 2 * wide), torch.zeros(2, 0, 24), 0
    for new in steps:
        x = torch.randn(2, new, 2 * wide)
        count = (past + new) // 4 - past // 4
        angle = torch.randn(count, 5)
        given = {
            "x": x,
            "pending": pending,
            "bias": bias,
            "norm": norm,
            "cos": torch.cos(angle),
            "sin": torch.sin(angle),
        }
        kept, all_entries = compress_reference(**given, entries=entries, ratio=4, past=past, overlap=overlap, eps=1e-6)
        room = torch.nn.functional.pad(entries, (0, 0, 0, count + 1), value=9.0)
        scalars = {"B": 2, "S": new, "P": past, "C": room.shape[1]}
        found = run(compress_tokens(p, RowTile(4 if new > 1 else 2, 0), layout), chip, scalars, **given, entries=room)
        close(found["entries"][:, :-1], all_entries)
        assert (found["entries"][:, -1] == 9).all()
        sizes = {"B": 2, "O": pending.shape[1], "S": new, "Y": kept.shape[1]}
        close(
            run(slide_kernel(2 * wide, RowTile(4, 32), layout, "f32"), chip, sizes, old=pending, new=x)["kept"], kept, 0
        )
        pending, entries, past = kept, all_entries, past + new
