"""Volumes and times of dispatch and combine against published measurements."""

import numpy as np
import pytest
from moec.compiler.errors import MoecError
from moec.targets.accelerator.kernels.comm import (
    Exchange,
    Link,
    distinct_devices,
    exchange_seconds,
    row_bytes,
    rows_to_each,
    sent_bytes,
)

GB, US = 1e9, 1e-6
FP8, BF16 = row_bytes("fp8", 7168, 16), row_bytes("bf16", 7168)


def exchanged_bytes(e, row):
    """Return all bytes that one device sends, with what stays on it, as published bandwidths count them."""
    return rows_to_each(e) * e.devices * row


@pytest.mark.parametrize(
    ("experts", "chosen", "devices"), [(256, 6, 8), (256, 8, 64), (8, 2, 4), (16, 4, 16), (6, 6, 3)]
)
def test_the_mean_number_of_devices_is_that_of_random_tokens(experts, chosen, devices):
    rng = np.random.default_rng(0)
    drawn = [len(set(rng.choice(experts, chosen, replace=False) // (experts // devices))) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(distinct_devices(experts, chosen, devices), abs=0.06)


def test_volumes_by_hand():
    e = Exchange(128, 8, 256, 8, 7168, each_choice=True)
    assert FP8 == 7168 + 7168 // 128 * 4 + 16 == 7408
    assert rows_to_each(e) == 128
    assert sent_bytes(e, FP8) == 128 * 7 * 7408
    assert sent_bytes(e, FP8, 8) == 0
    assert rows_to_each(Exchange(10, 2, 4, 4, 8)) == pytest.approx(10 * (1 - (3 / 4) * (2 / 3)))


# published: devices, microseconds, GB/s (dispatch, combine); 128 tokens, 7168 numbers, top 8, low latency
H800 = [(8, 77, 98, 114, 127), (16, 118, 63, 195, 74), (64, 173, 43, 314, 46)]  # DeepEP docs/legacy.md, fp8
ASCEND_A3 = [(8, 132, 58, 126, 116), (16, 139, 55, 135, 109), (32, 153, 49, 151, 97)]  # sgl-kernel-npu README, int8


@pytest.mark.parametrize(
    ("rows", "masked"), [(H800, 10), (ASCEND_A3, 0)], ids=["H800, whose test masks 10 choices", "Ascend A3"]
)
def test_measured_bandwidths_are_our_volume_by_the_measured_time(rows, masked):
    for devices, dispatch_us, dispatch, combine_us, combine in rows:
        e = Exchange(128 - masked / 8, 8, 256, devices, 7168, each_choice=True)
        assert exchanged_bytes(e, FP8) / (dispatch_us * US) / GB == pytest.approx(dispatch, rel=0.02)
        assert exchanged_bytes(e, BF16) / (combine_us * US) / GB == pytest.approx(combine, rel=0.015)


def test_times_of_low_latency_are_the_links_and_at_most_twice_that():
    near, far = Link(160 * GB, 2 * US, 8), Link(50 * GB, 5 * US, 1024)  # NVLink of an H800 as DeepEP states it, CX7
    for devices, dispatch_us, _, combine_us, _ in H800:
        e = Exchange(128, 8, 256, devices, 7168, each_choice=True)
        for row, measured in ((FP8, dispatch_us), (BF16, combine_us)):
            predicted = exchange_seconds(e, row, near, far)
            assert predicted < measured * US < 2 * predicted


def test_ascend_950dt_over_the_measured_link():
    e = Exchange(16384, 6, 256, 8, 7168)  # DeepEP-Ascend README: 375 GB/s of dispatch, a link of 1008 GB/s at its peak
    row = row_bytes("fp8", 7168)
    measured, peak = Link(375 * GB, 0, 64), Link(1008 * GB, 0, 64)
    assert sent_bytes(e, row) / exchanged_bytes(e, row) == 7 / 8
    assert distinct_devices(256, 6, 8) == pytest.approx(4.44, abs=0.01)
    assert exchange_seconds(e, row, measured) == pytest.approx(
        1.2544e-3, rel=0.01
    )  # 16384 tokens to 3.885 devices, 7392 bytes
    assert exchange_seconds(e, row, measured) / exchange_seconds(e, row, peak) == pytest.approx(1008 / 375)


def test_logical_bandwidth_of_nvlink_is_the_link_by_the_part_that_leaves():
    e = Exchange(8192, 8, 256, 8, 7168)  # DeepEP README, SM100 NVLink EP 8: 726 GB/s with what stays on the device
    row = row_bytes("fp8", 7168)
    time = exchange_seconds(e, row, Link(900 * GB, 0, 72))
    assert 726 < exchanged_bytes(e, row) / time / GB == pytest.approx(900 * 8 / 7)


def test_rows_that_are_forwarded_cross_the_far_link_once_for_each_domain():
    e = Exchange(4096, 8, 256, 32, 7168)
    near, far = Link(1e15, 0, 8), Link(50 * GB, 0, 1024)
    row = row_bytes("fp8", 7168)
    apart, forwarded = exchange_seconds(e, row, near, far), exchange_seconds(e, row, near, far, forwarded=True)
    assert apart == pytest.approx(4096 * distinct_devices(256, 8, 32) * 24 / 32 * row / far.bandwidth)
    assert forwarded == pytest.approx(4096 * distinct_devices(256, 8, 4) * 3 / 4 * row / far.bandwidth)


def test_what_cannot_be():
    with pytest.raises(MoecError, match="must divide"):
        Exchange(1, 2, 10, 4, 8)
    with pytest.raises(MoecError, match="the links reach 8"):
        exchange_seconds(Exchange(1, 2, 16, 16, 8), 8, Link(1, 0, 8))
    with pytest.raises(MoecError, match="domains of 8"):
        exchange_seconds(Exchange(1, 2, 12, 12, 8), 8, Link(1, 0, 8), Link(1, 0, 64))
    with pytest.raises(MoecError, match="rows of f32"):
        row_bytes("f32", 8)
