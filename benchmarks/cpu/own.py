"""edgevl's own rows: `python -m benchmarks.cpu.own JOB` runs one job in a process of its own, as the peers run theirs.

A job is what `benchmarks/cpu/runners/runner.py` describes. Beside a bundle, `model` may name a model of random weights:
"8b" (the 8B's decoder), "tower" (its vision tower).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.cpu.models import eight_b, random_weights, tower
from benchmarks.cpu.runners.runner import CLOCKS, Job, Measured, batched, measure, peak_bytes, read_job, report
from edgevl import __version__
from edgevl.backends.cpu import CpuRunner, Weights
from edgevl.bundle import Bundle
from edgevl.config import ModelConfig
from edgevl.memory import kv_row_bytes
from edgevl.models.names import all_parts
from edgevl.prefill import feed
from edgevl.probes import read_bandwidth
from edgevl.runner import Limits


class Own:
    """A loaded model, as the benchmark sees one."""

    def __init__(self, runner: CpuRunner) -> None:
        self.runner = runner
        self._depth = 0

    def prefill(self, ids: list[int]) -> None:
        """The whole prompt, from an empty cache, to the logits of its last token."""
        feed(self.runner, ids, 0, None, 1)
        self._depth = len(ids)

    def decode(self, ids: list[int]) -> None:
        """These tokens, one after the other, each to its logits."""
        for token in ids:
            feed(self.runner, [token], self._depth, None, 1)
            self._depth += 1

    def step(self, ids: list[int], slots: int) -> None:
        """The tokens in as many slots at once, each to its logits, one position after the other."""
        rows = np.arange(slots, dtype=np.int32)
        for at, token in enumerate(ids):
            tokens = np.full(slots, token, np.int32)
            self.runner.decode(tokens, np.full(slots, at, np.int32), rows, None, rows)


def main() -> None:
    """Run the job that the command line names."""
    job = read_job()
    empty = peak_bytes()  # Python and what is imported
    began = time.perf_counter()
    if job.tiles:
        report(job, _vision(job))
        return
    config, limits, weights = _model(job)
    runner = CpuRunner(config, limits, weights, job.threads)
    own = Own(runner)
    loaded = time.perf_counter() - began
    own.prefill(job.tokens[:1])
    first = time.perf_counter() - began
    measured = measure(job, own)
    measured |= {"load_seconds": loaded, "first_token_seconds": first, "versions": {"edgevl": __version__}}
    measured["planned_bytes"] = runner.planned_bytes
    read = sum(weights(part.name).nbytes for part in all_parts(config) if part.region in ("text", "head"))
    row = 2 * config.text.layers * config.text.kv_heads * kv_row_bytes(limits.kv, config.text.head_dim)
    measured["step_bytes"] = {str(depth): read + row * (depth + job.generate // 2) for depth in job.depths}
    resident = peak_bytes()
    measured |= {"backend": runner.backend, "resident_bytes": resident, "model_bytes": resident - empty}
    measured["read_gb_s"] = read_bandwidth(job.threads, 3, CLOCKS[job.clock])
    if job.slots:
        wider = replace(limits, slots=job.slots, logit_rows=max(job.slots, limits.logit_rows))
        many = Own(CpuRunner(config, wider, weights, job.threads))
        measured["batched"] = batched(job, many)
    report(job, measured)


def _model(job: Job) -> tuple[ModelConfig, Limits, Weights]:
    if job.model == "8b":
        return eight_b(job.blocks), Limits(context=4096), random_weights(eight_b(job.blocks))
    if job.model == "tower":
        return tower(job.blocks), Limits(context=64, chunk=64), random_weights(tower(job.blocks))
    bundle = Bundle.open(Path(job.model))
    return bundle.manifest.model, bundle.manifest.limits, bundle.weight


def _vision(job: Job) -> Measured:
    config, limits, weights = _model(job)
    runner = CpuRunner(config, limits, weights, job.threads)
    assert config.vision is not None
    side = config.vision.tile_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    seconds = []
    for _ in range(job.repeats + 1):
        seconds.append(job.seconds(runner.vision, pixels))
    return {"tile_seconds": seconds[1:], "backend": runner.backend, "versions": {"edgevl": __version__}}


if __name__ == "__main__":
    main()
