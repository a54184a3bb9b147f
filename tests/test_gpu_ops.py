"""Every op × awkward shapes on the GPU backend, its kernels in Triton's interpreter, against the numpy twins.

GPU kernels keep activations in f16 or f32 in front of int8 and int4 weights, so their twin is the one of a float weight
of the same values. No GPU is needed; what a real one computes is compared by `python -m benchmarks.gpu`.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
import pytest

from edgevl.backends.cuda import run_graph
from edgevl.backends.cuda_lowering import MORE_ROWS, Form, lower
from edgevl.contracts import CONTRACTS
from edgevl.errors import UsageError
from edgevl.layouts import StoredWeight, pack
from edgevl.memory import max_counts
from gpu_devices import InterpreterDevice, uncompiled
from op_cases import BY_OP, Case, check, float_twin, readable_on_gpu


def on_device(case: Case, architecture: str = "") -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    graph, limits = case.record()
    stored: dict[str, StoredWeight] = {name: pack(w, b, "tiles") for name, (w, b) in case.weights.items()}
    forms = {name: Form(s.kind, s.group_size) for name, s in stored.items()}
    kernels = lower([graph], case.config, limits, forms.__getitem__).kernels(max_counts(limits))
    cache = None if case.cache is None else (case.cache[0].copy(), case.cache[1].copy())
    values: dict[str, Any] = {name: array for name, (array, _) in case.inputs.items()}
    device, cubins = InterpreterDevice(kernels), uncompiled(kernels, architecture)
    found = run_graph(graph, case.counts, values, stored.__getitem__, case.config, limits, cache, device, cubins)
    return found, cache


@pytest.mark.parametrize("op", CONTRACTS)
def test_kernels_match_the_twin(op: str) -> None:
    cases = [case for case in BY_OP[op] if readable_on_gpu(case)]
    assert cases
    for case in cases:
        wanted, wanted_cache = float_twin(case)
        found, found_cache = on_device(case)
        check(case, found, wanted, "gpu", half=True)
        if found_cache is not None and wanted_cache is not None:
            for f, w in zip(found_cache, wanted_cache, strict=True):
                check(case, f.astype(np.float32), w.astype(np.float32), "gpu cache", half=True)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "silu_mul", "embed", "gather_rows", "pixel_shuffle"])
def test_what_is_stored_as_f32_is_as_close_as_on_the_cpu(op: str) -> None:
    for case in BY_OP[op][::5]:
        check(case, on_device(case)[0], float_twin(case)[0], "gpu")


def test_up_to_sixteen_tokens_meet_codes_exactly() -> None:
    """int8 and int4 are summed in f32 and round nothing on the way; activations are f16, as in a model."""
    for case in BY_OP["linear"][::2]:
        if case.counts["tokens"] <= MORE_ROWS and readable_on_gpu(case):
            x, rows = case.inputs["x"]
            narrow = copy(case)
            narrow.inputs = {**case.inputs, "x": (x.astype(np.float16).astype(np.float32), rows)}
            check(narrow, on_device(narrow)[0], float_twin(narrow)[0], "gpu")


@pytest.mark.parametrize("architecture", ["sm_87", "sm_90"])
@pytest.mark.parametrize("op", CONTRACTS)
def test_the_blocks_that_are_shipped_match_too(op: str, architecture: str) -> None:
    """The tiles of the tuning table, which are larger than most of these shapes."""
    cases = [case for case in BY_OP[op] if readable_on_gpu(case)]
    for case in cases[:: max(1, len(cases) // 9)]:
        check(case, on_device(case, architecture)[0], float_twin(case)[0], f"gpu {architecture}", half=True)


def test_weights_that_no_kernel_reads_are_refused() -> None:
    case = next(case for case in BY_OP["linear"] if not readable_on_gpu(case))
    with pytest.raises(UsageError, match="f16 or int8 or int4"):
        on_device(case)
    case = next(case for case in BY_OP["attention"] if not readable_on_gpu(case))
    with pytest.raises(UsageError, match="--kv f16"):
        on_device(case)
