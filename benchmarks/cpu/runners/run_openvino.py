"""OpenVINO GenAI's LLMPipeline: prefill is its time to the first token, decoding its time for each one after that."""

from __future__ import annotations

import time

import numpy as np
import openvino as ov
import openvino_genai as genai
from runner import Job, Measured, read_job, report


def main() -> None:
    job = read_job()
    began = time.perf_counter()
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # every prompt is to be read
    options = {"INFERENCE_NUM_THREADS": job.threads, "scheduler_config": scheduler}
    pipeline = genai.LLMPipeline(job.model, "CPU", **options)
    loaded = time.perf_counter() - began
    _seconds(pipeline, job.tokens[:1], 1)
    first = time.perf_counter() - began
    measured = _measure(pipeline, job) | {"load_seconds": loaded, "first_token_seconds": first}
    report(job, measured, "openvino", "openvino-genai", "optimum-intel", "nncf")


def _measure(pipeline: genai.LLMPipeline, job: Job) -> Measured:
    found: Measured = {"prefill": {}, "decode": {}}
    for length in job.prefill:
        times = [_seconds(pipeline, job.tokens[:length], 1)[0] for _ in range(job.repeats + 1)]
        found["prefill"][str(length)] = times[1:]
    for depth in job.depths:
        ids = job.tokens[: max(1, depth)]
        found["decode"][str(depth)] = [_seconds(pipeline, ids, job.generate + 1)[1] for _ in range(job.repeats)]
    return found


def _seconds(pipeline: genai.LLMPipeline, ids: list[int], count: int) -> tuple[float, float]:
    """Seconds to the first token, and of all that follow it."""
    config = genai.GenerationConfig(max_new_tokens=count, min_new_tokens=count, ignore_eos=True, do_sample=False)
    prompt = ov.Tensor(np.array([ids], np.int64))
    inputs = genai.TokenizedInputs(prompt, ov.Tensor(np.ones((1, len(ids)), np.int64)))
    metrics = pipeline.generate(inputs, config).perf_metrics
    first = metrics.get_ttft().mean / 1000
    return first, metrics.get_tpot().mean / 1000 * (count - 1) if count > 1 else 0.0


if __name__ == "__main__":
    main()
