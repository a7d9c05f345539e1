"""This machine as a system, measured by a calibration of about a second: reading bandwidth and the rate of float products."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from ..accelerator.chip.chip import Figure
from .system import Device, System

READ = 1 << 28  # bytes that are read
SIDE = 768  # of the square matrices that are multiplied
REPEATS = 5


@cache
def measure_here() -> System:
    """Return this machine; its cores share one memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    if not memory:
        memory = 16_000_000_000
    source = f"measured here with {cores} threads"
    device = Device(
        "here",
        Figure(float(memory), "M", "the operating system"),
        Figure(read_bandwidth(cores), "M", source, "sums of 256 MB, the best of five"),
        {"bf16": Figure(product_rate(), "M", source, "float32 products, the best of five")},
    )
    return System("here", f"this machine, {cores} cores", device, 1, (), unified=True)


def read_bandwidth(threads: int) -> float:
    """Return bytes/s of reading memory with so many threads."""
    data = np.ones(READ // 8)
    parts = np.array_split(data, threads)
    with ThreadPoolExecutor(threads) as pool:
        return READ / _best_time(lambda: list(pool.map(np.sum, parts)))


def product_rate() -> float:
    """Return FLOP/s of a product of float32 matrices."""
    left = np.ones((SIDE, SIDE), np.float32)
    return 2 * SIDE**3 / _best_time(lambda: left @ left)


def _best_time(run: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
