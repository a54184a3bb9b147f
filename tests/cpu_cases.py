"""What every instruction set of the CPU backend must get right. numpy alone: it runs wherever the kernels do."""

from __future__ import annotations

import numpy as np

from edgevl.backends.cpu import run_graph
from edgevl.layouts import StoredWeight, pack
from edgevl.recorder import Rows
from edgevl.reference import in_int8
from edgevl.weights import Int4Weight, dequantize
from op_cases import Case, check

ISAS = ("portable", "avx2", "avx512", "avx512vnni", "neon")


def on_cpu(case: Case, threads: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """The result of a case, and the cache that it leaves."""
    graph, limits = case.record()
    stored: dict[str, StoredWeight] = {name: pack(w, b) for name, (w, b) in case.weights.items()}
    cache = None if case.cache is None else (case.cache[0].copy(), case.cache[1].copy())
    values = {name: array for name, (array, _) in case.inputs.items()}
    read = {0: cache} if cache else None
    result = run_graph(graph, case.counts, values, stored.__getitem__, case.config, limits, read, threads)
    return result, cache


def matches(case: Case, threads: int, isa: str) -> None:
    """The twin's result and cache, within the contract."""
    wanted, wanted_cache = case.reference()
    found, found_cache = on_cpu(case, threads)
    check(case, found, wanted, f"cpu {isa}")
    if found_cache is not None and wanted_cache is not None:
        for f, w in zip(found_cache, wanted_cache, strict=True):
            check(case, f.astype(np.float32), w.astype(np.float32), f"cpu {isa} cache")


def whole_numbers(rows: int) -> None:
    """int4 is exact where activations are whole, up to 127 in every group, and scales are powers of two."""
    random = np.random.default_rng(rows)
    n, k, q = 37, 192, 64
    weight = Int4Weight(
        random.integers(0, 16, (n, k), np.uint8),
        np.exp2(random.integers(-3, 2, (n, k // q))).astype(np.float16),
        random.integers(0, 16, (n, k // q), np.uint8),
    )
    x = random.integers(-127, 128, (rows, k)).astype(np.float32)
    x[:, ::q] = 127
    case = Case(
        "linear",
        "whole numbers",
        lambda ops, i: ops.linear(i["x"], ops.linear_weight("w")),
        {"x": (x, Rows("tokens"))},
        {"tokens": rows},
        {"w": (weight, None)},
    )
    wanted = x.astype(np.float64) @ dequantize(weight).astype(np.float64).T
    for threads in (1, 2):
        assert np.array_equal(on_cpu(case, threads)[0].astype(np.float64), wanted)
    assert np.array_equal(in_int8(x, q), x)
