"""Is it right? Every op against its twin, and a tiny model against the CPU backend, on the GPU itself."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.models import compiled, cubins_of, random_weights, tiny
from edgevl.backends.cuda import CudaRunner, run_graph
from edgevl.backends.cuda_device import Device
from edgevl.backends.cuda_lowering import Form, lower
from edgevl.backends.cuda_program import Program
from edgevl.contracts import CONTRACTS
from edgevl.layouts import pack, relaid
from edgevl.memory import max_counts
from edgevl.prefill import feed
from edgevl.recorder import Recorder, Rows
from edgevl.runner import Limits, Runner
from edgevl.sampling import choose

LIMITS = Limits(context=256, slots=2, chunk=64, logit_rows=8, tiles=2)


def operation(device: Device, architecture: str, op: str, every: int = 1) -> dict[str, Any]:
    """An op's `cases`, and their `worst` difference in units of the contract's tolerance.

    Above 1 is a failure, and so is None: something was not finite.
    """
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    op_cases: Any = importlib.import_module("op_cases")
    jobs = []
    for case in [c for c in op_cases.BY_OP[op] if op_cases.readable_on_gpu(c)][::every]:
        graph, limits = case.record()
        stored = {name: pack(w, b, "tiles") for name, (w, b) in case.weights.items()}
        forms = {name: Form(s.kind, s.group_size) for name, s in stored.items()}
        kernels = lower([graph], case.config, limits, forms.__getitem__).kernels(max_counts(limits))
        jobs.append((case, graph, limits, stored, kernels))
    code = cubins_of({k: v for *_, kernels in jobs for k, v in kernels.items()}, architecture)
    allowed = max(CONTRACTS[op].half_tolerance, 1e-7)
    worst = 0.0
    for case, graph, limits, stored, _ in jobs:
        wanted, wanted_cache = op_cases.float_twin(case)
        cache = None if case.cache is None else (case.cache[0].copy(), case.cache[1].copy())
        values: dict[str, Any] = {name: array for name, (array, _) in case.inputs.items()}
        result = run_graph(graph, case.counts, values, stored.__getitem__, case.config, limits, cache, device, code)
        pairs = [(result, wanted), *zip(cache or (), wanted_cache or (), strict=True)]
        worst = max(worst, *(_difference(f, w) / allowed for f, w in pairs))
    return {"cases": len(jobs), "worst": _finite(worst)}


def _difference(found: Any, wanted: Any) -> float:
    """The largest difference relative to the largest value; infinite where something is not finite."""
    f, w = found.astype(np.float64), wanted.astype(np.float64)
    if not np.all(np.isfinite(f)):
        return float("inf")
    return float(np.abs(f - w).max(initial=0) / max(1.0, np.abs(w).max(initial=0)))


def _finite(value: float) -> float | None:
    """As JSON can say it."""
    return round(value, 4) if math.isfinite(value) else None


def sampling(device: Device, architecture: str, size: int = 2500) -> dict[str, int]:
    """Rows of logits with and without ties, drawn from on the device: `cases`, and `wrong` ones."""
    random = np.random.default_rng(0)
    real, kinds = size - 90, ((0.7, 0.9), (1.0, 1.0), (0.0, 1.0), (2.5, 0.3), (0.2, 1e-6), (10.0, 0.99), (1.0, 0.5))
    draws = np.array([(t, p, random.random()) for t, p in kinds] * 3, np.float32)
    draws[0, 2], draws[-1, 2] = 0.0, np.float32(1 - 2**-24)
    logits = 4 * random.standard_normal((len(draws), size)).astype(np.float32)
    logits[1::2] = np.round(logits[1::2])  # ties, zeros of both signs among them
    logits[2] = -np.inf
    logits[2, [real - 3, 5]] = 1.0
    logits[:, real:] = 100.0  # padding
    recorder, limits = Recorder("decoder", {}, frozenset()), Limits(8, chunk=len(draws), logit_rows=len(draws))
    x = recorder.input("x", Rows("tokens"), size, "f32")
    graph = recorder.finish(recorder.gather_rows(x, recorder.input("rows", Rows("logits"), 1, "i32")))
    kernels = lower([graph], None, limits, lambda name: Form("f16"), real).kernels(max_counts(limits))
    code = cubins_of(kernels, architecture)
    program = Program([graph], limits, random_weights(tiny()), None, device, code, real)
    counts = {"tokens": len(draws), "logits": len(draws)}
    program.fill("decoder", {"x": logits, "rows": np.arange(len(draws), dtype=np.int32)}, counts)
    program.set_draws(draws)
    for name in ("decoder", "sample"):
        program.launch(name, counts)
    found = program.ids(len(draws))
    program.close()
    wrong = sum(int(t) not in _drawn(row[:real], d) for row, d, t in zip(logits, draws, found, strict=True))
    return {"cases": len(draws), "wrong": wrong}


def _drawn(logits: Any, draw: Any) -> list[int]:
    """The tokens that are right for one draw: the twin's, also when top-p or the random number is 1e-5 away."""
    temperature, top_p, number = draw
    return [
        choose(logits, temperature, p, n)
        for p in (top_p, *([max(top_p - 1e-5, 0), top_p + 1e-5] if top_p < 1 else []))
        for n in (number, max(number - 1e-5, 0), number + 1e-5)
    ]


def tiny_model(device: Device, architecture: str, kv: str = "f16", tokens: int = 10) -> dict[str, Any]:
    """A prompt with pictures and some greedy tokens: the largest difference of logits, and whether the tokens agree.

    And whether steps of several tokens are those of one each, and whether each token chosen on the device, greedily
    and with temperature and top-p, is what the GPU's own logits say (`chosen_right`). The CPU backend rounds
    activations to int8 and the GPU does not, so logits agree to a few hundredths. Where the native extension is
    missing, the reference computes.
    """
    config, limits = tiny(), replace(LIMITS, kv=kv)
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
    worst, same, right, place = _difference(*logits), True, True, len(prompt)
    numbers = np.random.default_rng(2)
    for _ in range(tokens):
        token = int(np.argmax(logits[1][0, : config.tokens.size]))
        step = (np.array([token], np.int32), np.array([place], np.int32), np.zeros(1, np.int32))
        last = np.zeros(1, np.int32)
        chosen = gpu.choose(*step, None, last, np.zeros((1, 3), np.float32))
        draw = np.array([[20.0, 0.9, numbers.random()]], np.float32)  # hot: the likeliest is seldom the right one
        drawn = gpu.choose(*step, None, last, draw)
        logits = [r.decode(*step, None, last).copy() for r in (gpu, other)]
        worst, place = max(worst, _difference(*logits)), place + 1
        same &= int(chosen[0]) == int(np.argmax(logits[1][0, : config.tokens.size]))
        own = logits[0][0, : config.tokens.size]
        right &= int(chosen[0]) == int(np.argmax(own)) and int(drawn[0]) in _drawn(own, draw[0])
    found = {"against": other.backend, "largest_difference": _finite(worst), "same_tokens": same}
    found |= {"chosen_right": right, "steps_alike": _alike(gpu, place)}
    gpu.close()
    return found


def _alike(gpu: CudaRunner, place: int) -> bool:
    """Whether a step of several tokens gives, bit by bit, the logits of steps of one: guesses rely on it."""
    count = min(gpu.alike_rows, gpu.limits.logit_rows)
    ids = np.arange(5, 5 + count, dtype=np.int32)
    rows, slot = np.arange(count, dtype=np.int32), np.zeros(count, np.int32)
    together = gpu.decode(ids, place + rows, slot, None, rows).copy()
    alone = [gpu.decode(ids[i : i + 1], place + rows[i : i + 1], slot[:1], None, rows[:1]).copy() for i in rows]
    return bool(np.array_equal(together, np.concatenate(alone)))
