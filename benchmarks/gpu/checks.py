"""Is it right? Every op against its twin, and a tiny model against the CPU backend, on the GPU itself."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.models import compiled, random_weights, tiny
from deploy import cubins
from edgevl.backends.cuda import CudaRunner, run_graph
from edgevl.backends.cuda_device import Device
from edgevl.backends.cuda_lowering import Form, lower
from edgevl.backends.cuda_program import Cubins
from edgevl.contracts import CONTRACTS
from edgevl.layouts import pack, relaid
from edgevl.memory import max_counts
from edgevl.prefill import feed
from edgevl.runner import Limits, Runner

LIMITS = Limits(context=256, slots=2, chunk=64, logit_rows=8, tiles=2)


def operations(device: Device, architecture: str, every: int = 1) -> dict[str, dict[str, float]]:
    """Op -> `cases` and `worst`: the largest difference in units of the contract's tolerance; above 1 is a failure."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    op_cases: Any = importlib.import_module("op_cases")
    found: dict[str, dict[str, float]] = {}
    for op, contract in CONTRACTS.items():
        jobs = []
        for case in [c for c in op_cases.BY_OP[op] if op_cases.readable_on_gpu(c)][::every]:
            graph, limits = case.record()
            stored = {name: pack(w, b, "tiles") for name, (w, b) in case.weights.items()}
            forms = {name: Form(s.kind, s.group_size) for name, s in stored.items()}
            kernels = lower([graph], case.config, limits, forms.__getitem__).kernels(max_counts(limits))
            jobs.append((case, graph, limits, stored, kernels))
        made = cubins.compile_kernels({k: v for *_, kernels in jobs for k, v in kernels.items()}, architecture)
        files = {record.file: cubin for record, cubin in made.values()}
        code = Cubins({key: record for key, (record, _) in made.items()}, files.__getitem__)
        worst = 0.0
        for case, graph, limits, stored, _ in jobs:
            wanted, wanted_cache = op_cases.float_twin(case)
            cache = None if case.cache is None else (case.cache[0].copy(), case.cache[1].copy())
            values: dict[str, Any] = {name: array for name, (array, _) in case.inputs.items()}
            result = run_graph(graph, case.counts, values, stored.__getitem__, case.config, limits, cache, device, code)
            pairs = [(result, wanted), *zip(cache or (), wanted_cache or (), strict=True)]
            allowed = max(contract.half_tolerance, 1e-7)
            worst = max(worst, *(_difference(f, w) / allowed for f, w in pairs))
        found[op] = {"cases": len(jobs), "worst": round(worst, 4)}
    return found


def _difference(found: Any, wanted: Any) -> float:
    """The largest difference relative to the largest value; infinite where something is not finite."""
    f, w = found.astype(np.float64), wanted.astype(np.float64)
    if not np.all(np.isfinite(f)):
        return float("inf")
    return float(np.abs(f - w).max(initial=0) / max(1.0, np.abs(w).max(initial=0)))


def tiny_model(device: Device, architecture: str, tokens: int = 10) -> dict[str, Any]:
    """A prompt with pictures and some greedy tokens: the largest difference of logits, and whether the tokens agree.

    And whether steps of several tokens are those of one each. The CPU backend rounds activations to int8 and the GPU
    does not, so logits agree to a few hundredths. Where the native extension is missing, the reference computes.
    """
    config, limits = tiny(), LIMITS
    weights = random_weights(config)
    gpu = CudaRunner(config, limits, weights, device, compiled(config, weights, limits, architecture))
    other: Runner
    try:
        from edgevl.backends.cpu import CpuRunner

        other = CpuRunner(config, limits, lambda name: relaid(weights(name), "panels"), 1)
    except ImportError:
        from edgevl.backends.reference import ReferenceRunner

        other = ReferenceRunner(config, limits, weights)
    assert config.vision is not None
    side = config.vision.tile_size
    pixels = np.random.default_rng(1).integers(0, 256, (2, side, side, 3)).astype(np.uint8)
    images = [runner.vision(pixels).copy() for runner in (gpu, other)]
    prompt = [*range(3, 40), *(-1 - r for r in range(len(images[0]))), *range(50, 60)]
    logits = [feed(r, prompt, 0, i, 1).copy() for r, i in zip((gpu, other), images, strict=True)]
    worst, same, place = _difference(*logits), True, len(prompt)
    for _ in range(tokens):
        token = int(np.argmax(logits[1][0, : config.tokens.size]))
        step = (np.array([token], np.int32), np.array([place], np.int32), np.zeros(1, np.int32))
        last = np.zeros(1, np.int32)
        chosen = gpu.greedy(*step, None, last)
        logits = [r.decode(*step, None, last).copy() for r in (gpu, other)]
        worst, place = max(worst, _difference(*logits)), place + 1
        same &= int(chosen[0]) == int(np.argmax(logits[1][0, : config.tokens.size]))
    found = {"against": other.backend, "largest_difference": round(worst, 4), "same_tokens": same}
    return {**found, "steps_alike": _alike(gpu, place)}


def _alike(gpu: CudaRunner, place: int) -> bool:
    """Whether a step of several tokens gives, bit by bit, the logits of steps of one: guesses rely on it."""
    count = min(gpu.alike_rows, gpu.limits.logit_rows)
    ids = np.arange(5, 5 + count, dtype=np.int32)
    rows, slot = np.arange(count, dtype=np.int32), np.zeros(count, np.int32)
    together = gpu.decode(ids, place + rows, slot, None, rows).copy()
    alone = [gpu.decode(ids[i : i + 1], place + rows[i : i + 1], slot[:1], None, rows[:1]).copy() for i in rows]
    return bool(np.array_equal(together, np.concatenate(alone)))
