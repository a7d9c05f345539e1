"""The streaming read bandwidth of the machine: every thread sums its part of a gigabyte, again and again.

    python tests/bench/bandwidth.py --threads 2 --tries 5

torch.sum is the reader: of those tried (numpy's and torch's sum, max, dot, matrix times vector) none was faster, and
numpy's reductions are bound by arithmetic on some processors. How fast memory is depends on where the array happens to
lie, so every try allocates anew and takes the best of its passes; the benchmark takes the median of the tries and
reports their maximum beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor

BYTES, PASSES = 1 << 30, 4


def measure(threads: int, size: int = BYTES) -> float:
    """Return bytes a second of reading a fresh array of `size` bytes, the best of a few passes."""
    import numpy as np
    import torch

    torch.set_num_threads(1)  # the threads here are ours
    values = np.random.default_rng(0).random(size // 4, np.float32)
    parts = [torch.from_numpy(part) for part in np.array_split(values, threads)]
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES + 1):
            start = time.perf_counter()
            list(pool.map(torch.sum, parts))
            seconds.append(time.perf_counter() - start)
    return size / min(seconds[1:])  # the first pass starts the threads


def main() -> None:
    """Read the command line; print the tries as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tries", type=int, default=2)
    given = parser.parse_args()
    print(json.dumps([measure(given.threads) for _ in range(given.tries)]))


if __name__ == "__main__":
    main()
