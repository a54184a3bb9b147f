"""OpenVINO GenAI's LLMPipeline: prefill is an answer of one token, decoding what a longer one takes beyond that."""

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
    _generate(pipeline, job.tokens[:1], 1)
    first = time.perf_counter() - began
    measured = _measure(pipeline, job) | {"load_seconds": loaded, "first_token_seconds": first}
    report(job, measured, "openvino", "openvino-genai", "optimum-intel", "nncf")


def _measure(pipeline: genai.LLMPipeline, job: Job) -> Measured:
    found: Measured = {"prefill": {}, "decode": {}}
    for length in job.prefill:
        ids = job.tokens[:length]
        times = [job.seconds(_generate, pipeline, ids, 1) for _ in range(job.repeats + 1)]
        found["prefill"][str(length)] = times[1:]
    for depth in job.depths:
        ids = job.tokens[: max(1, depth)]
        times = []
        for _ in range(job.repeats):
            first = job.seconds(_generate, pipeline, ids, 1)
            times.append(job.seconds(_generate, pipeline, ids, job.generate + 1) - first)
        found["decode"][str(depth)] = times
    return found


def _generate(pipeline: genai.LLMPipeline, ids: list[int], count: int) -> None:
    config = genai.GenerationConfig(max_new_tokens=count, min_new_tokens=count, ignore_eos=True, do_sample=False)
    prompt = ov.Tensor(np.array([ids], np.int64))
    pipeline.generate(genai.TokenizedInputs(prompt, ov.Tensor(np.ones((1, len(ids)), np.int64))), config)


if __name__ == "__main__":
    main()
