"""What a program is counted to move: what a condition on the place in the grid guards counts where it holds."""

import pytest
from chips_for_tests import CHIPS
from moec.compiler.ir.activation import IDENTITY
from moec.targets.accelerator.kernels.choices import RowTile
from moec.targets.accelerator.kernels.latent import LatentAppend, latent_append
from moec.targets.accelerator.kernels.recurrent import Window, window_conv
from moec.targets.accelerator.kernels.rope import Append, qk_rope_append
from moec.targets.accelerator.tile.count import count_program

HOPPER = CHIPS["hopper"][0]
BATCH, NEW, PAST = 2, 128, 64
STEP = {"B": BATCH, "S": NEW, "P": PAST, "C": PAST + NEW}
TOKENS, BF16, F32 = BATCH * NEW, 2, 4


@pytest.mark.parametrize("joined", [True, False])
def test_each_head_is_loaded_and_stored_once(joined):
    """Of heads of q, k and v each point of the grid has one, in one of three branches."""
    p = Append(8, 2, 64, 64, joined=joined)
    counts = count_program(qk_rope_append(p, RowTile(16, 64), HOPPER), STEP, {})
    loaded = {"qkv": 12} if joined else {"q": 8, "k": 2, "v": 2}
    for name, heads in loaded.items():
        assert counts.loaded[name] == TOKENS * heads * 64 * BF16
    # both halves of a head that is rotated read both halves' angles
    assert counts.loaded["cos"] == counts.loaded["sin"] == TOKENS * 10 * 64 * F32
    assert counts.stored == {
        name: pytest.approx(TOKENS * heads * 64 * BF16) for name, heads in (("y", 8), ("key", 2), ("value", 2))
    }


def test_rows_of_queries_and_of_keys():
    p = LatentAppend(4, 48, 32, 16, 1e-6)
    counts = count_program(latent_append(p, RowTile(16, 1), HOPPER), STEP, {})
    assert counts.loaded["q"] == pytest.approx(TOKENS * 4 * 16 * BF16)
    assert counts.loaded["kv"] == pytest.approx(TOKENS * 48 * BF16)
    assert counts.stored["latent"] == pytest.approx(TOKENS * 32 * BF16)


def test_a_state_is_stored_by_the_first_points():
    p = Window(64, 4, 4, IDENTITY)
    counts = count_program(window_conv(p, RowTile(16, 64), HOPPER), {"B": BATCH, "S": NEW}, {})
    assert counts.stored["present"] == pytest.approx(BATCH * 64 * 4 * F32)
    assert counts.stored["y"] == TOKENS * 64 * BF16


def test_where_only_the_number_of_points_is_known():
    """A condition on an axis of which some points do nothing counts as true: these may be any."""
    p = Append(8, 2, 64, 64)
    counts = count_program(qk_rope_append(p, RowTile(16, 64), HOPPER), STEP, {"head": 6})
    assert counts.loaded["q"] == counts.loaded["v"] == TOKENS * 6 * 64 * BF16
