"""What the cache loses between two uses: the formula against a cache that is simulated tile by tile."""

from collections import OrderedDict
from itertools import product

import pytest
from chips_for_tests import CHIPS, profile_of
from moec.targets.accelerator.kernels.choices import Tile
from moec.targets.accelerator.kernels.dense import Linear, linear_kernel
from moec.targets.accelerator.kernels.experts import Experts, grouped_up
from moec.targets.accelerator.kernels.order import axis_of_tiles
from moec.targets.accelerator.predict.experts_touched import expected_tiles
from moec.targets.accelerator.predict.rereads import KEPT, cache_capacity, device_bytes
from moec.targets.accelerator.select.dense import linear_implementations
from moec.targets.accelerator.select.implementations import Tokens
from moec.targets.accelerator.select.search import search_tile
from moec.targets.accelerator.tile.count import count_program
from moec.targets.accelerator.tile.packing import Packing

LAYOUT = CHIPS["hopper"][0]
ROWS, DEPTH, TOKENS = 4096, 512, 2048


def product_of(group):
    p = Linear(ROWS, DEPTH, Packing("bf16", ROWS, DEPTH))
    program = linear_kernel(p, Tile(128, 128, 64, group=group), LAYOUT)
    return program, count_program(program, {"T": TOKENS}, {})


def simulated(group, capacity):
    """Return the bytes that a cache of least recent use loads for the tiles of x and the weight, point by point."""
    tiles, columns = TOKENS // 128, ROWS // 128
    held, size, loaded = OrderedDict(), 128 * DEPTH * 2, 0
    for panel, column, beside in product(range(-(-tiles // group)), range(columns), range(group)):
        tile = panel * group + beside
        for used in (("x", tile), ("w", column)):
            if used not in held:
                loaded += size
            held[used] = True
            held.move_to_end(used)
        held[("y", tile, column)] = True  # what is written passes the cache too
        while sum(128 * 128 * 2 if key[0] == "y" else size for key in held) > capacity:
            held.popitem(last=False)
    return loaded


@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("capacity", [1 << 20, 1 << 24])
def test_a_product_against_a_simulated_cache(group, capacity):
    program, counts = product_of(group)
    written = TOKENS * ROWS * 2
    found = device_bytes(program, counts, {"T": TOKENS}, {}, capacity / KEPT, 1) - written
    # a least recent use loses all of what nearly fits, the formula the part that does not
    assert 0.5 * simulated(group, capacity) <= found <= 1.1 * simulated(group, capacity)
    plain, plain_counts = product_of(1)
    assert device_bytes(plain, plain_counts, {"T": TOKENS}, {}, capacity / KEPT, 1, group) - written == pytest.approx(
        found
    )


def test_without_a_cache_that_is_known_each_number_counts_once():
    program, counts = product_of(1)
    once = 2 * (ROWS * DEPTH + TOKENS * DEPTH + TOKENS * ROWS)
    assert device_bytes(program, counts, {"T": TOKENS}, {}, None, 1) == once
    assert device_bytes(program, counts, {"T": TOKENS}, {}, 1 << 30, 1) == once
    assert device_bytes(program, counts, {"T": TOKENS}, {}, 1 << 20, 1) > 3 * once


def test_points_that_run_together_read_a_weight_once():
    program, counts = product_of(1)
    apart, together = (device_bytes(program, counts, {"T": TOKENS}, {}, 1 << 20, n) for n in (1, 32 * 16))
    assert together == 2 * (ROWS * DEPTH + TOKENS * DEPTH + TOKENS * ROWS) < apart


def test_an_experts_weight_stays_for_its_next_tile_of_rows():
    """Tiles of one expert follow each other: its weight comes again only where one expert is more than the cache keeps."""
    e = Experts(8, 2, 2048, 1024, Packing("bf16", 2048, 2048, 8), Packing("bf16", 2048, 1024, 8))
    tiles = expected_tiles(8, 2, 4096, 64)
    for group in (1, 4):
        program = grouped_up(e, Tile(64, 128, 64, group=group), LAYOUT)
        counts = count_program(program, {"T": 4096}, axis_of_tiles(group, tiles))
        large, none = (device_bytes(program, counts, {"T": 4096}, {}, n, 1) for n in (64 << 20, None))
        assert large <= 1.5 * none
    assert counts.points == pytest.approx(tiles * 8)


def test_a_long_prompts_output_matrix_is_read_by_many_rows_at_once():
    profile = profile_of("nvidia-h200")
    p = Linear(151936, 2048, Packing("bf16", 151936, 2048))
    (whole,) = linear_implementations(p, Tokens(1, 8192, 0))
    best = search_tile(whole.kernels[0], profile).best
    # in the plain order 64 tiles of rows stream the whole weight, which takes longer than the product
    assert best.tile.group > 1 and best.prediction.memory <= best.prediction.cores
    assert best.prediction.device_bytes < 2 * 8192 * (2048 + 151936) + 20 * p.weight.bytes
    assert 2 * 8192 * 2048 * 151936 / 989.4e12 < best.prediction.time < 8e-3
    first, *_ = linear_implementations(p, Tokens(1, 1, 0))
    assert search_tile(first.kernels[0], profile).best.tile.group == 1
    assert cache_capacity(profile) == 60 << 20
