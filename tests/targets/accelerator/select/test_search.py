"""The tiling search: what it finds fits the chip, for any size; and it finds what a person would."""

import numpy as np
import pytest
from chips_for_tests import check_fits, profile_of
from hypothesis import given, settings
from hypothesis import strategies as st
from moec.compiler.errors import MoecError
from moec.compiler.text.parser import parse_module
from moec.targets import declare_kernel_ops
from moec.targets.accelerator.artifact.spec import kernel_specs
from moec.targets.accelerator.chip.profile import find_profile, profile_names
from moec.targets.accelerator.kernels.chunked import chunked_attention
from moec.targets.accelerator.kernels.dense import Linear
from moec.targets.accelerator.kernels.experts import Experts, grouped_up
from moec.targets.accelerator.kernels.recurrent import Recurrence, linear_attention
from moec.targets.accelerator.predict.experts_touched import distinct_experts, expected_tiles
from moec.targets.accelerator.select.dense import linear_implementations
from moec.targets.accelerator.select.experts import touched_shares
from moec.targets.accelerator.select.implementations import Tokens
from moec.targets.accelerator.select.search import KernelTemplate, row_choices, search_tile, tile_shapes
from moec.targets.accelerator.tile.packing import Packing

FORMATS = ("bf16", "int4_g128", "fp8_b128", "mxfp4")


def kernel_of(hidden, inner, experts, chosen, format, tokens):
    e = Experts(
        experts,
        chosen,
        hidden,
        inner,
        Packing(format, 2 * inner, hidden, experts),
        Packing(format, hidden, inner, experts),
    )
    return KernelTemplate(
        "grouped_up", lambda t, layout: grouped_up(e, t, layout), {"T": tokens},
        tile_shapes(row_choices(tokens * chosen / experts), e.up.step),
        lambda t: {"tile": expected_tiles(experts, chosen, tokens, t.m)}, touched_shares(e, "up", tokens),
    )  # fmt: skip


@pytest.mark.parametrize("name", profile_names())
@settings(max_examples=4, deadline=None)
@given(
    hidden=st.integers(16, 5000), inner=st.integers(8, 3000), experts=st.sampled_from([4, 60, 64, 256]),
    format=st.sampled_from(FORMATS), tokens=st.sampled_from([1, 5, 64, 700, 8192]),
)  # fmt: skip
def test_what_is_found_fits(name, hidden, inner, experts, format, tokens):
    profile = profile_of(name)
    found = search_tile(kernel_of(hidden, inner, experts, 2, format, tokens), profile)
    for choice in (found.best, *found.others):
        check_fits(choice, profile)
    assert found.fitting <= found.tried
    times = [c.prediction.time for c in (found.best, *found.others)]
    assert min(times) > 0
    assert found.best.prediction.time <= 1.1 * min(times)


@pytest.mark.parametrize("name", profile_names())
def test_linears_fit(name):
    profile = profile_of(name)
    p = Linear(1000, 777, Packing("bf16", 1000, 777))
    for tokens in (Tokens(1, 1, 10), Tokens(1, 2000, 0)):
        for way in linear_implementations(p, tokens):
            for kernel in way.kernels:
                check_fits(search_tile(kernel, profile).best, profile)


def test_decoding_is_bound_by_memory_and_prefill_is_not():
    profile = profile_of("nvidia-h200")
    one = search_tile(kernel_of(2048, 1024, 64, 8, "bf16", 4), profile).best.prediction
    weights = 2 * 2048 * 2048 * distinct_experts(64, 8, 4)
    assert one.bound == "memory"
    assert weights <= one.device_bytes <= 1.01 * weights
    assert one.time >= weights / 4.8e12
    many = search_tile(kernel_of(2048, 1024, 64, 8, "bf16", 8192), profile).best
    assert many.prediction.bound in ("matrix", "cache")
    assert many.prediction.flops >= 2 * 8192 * 8 * 2048 * 2048
    assert many.tile.m >= 64  # below, the fast instructions of the matrix unit are out of reach
    assert many.prediction.time >= 2 * 8192 * 8 * 2048 * 2048 / 989.4e12


def test_a_weight_is_the_first_operand_where_the_unit_wants_more_rows_than_there_are():
    """wgmma takes 64 rows: with 32 tokens the weight has them, if the product is what takes the time."""
    p = Linear(8192, 8192, Packing("bf16", 8192, 8192))
    fast = {"memory.dram.bandwidth": "100TB/s", "memory.dram.measured": "100TB/s"}
    for name, swapped in (("nvidia-h200", True), ("nvidia-rtx4090", False), ("amd-mi300x", False)):
        (whole, *_) = linear_implementations(p, Tokens(32, 1, 100))
        found = search_tile(whole.kernels[0], find_profile(name, fast))
        choices = (found.best, *found.others)
        assert any(c.tile.swapped for c in choices) == swapped
        assert all(c.tile.m < 64 <= c.tile.n for c in choices if c.tile.swapped)
        for choice in choices:
            check_fits(choice, find_profile(name, fast))


def test_fewer_bytes_take_less_time():
    profile = profile_of("nvidia-h200")
    bf16, int4 = (
        search_tile(kernel_of(4096, 2048, 64, 8, f, 16), profile).best.prediction for f in ("bf16", "int4_g128")
    )
    assert int4.device_bytes < 0.3 * bf16.device_bytes
    assert int4.time < 0.6 * bf16.time


def test_a_figure_that_is_needed_is_named():
    with pytest.raises(MoecError, match=r"cores of cambricon-mlu590 is unknown"):
        search_tile(kernel_of(64, 64, 4, 2, "bf16", 4), find_profile("cambricon-mlu590", {}))


def test_a_chip_without_room_says_what_does_not_fit():
    profile = find_profile("nvidia-h200", {"memory.shared.usable": "1KiB", "memory.shared.capacity": "1KiB"})
    with pytest.raises(MoecError, match=r"no tile of grouped_up fits nvidia-h200: shared holds 1024 bytes"):
        search_tile(kernel_of(2048, 1024, 64, 8, "bf16", 4), profile)


def test_expected_tiles_are_those_of_random_routing():
    rng = np.random.default_rng(0)
    for experts, chosen, tokens, rows in ((64, 8, 100, 16), (8, 2, 37, 64), (256, 6, 4, 16)):
        counts = np.zeros((400, experts), int)
        for i in range(400):
            for _ in range(tokens):
                counts[i, rng.choice(experts, chosen, False)] += 1
        sampled = -(-counts // rows)
        assert expected_tiles(experts, chosen, tokens, rows) == pytest.approx(sampled.sum(1).mean(), rel=0.05)


@pytest.mark.parametrize("chip", ["nvidia-h200", "ascend-950dt"])
def test_a_prompt_is_faster_by_chunks(chip):
    """A layer of Qwen3-Next: a token waits for the one before it, a chunk's tokens are a few matmuls."""
    p, profile = Recurrence(32, 16, 128, 128, decay=1, delta=True), find_profile(chip, {})
    new = 8192
    times = []
    for make, tile in ((linear_attention, (1, 32, 1)), (chunked_attention, (16, 32, 128))):
        kernel = KernelTemplate(
            make.__name__, lambda t, layout, make=make: make(p, t, layout), {"B": 1, "S": new}, (tile,)
        )
        times.append(search_tile(kernel, profile).best.prediction.time)
    assert times[0] > 4 * times[1]


GATHERED = """
moec 1 stage kernel
dim T in 1..8192

func @main(%x: f32[T, 2048], %ids: i64[T, 8]) -> (f32[8*T, 768]) {
  const %up : bf16[128, 1536, 2048] = tensor("up", bf16[128, 1536, 2048])
  %order, %tiles = acc.sort(%ids) {experts=128} : i64[8*T], i64[5, 3, 8*T]
  %h = acc.grouped_up(%x, %ids, %order, %tiles, %up, _) {act=gated(silu)} : f32[8*T, 768]
  return %h
}
"""


@pytest.mark.parametrize(("chip", "depth"), [("ascend-950dt", 256), ("ascend-910b", 256), ("nvidia-h200", 128)])
def test_an_ascend_gathers_rows_by_512_bytes(chip, depth):
    """Experts of Qwen3-30B-A3B for 64 tokens, in whole lines of an Ascend's L2 where the cube's memories hold the tiles."""
    declare_kernel_ops()
    found = kernel_specs(parse_module(GATHERED), find_profile(chip, {}), (64,)).kernels
    (up,) = (k for k in found if k.kind == "grouped_up")
    assert up.best.tile.k <= depth and (
        depth == 128 or up.best.tile.k * 2 == find_profile(chip, {}).rule("gather_bytes")
    )


@pytest.mark.parametrize("format", ["int8_g128", "fp8_b128"])
def test_codes_are_gathered_in_whole_tiles(format):
    """Of 8 bits they are loaded without a mask: a tile of 256 columns would go beyond a stored row of 640."""
    declare_kernel_ops()
    wide = 'tensor("up", bf16[128, 1536, 2048])'
    text = GATHERED.replace("%up : bf16", f"%up : {format}").replace(
        wide, f"quantize(cast({wide}, to=f32), to={format})"
    )
    module = parse_module(text.replace("2048", "640"))
    found = kernel_specs(module, find_profile("ascend-950dt", {}), (64,)).kernels
    (up,) = (k for k in found if k.kind == "grouped_up")
    assert 640 % up.best.tile.k == 0
