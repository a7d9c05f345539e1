"""Kernels of attention to a window and compressed entries, on a chip of every family, equal the reference ops."""

import pytest
from chips_for_tests import CHIPS
from kernel_checks import check_compressed, check_window_and_entries
from moec.targets.accelerator.kernels.choices import AttentionTile
from moec.targets.accelerator.kernels.compressed import Compressed

chips = pytest.mark.parametrize("name", CHIPS)


@chips
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("ratio", "selected"), [(0, False), (4, False), (8, False), (4, True)])
def test_window_and_entries(name, split, ratio, selected):
    check_window_and_entries(name, split, ratio, selected)


@chips
@pytest.mark.parametrize("selected", [False, True])
def test_heads_of_512_fit(name, selected):
    p = Compressed(16, 512, 128, 512**-0.5, 4, selected)
    check_compressed(name, p, AttentionTile(16, 16, stages=1), 1, 30, 2, 8e-3)
