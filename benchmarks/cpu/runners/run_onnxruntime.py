"""onnxruntime-genai: a generator that is fed the tokens, then asked for one after the other."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from runner import measure, read_job, report


class Genai:
    """A model; a generator for each prompt."""

    def __init__(self, folder: str, threads: int, context: int) -> None:
        path = Path(folder) / "genai_config.json"
        config = json.loads(path.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        path.write_text(json.dumps(config, indent=1))
        self.model, self.context = og.Model(folder), context
        self.generator: og.Generator | None = None

    def prefill(self, ids: list[int]) -> None:
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=self.context, min_length=self.context, do_sample=False)
        self.generator = og.Generator(self.model, params)
        self.generator.append_tokens(np.array([ids], np.int32))
        self.generator.generate_next_token()

    def decode(self, ids: list[int]) -> None:
        """As many tokens as were given; which ones they are is the generator's own choice."""
        for _ in ids:
            self.generator.generate_next_token()


def main() -> None:
    job = read_job()
    began = time.perf_counter()
    longest = max([*job.prefill, *(depth + job.generate for depth in job.depths)])
    model = Genai(job.model, job.threads, longest + 16)
    loaded = time.perf_counter() - began
    model.prefill(job.tokens[:1])
    first = time.perf_counter() - began
    measured = measure(job, model) | {"load_seconds": loaded, "first_token_seconds": first}
    report(job, measured, "onnxruntime", "onnxruntime-genai")


if __name__ == "__main__":
    main()
