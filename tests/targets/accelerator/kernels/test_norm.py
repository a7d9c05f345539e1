"""Kernels of norms and of rotary heads, simulated on a chip of every family, equal the reference ops."""

import numpy as np
import pytest
import torch
from chips_for_tests import CHIPS, bf16, close, run
from kernel_checks import check_before_cached_attention, check_norms, check_rope_of_halves, check_rope_of_pairs, numbers
from moec.compiler.ops import nn
from moec.targets.accelerator.kernels.choices import RowTile
from moec.targets.accelerator.kernels.norm import Norm, add_rms_norm

chips = pytest.mark.parametrize("name", CHIPS)


@chips
@pytest.mark.parametrize("tile", [RowTile(2, 64), RowTile(4, 16)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_norms(name, tile, tokens):
    check_norms(name, tile, tokens)


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
    check_rope_of_halves(name, own)


@chips
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_of_pairs(name, inverse, norm):
    check_rope_of_pairs(name, inverse, norm)


@chips
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    ("past", "new", "rotary", "norm"), [(0, 5, 8, True), (3, 1, 12, False), (6, 4, 0, True), (0, 1, 6, False)]
)
def test_what_stands_before_cached_attention(name, joined, past, new, rotary, norm):
    check_before_cached_attention(name, joined, past, new, rotary, norm)
