"""What this machine can do at most at this moment: read memory, and multiply int8 in the kernels' own instructions.

Called by `edgevl bench` and the benchmarks, which say how much of it was used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_READ_BYTES = 256 << 20  # far beyond any cache
_ROUNDS = 100_000  # some milliseconds on the slowest instruction set

Clock = Callable[[], float]


def read_bandwidth(threads: int, repeats: int, clock: Clock = time.perf_counter) -> float:
    """GB/s of reading memory, each thread its share of an array that no cache holds; the best of the repeats."""
    from edgevl._native import read_memory

    data = np.ones(_READ_BYTES // 4, np.float32)
    shares = np.array_split(data.reshape(-1, 64), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 2):
            start = clock()
            list(pool.map(lambda part: read_memory(part.reshape(-1)), shares))
            best = max(best, data.nbytes / (clock() - start) / 1e9)
    return best


def int8_rate(threads: int, repeats: int, clock: Clock = time.perf_counter) -> float:
    """GOP/s of int8 products in registers, two operations a product, all threads together; the best of the repeats."""
    from edgevl._native import int8_products

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 2):
            start = clock()
            done = sum(pool.map(int8_products, [_ROUNDS] * threads))
            best = max(best, done / (clock() - start) / 1e9)
    return best
