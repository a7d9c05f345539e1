"""Attention kernels, simulated on a chip of every family, equal nn.attention."""

import pytest
import torch
from chips_for_tests import CHIPS, check_fits, close, profile_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    check_a_mask_for_each_token,
    check_attention,
    check_masked_slots,
    check_more_of_attention,
    check_values_in_the_latent,
)
from moec.compiler.errors import MoecError
from moec.compiler.ops.nn import attention as reference
from moec.targets.accelerator.kernels.attend import column_parts
from moec.targets.accelerator.kernels.attention import Attention, attention_kernel
from moec.targets.accelerator.kernels.choices import AttentionTile
from moec.targets.accelerator.select.implementations import Tokens
from moec.targets.accelerator.select.search import KernelTemplate, search_tile
from moec.targets.accelerator.tile.tiles import DEVICE, For, Load, walk_statements

chips = pytest.mark.parametrize("name", CHIPS)


@chips
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize(("past", "new"), [(0, 1), (0, 21), (40, 1), (17, 5)])
def test_groups_of_heads(name, heads, groups, past, new):
    p = Attention(heads, groups, 16, 16, 0.25, dtype="f32")
    check_attention(name, p, AttentionTile(16, 16), 2, past, new)


@chips
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(
    "more",
    [
        {"window": 3},
        {"window": 20, "softcap": 2.0},
        {"sinks": True},
        {"chunk": 8, "heads_first": True},
        {"chunk": 12, "window": 5, "sinks": True},
    ],
    ids=str,
)
def test_what_attention_has_beside(name, more, split):
    check_more_of_attention(name, more, split)


@chips
@pytest.mark.parametrize("more", [{}, {"chunk": 6}, {"sinks": True, "window": 4}], ids=str)
@pytest.mark.parametrize("split", [1, 2])
def test_masked_slots(name, more, split):
    check_masked_slots(name, more, split)


@chips
def test_a_mask_for_each_token(name):
    check_a_mask_for_each_token(name)


@chips
@pytest.mark.parametrize("part", [16, 32, 128])
def test_a_latent_whose_first_numbers_are_the_values(name, part):
    check_values_in_the_latent(name, part)


@chips
@pytest.mark.parametrize(("width", "value_width"), [(576, 512), (192, 128), (128, 128)])
def test_heads_of_real_models_fit(name, width, value_width):
    shared = value_width == 512
    p = Attention(16, 1 if shared else 2, width, value_width, width**-0.5, shared=shared)
    check_attention(name, p, AttentionTile(16, 16, stages=1), 1, 15, 1, tolerance=8e-3)


@pytest.mark.parametrize("name", ["hopper", "ascend-950"])
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_sizes(name, data):
    heads, groups = data.draw(st.sampled_from([(1, 1), (3, 1), (4, 4), (10, 2)]))
    window, chunk = data.draw(st.sampled_from([0, 1, 5, 16, 40])), data.draw(st.sampled_from([0, 0, 3, 16]))
    p = Attention(heads, groups, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)), 0.5, window, chunk,
                  sinks=data.draw(st.booleans()), dtype="f32")  # fmt: skip
    t = AttentionTile(16, data.draw(st.sampled_from([16, 32])), split=data.draw(st.sampled_from([1, 1, 2, 5])))
    check_attention(
        name, p, t, data.draw(st.integers(1, 2)), data.draw(st.integers(0, 50)), data.draw(st.integers(1, 30))
    )


@chips
def test_keys_that_no_row_may_read_are_not_looked_at(name):
    layout, chip = CHIPS[name]
    torch.manual_seed(0)
    past, new, spoilt = 40, 4, float("nan")
    q, key, value = torch.randn(1, new, 1, 16), torch.randn(1, 1, 50, 16), torch.randn(1, 1, 50, 16)
    for more, begin in (({"window": 8}, past - 7), ({"chunk": 16}, 32), ({"window": 3, "chunk": 16}, past - 2)):
        key[:, :, :begin], value[:, :, :begin] = spoilt, spoilt
        key[:, :, past + new :], value[:, :, past + new :] = spoilt, spoilt
        p = Attention(1, 1, 16, 16, 0.25, dtype="f32", **more)
        scalars = {"B": 1, "S": new, "P": past, "C": 50}
        y = run(attention_kernel(p, AttentionTile(16, 16), layout), chip, scalars, q=q, key=key, value=value)["y"]
        seen = [x.nan_to_num()[:, :, : past + new] for x in (key, value)]
        close(y, reference(q.transpose(1, 2), *seen, None, None, scale=0.25, **more))
        key, value = torch.randn(1, 1, 50, 16), torch.randn(1, 1, 50, 16)


def test_blocks_that_every_row_reads_whole_have_no_masks():
    def loops(**more):
        program = attention_kernel(Attention(2, 1, 16, 16, 0.25, **more), AttentionTile(16, 16), CHIPS["hopper"][0])
        return [s for s in walk_statements(program.body) if isinstance(s, For)]

    whole, last = loops()
    assert [s.mask for s in whole.body if isinstance(s, Load)] == [None, None]
    assert all(s.mask is not None for s in last.body if isinstance(s, Load))
    assert str(whole.stop) == str(last.start) == "key_middle"
    for more in ({"window": 8}, {"chunk": 8}, {"mask": "tokens"}):
        assert all(s.mask is not None for loop in loops(**more) for s in loop.body if isinstance(s, Load))


@pytest.mark.parametrize("name", ["nvidia-h200", "nvidia-b200", "amd-mi300x", "amd-mi355x"])
@pytest.mark.parametrize("width", [16, 24, 32, 48])
def test_narrow_heads_find_a_tile(name, width):
    for tokens in (Tokens(4, 1, 1000), Tokens(1, 700, 0)):
        scalars = {"B": tokens.batch, "S": tokens.new, "P": tokens.past, "C": tokens.past + tokens.new}
        p = Attention(8, 2, width, width, 0.25)
        kernel = KernelTemplate(
            "attention",
            lambda t, layout, p=p: attention_kernel(p, AttentionTile(t.m, t.n, t.k, t.stages, t.warps), layout),
            scalars,
            ((16, 32, 64), (64, 64, 64)),
        )
        profile = profile_of(name)
        check_fits(search_tile(kernel, profile).best, profile)


@settings(deadline=None)
@given(st.sampled_from([16, 32, 64, 128, 256, 512]), st.lists(st.integers(0, 600), min_size=1, max_size=2))
def test_parts_are_powers_of_two_and_cover_each_width(most, widths):
    found = column_parts(most, *widths)
    assert [p.first for p in found] == [sum(q.live for q in found[:i]) for i in range(len(found))]
    assert sum(p.live for p in found) == sum(widths)
    assert all(p.wide & (p.wide - 1) == 0 and 16 <= p.wide <= most and 0 < p.live <= p.wide for p in found)
    assert widths[0] in [0, *(p.first + p.live for p in found)]
    assert sum(p.wide - p.live for p in found) < 16 * len(widths)


def test_scores_leave_the_cube_and_weights_come_back_by_the_chips_own_way():
    def moves(name):
        layout, _ = CHIPS[name]
        program = attention_kernel(Attention(2, 1, 16, 16, 0.25), AttentionTile(16, 16), layout)
        return {(n, b.memory) for n, b in program.buffers.items() if n.startswith(("s_", "p_"))}

    assert moves("ascend-950") == {("s_ub", "ub"), ("p_l1", "l1"), ("p_l1_l0a", "l0a")}
    old = {("s_device", DEVICE), ("s_device_ub", "ub"), ("p_device", DEVICE), ("p_device_l1", "l1")}
    assert moves("ascend-910b") == old | {("p_device_l1_l0a", "l0a")}
    assert moves("hopper") == {("p_shared", "shared")}


def test_what_cannot_be():
    layout = CHIPS["hopper"][0]
    for p, what in (
        (Attention(3, 2, 16, 16, 1.0), "do not divide"),
        (Attention(2, 2, 16, 32, 1.0, shared=True), "not a part"),
        (Attention(2, 2, 16, 16, 1.0, mask="rows"), "mask of rows"),
        (Attention(2, 2, 16, 16, 1.0, mask="tokens", chunk=4), "no such slot"),
    ):
        with pytest.raises(MoecError, match=what):
            attention_kernel(p, AttentionTile(16, 16), layout)
