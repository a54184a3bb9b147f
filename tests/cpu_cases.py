"""What every instruction set of the CPU backend must get right. numpy alone: it runs wherever the kernels do."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgevl.backends.cpu import run_graph
from edgevl.layouts import StoredWeight, pack
from edgevl.recorder import Rows
from edgevl.reference import in_int8
from edgevl.rounding import rounded
from edgevl.weights import Int4Weight, Weight, dequantize, quantize_int4, quantize_int8
from op_cases import BY_OP, Case, check, normal

ISAS = ("portable", "avx2", "avx512", "avx512vnni", "neon", "neoni8mm")


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


def rounds_for(case: Case, threads: int) -> list[int]:
    """An op with linears behind it gives them the bits that they make of its f32; the groups that it rounded for."""
    rows = case.inputs["x"][1]
    plain = on_cpu(case, threads)[0]
    k = plain.shape[1]
    values = (normal(7, 21, k) / np.sqrt(k)).astype(np.float32)
    weights: dict[str, Weight] = {f"int4-g{q}": quantize_int4(values, q) for q in (32, 64, 128) if k % q == 0}
    if case.op != "full_attention":  # which an int8 weight puts into whole numbers
        weights["int8"] = quantize_int8(values)
    found = []
    for kind, weight in weights.items():
        both = {**case.weights, "w": (weight, None)}

        def behind(ops: Any, i: dict[str, Any]) -> Any:
            return ops.linear(case.call(ops, i), ops.linear_weight("w"))

        fused = Case(case.op, case.label, behind, case.inputs, case.counts, both, case.config, case.cache, case.kv)
        alone = Case(
            "linear",
            case.label,
            lambda ops, i: ops.linear(i["x"], ops.linear_weight("w")),
            {"x": (plain, rows)},
            case.counts,
            {"w": (weight, None)},
        )
        wanted = on_cpu(alone, threads)[0]
        assert np.array_equal(on_cpu(fused, threads)[0], wanted), f"{case.label} in front of {kind}"
        graph, _ = fused.record()
        found += rounded(graph, case.config, lambda name, w=both: pack(w[name][0]).group_size).values()
    return found


def rounding_at_once() -> None:
    """All ops that round; those that finish heads do so where a head is whole groups."""
    for op, groups in {
        "rms_norm": {32, 64},
        "layer_norm": {32, 64},
        "silu_mul": {32, 64},
        "attention": {32, 64, 128},
        "full_attention": {32, 64},
    }.items():
        found: list[int] = []
        for index, case in enumerate(BY_OP[op]):
            found += rounds_for(case, 1 + index % 2)
        assert set(found) == groups, op
