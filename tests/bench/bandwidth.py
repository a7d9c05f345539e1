"""The streaming read bandwidth of the machine, as `moec bench` measures it: every thread reads its part of a gigabyte.

    python tests/bench/bandwidth.py --threads 2 --tries 5

How fast memory is depends on where it happens to lie, so every try takes some anew and the best of its passes; the benchmark
takes the median of the tries and reports their maximum beside it.
"""

from __future__ import annotations

import argparse
import json

from moec.compiler.runtime.stream import StreamReader


def measure(threads: int) -> float:
    """Return bytes a second of reading fresh memory, the best of a few passes."""
    reader = StreamReader(threads)
    try:
        return reader.read_rate()
    finally:
        reader.close()


def main() -> None:
    """Read the command line; print the tries as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tries", type=int, default=2)
    given = parser.parse_args()
    print(json.dumps([measure(given.threads) for _ in range(given.tries)]))


if __name__ == "__main__":
    main()
